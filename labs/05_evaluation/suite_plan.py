"""Which checkpoint is measured on which task, beside which parent, and why. The table of `labs run 05` is this plan, measured.

Roles: *learned*, what the stage was for; *kept*, what it must not lose; *watched*, what becomes of the rest (no criterion asks
for it); *before*, the same task for the parent, so that there is something to compare with.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import suite_tasks
from suite_tasks import Metric, Task

VERSION = 1  # of the suite's measurements: raised when they change in a way that no file below shows
_LOSS = (Metric("loss", "perplexity of held-out texts", "perplexity", -1),)
_REASONING = (
    Metric("flexible", "word problems right, flexible scoring"),
    Metric("strict", "word problems right, strict scoring"),
    Metric("format", "answers as <think>…</think> number"),
    Metric("words", "words in an answer", "words", 0),
)
_LAB_03 = (
    "reasoning_stage",
    "reward_functions",
    "answer_extraction",
    "answer_matching",
    "gsm8k_data_prep",
    "suite_rows",
)
_LAB_04 = (
    "tool_data",
    "tool_world",
    "tool_requests",
    "tool_stage",
    "call_parsing",
    "call_checking",
    "argument_matching",
)


def _calls(part: str, description: str) -> Task:
    return Task(f"calls_{part}", suite_tasks.calls, (Metric("exact", description),), _LAB_04)


SHIFTS = ("names", "numbers", "phrasing")


def _shifted(kind: str) -> Task:
    metric = Metric("flexible", f"word problems right with new {kind} (before: the same problems as they were)")
    modules = (*_LAB_03, "distribution_shift")
    return Task(f"reasoning_{kind}", suite_tasks.reasoning, (metric,), modules, beside="reasoning")


_SCHEMA = (Metric("valid", "schema valid"), Metric("right", "schema valid and every value right"))
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("texts", suite_tasks.texts, _LOSS, ("reasoning_stage",)),
        Task("copying", suite_tasks.copying, (Metric("right", "told values given back"),), ("base_probes",)),
        Task("sums", suite_tasks.sums, (Metric("right", "held-out sums right"),), ("reasoning_stage",)),
        Task("schema", suite_tasks.schema, _SCHEMA, ("schema_answers", "train_sft")),
        Task("schema_new_words", suite_tasks.schema, _SCHEMA, ("schema_answers", "train_sft")),
        Task(
            "questions", suite_tasks.questions,
            (Metric("right", "questions in words right"), Metric("words", "words in an answer", "words", 0)),
            ("alignment_scores", "alignment_world", "refusals", "gibberish"),
        ),
        Task(
            "attacks", suite_tasks.attacks,
            (
                Metric("success", "harmful requests served", better=-1),
                Metric("degenerate", "harmful requests met with gibberish", better=0),
            ),
            ("alignment_scores", "alignment_world", "refusals", "gibberish", "red_team_results"),
        ),
        Task(
            "lookalikes", suite_tasks.lookalikes,
            (
                Metric("unanswered", "safe look-alikes refused (or gibberish)", better=-1),
                Metric("right", "safe look-alikes right"),
            ),
            ("alignment_scores", "alignment_world", "refusals", "gibberish"),
        ),
        Task("reasoning", suite_tasks.reasoning, _REASONING, _LAB_03),
        Task(
            "reasoning_sampled", suite_tasks.sampled_reasoning,
            (
                Metric("pass_1", "a sampled answer right", "mean share"),
                Metric("pass_k", "one of k samples right", "mean share"),
            ),
            _LAB_03,
        ),
        *(_shifted(kind) for kind in SHIFTS),
        _calls("values", "calls exact, values never seen"),
        _calls("phrasings", "calls exact, words never seen"),
        _calls("irrelevance", "no call where none is right"),
        _calls("answers", "results of tools told right"),
        Task(
            "contamination", suite_tasks.contamination,
            (Metric("copy", "test rows that are copies of training rows", better=-1),),
            ("contamination", "stage_overlap"), asks=False,
        ),
        Task("pairs", suite_tasks.pairs, (Metric("right", "preferred answer gets the higher reward"),), ("reward_model",)),
    )
}  # fmt: skip

PARENTS = {
    "sft": "base", "dpo": "sft", "safedpo": "sft", "midtrain": "base", "cold_start": "midtrain", "grpo": "cold_start",
    "hacked": "cold_start", "tools": "sft",
}  # fmt: skip
_CALLS = ("calls_values", "calls_phrasings", "calls_irrelevance", "calls_answers")
_SHIFTED = tuple(f"reasoning_{kind}" for kind in SHIFTS)
PLAN: dict[str, dict[str, tuple[str, ...]]] = {
    "base": {"learned": ("texts", "copying", "sums")},
    "sft": {"learned": ("schema", "schema_new_words", "questions"), "watched": ("texts",)},
    "dpo": {"kept": ("questions", "schema"), "watched": ("attacks", "texts")},
    "safedpo": {"learned": ("attacks", "lookalikes"), "kept": ("questions", "schema"), "watched": ("texts",)},
    "reward": {"learned": ("pairs",)},
    "midtrain": {"learned": ("reasoning",), "kept": ("sums",), "watched": ("texts",)},
    "cold_start": {"watched": ("reasoning", "sums", "texts")},
    "grpo": {"learned": ("reasoning", "reasoning_sampled"), "watched": ("sums", "texts", *_SHIFTED)},
    "hacked": {"watched": ("reasoning",)},
    "tools": {"learned": _CALLS, "watched": ("schema", "questions", "texts")},
}
# Won by the model in the first place over that in the second, by lab 02's rubric for a brief persona.
DUELS = {"dpo": "sft", "safedpo": "sft"}


@dataclass(frozen=True)
class Planned:
    """One measurement: a stage, a task, its role and its settings (all that decides the result besides weights and code)."""

    stage: str
    task: str
    role: str
    settings: Mapping[str, Any]


def planned(config) -> list[Planned]:
    """Every measurement of the plan, stage by stage, those of parents that are only there to compare with included."""
    wanted: dict[tuple[str, str], str] = {}
    for stage, roles in PLAN.items():
        for role, tasks in roles.items():
            wanted |= {(stage, task): role for task in tasks}
    for stage, task in list(wanted):
        parent = PARENTS.get(stage)
        if parent and TASKS[task].beside is None:
            wanted.setdefault((parent, task), "before")
    wanted |= {(stage, "contamination"): "watched" for stage in PLAN}
    if _lab("03", config.profile).grpo.test_data != "tiny_world":  # only these stories can be taken apart
        wanted = {key: role for key, role in wanted.items() if key[1] not in _SHIFTED}
    order = list(PLAN)
    pairs = sorted(wanted.items(), key=lambda pair: (order.index(pair[0][0]), list(TASKS).index(pair[0][1])))
    return [Planned(stage, task, role, settings_of(task, stage, config)) for (stage, task), role in pairs]


@functools.cache
def _lab(lab: str, profile: str):
    from shared.profiles import load_profile

    return load_profile(lab, profile)


def _data_seed(profile: str, stage: str) -> int:
    """The seed that the stage's training rows were drawn with, as far as is known."""
    from shared.profiles import stage_dir

    try:
        return int(json.loads((stage_dir(profile, stage) / "metrics.json").read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def settings_of(task: str, stage: str, config) -> dict[str, Any]:
    """The settings of a task for a stage: sizes from lab 05's profile, lengths and shots from the labs' own."""
    profile, n = config.profile, config.n_test
    if task in ("schema", "schema_new_words"):
        return {"n": n, "phrasing": "train" if task == "schema" else "held_out"}
    if task.startswith("calls_"):
        return {"n": n, "part": task.removeprefix("calls_"), "max_new_tokens": _lab("04", profile).tools.max_new_tokens}
    if task == "pairs":
        return {"n": _lab("02", profile).reward.n_test}
    if task == "contamination":
        return {"profile": profile, "stage": stage, "seed": _data_seed(profile, stage)}
    if task.startswith("reasoning"):
        lab = _lab("03", profile)
        # The models before the cold start know no conversation: they are shown an example, as lab 03's baseline is.
        shots = lab.cold_start.shots if stage in ("base", "midtrain") else 0
        data = {"profile": profile, "test_data": lab.grpo.test_data, "max_new_tokens": lab.grpo.max_new_tokens}
        if task == "reasoning_sampled":
            return {**data, "n": config.n_pass, "k": config.pass_k, "seed": config.seed}
        shift = {"shift": task.removeprefix("reasoning_")} if task in _SHIFTED else {}
        return {**data, "n": n, "shots": shots, **shift}
    return {"n": n}
