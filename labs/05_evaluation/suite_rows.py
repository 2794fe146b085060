"""The word problems that the suite asks: lab 03's own held-out ones, and what its prompted baseline is shown."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any


@functools.cache
def _drawn(profile: str) -> list[dict[str, Any]]:
    from cold_start import held_out
    from shared.profiles import load_profile

    return held_out(load_profile("03", profile).grpo)[1]


def problems(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first `n` of lab 03's test problems; with `shift`, the same with new names, numbers or phrasing, row by row."""
    rows = _drawn(settings["profile"])[: settings["n"]]
    if not settings.get("shift"):
        return rows
    from distribution_shift import shift_rows

    return shift_rows(rows, settings["shift"])


@functools.cache
def _examples(profile: str, shots: int, seed: int) -> list[dict[str, Any]]:
    from cold_start import problems_of
    from shared.profiles import load_profile

    return problems_of(load_profile("03", profile).cold_start, seed)["train"][:shots]


def worked_examples(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The training problems that lab 03 shows its prompted baseline."""
    return _examples(settings["profile"], settings["shots"], 0)
