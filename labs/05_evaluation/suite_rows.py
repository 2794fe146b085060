"""The word problems that the suite asks: lab 03's own held-out ones, and what its prompted baseline is shown."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any


@functools.cache
def _drawn(profile: str, overrides: str) -> tuple[list[dict], Any]:
    from cold_start import held_out
    from shared.profiles import load_profile

    config = load_profile("03", profile, json.loads(overrides)).grpo
    return held_out(config)[1], config


def problems(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first `n` of lab 03's test problems; with `shift`, as many with new names, numbers or another phrasing."""
    if settings.get("shift"):
        from distribution_shift import shifted_problems

        return [row for row in shifted_problems(settings["n"], 0) if row["shift"] == settings["shift"]]
    return _drawn(settings["profile"], "[]")[0][: settings["n"]]


@functools.cache
def _examples(profile: str, shots: int, seed: int) -> list[dict[str, Any]]:
    from cold_start import problems_of
    from shared.profiles import load_profile

    return problems_of(load_profile("03", profile).cold_start, seed)["train"][:shots]


def worked_examples(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The training problems that lab 03 shows its prompted baseline."""
    return _examples(settings["profile"], settings["shots"], 0)
