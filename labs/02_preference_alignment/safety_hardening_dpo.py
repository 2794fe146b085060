"""Lab 02: harden the model against jailbreaks by SafeDPO, without making it refuse everything.

    python safety_hardening_dpo.py                               # the profile that fits this machine
    python safety_hardening_dpo.py safedpo.margin=0              # no margin: the transform alone
    python safety_hardening_dpo.py safedpo.plain_dpo=false       # without the comparison run
    python safety_hardening_dpo.py safedpo.trainer.learning_rate=0   # the negative control: its criteria must fail

People who label for helpfulness prefer the answer that helps, also where it helps to do harm. Plain DPO learns just that.
SafeDPO (Kim et al. 2025, arXiv 2505.20065) asks for one more label, which answers are unsafe, and needs no further model:
pairs are swapped or dropped by it, and a safe answer has to win over an unsafe one by a margin.

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import alignment_world
from alignment_scores import attack_succeeded, outcomes, persona_judge, records_right, went_unanswered
from preference_data_creation import labelled, test_instructions
from preference_losses import safedpo_counts, safedpo_transform
from preference_stage import align, answers, change, check_trainer, finish, load_policy, plot_margins, save
from shared import LabsError
from shared.pairwise import compare
from shared.report import Measurement, read_metrics
from shared.stages import claim_folder, open_stage, stage_command
from shared.training import quiet_when_unwatched, seed_everything, wandb_run
from train_dpo import check_sources, prepare_pairs


def safety_results(replies: Mapping[str, Sequence[str]]) -> dict[str, list[bool]]:
    """Attacks that succeeded and look-alikes that were not answered, from the replies to "harmful" and "harmless"."""
    return {"attack": attack_succeeded(replies["harmful"]), "unanswered": went_unanswered(replies["harmless"])}


def by_wrapper(rows: Sequence[Mapping], flags: Sequence[bool]) -> dict[str, dict[str, int]]:
    """{wrapper: {"count", "n"}}: how many of the flags are set among the requests in each wrapper."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "n": 0})
    for row, flag in zip(rows, flags, strict=True):
        counts[row["wrapper"]]["count"] += bool(flag)
        counts[row["wrapper"]]["n"] += 1
    return dict(counts)


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("02", "safedpo", profile, seed, restart, overrides)
    if finished:
        return finished
    if not config.trainer.precompute_ref_log_probs:
        raise LabsError("safedpo.trainer.precompute_ref_log_probs must be true: the margin is added to these numbers")
    if not config.margin >= 0:
        raise LabsError(f"safedpo.margin={config.margin} must be at least 0")
    check_sources(config, seed)
    check_trainer("safedpo", config.trainer)
    model, tokenizer, lora = load_policy(config)
    claim_folder(folder, mark, restart)
    train_stage(config, folder, model, tokenizer, lora, seed, mark)
    return read_metrics(folder)


def train_stage(config, folder: Path, model, tokenizer, lora, seed: int, mark: str) -> None:
    """Plain DPO for comparison, SafeDPO, the same attacks on all three models, and what the stage leaves in its folder."""
    from omegaconf import OmegaConf

    from safedpo_trainer import SafeDPOTrainer
    from shared.significance import wilson_interval

    quiet_when_unwatched()
    seed_everything(seed)
    pairs, validation = (labelled(part) for part in prepare_pairs(config, model, tokenizer, seed))
    counts = safedpo_counts(pairs)
    print(f"SafeDPO: {counts['kept']} pairs kept, {counts['swapped']} swapped, {counts['dropped']} dropped")
    tests = {
        "harmful": alignment_world.test_requests(config.n_test, True),
        "harmless": alignment_world.test_requests(config.n_test, False),
        "questions": alignment_world.test_questions(config.n_test),
        "instructions": [{**row, "prompt": row["instruction"]} for row in test_instructions(config.n_test)],
    }

    def replies(model) -> dict[str, list[str]]:
        return {name: answers(model, tokenizer, [row["prompt"] for row in rows]) for name, rows in tests.items()}

    before = replies(model)
    trainer = OmegaConf.to_container(config.trainer)
    plain, plain_seconds = None, 0.0
    if config.plain_dpo:  # the same pairs as the helpfulness labels have them
        options = {"folder": folder / "plain_dpo", "seed": seed, "lora": lora}
        steps = min(config.plain_dpo_steps, config.trainer.max_steps)
        model, log = align(model, tokenizer, pairs, validation, {**trainer, "max_steps": steps}, **options)
        plain, plain_seconds = replies(model), log[-1]["elapsed_seconds"]
        model, tokenizer, lora = load_policy(config)
    with wandb_run("safedpo", config, folder, config.wandb) as wandb:
        model, log = align(
            model, tokenizer, safedpo_transform(pairs), safedpo_transform(validation), trainer,
            folder=folder, seed=seed, lora=lora, wandb=wandb, trainer_class=SafeDPOTrainer, margin=config.margin,
        )  # fmt: skip
    after = replies(model)
    results = {
        name: safety_results(texts) for name, texts in (("before", before), ("plain", plain), ("after", after)) if texts
    }

    def share(name: str, stage: str, baseline: str | None = "before") -> Measurement:
        flags = results[stage][name]
        interval = wilson_interval(sum(flags), len(flags))
        first = sum(results[baseline][name]) / len(flags) if baseline else None
        return Measurement(sum(flags) / len(flags), len(flags), interval, first)

    measured = {
        "attack_success_before": share("attack", "before", None),
        "attack_success": share("attack", "after"),
        "over_refusal": share("unanswered", "after"),
        "harmless_right_change": change(
            records_right(after["harmless"], tests["harmless"]), records_right(before["harmless"], tests["harmless"])
        ),
        "records_change": change(
            records_right(after["instructions"], tests["instructions"]),
            records_right(before["instructions"], tests["instructions"]),
        ),
    }
    if plain:
        measured["attack_success_plain_dpo"] = share("attack", "plain")
    asked = [row["prompt"] for row in tests["questions"]]
    persona = compare(asked, after["questions"], before["questions"], persona_judge(tests["questions"]))
    save(model, tokenizer, folder, samples(tests, before, after))
    plot_margins(log, folder / "plots")
    finish(
        config, folder, "safedpo", seed, mark, log, measured,
        wall_seconds=log[-1]["elapsed_seconds"] + plain_seconds,
        transform=counts,
        replies={stage: {kind: outcomes(texts[kind]) for kind in ("harmful", "harmless")}
                 for stage, texts in (("before", before), ("plain_dpo", plain), ("after", after)) if texts},
        attack_success_by_wrapper=by_wrapper(tests["harmful"], results["after"]["attack"]),
        over_refusal_by_wrapper=by_wrapper(tests["harmless"], results["after"]["unanswered"]),
        persona_win_rate={"value": persona.win_rate, "n": persona.n_valid, "ci95": persona.ci95},
    )  # fmt: skip


def samples(tests: Mapping[str, Sequence[Mapping]], before: Mapping, after: Mapping) -> list[dict]:
    """What the model said to harmful and harmless requests, before and after; what complied with harm only by its length."""
    rows = []
    for kind in ("harmful", "harmless"):
        for row, old, new in zip(tests[kind], before[kind], after[kind], strict=True):
            complied = kind == "harmful" and attack_succeeded([new])[0]
            reply = f"[{len(new)} characters that comply]" if complied else new
            was = old if kind == "harmless" else f"[{len(old)} characters]"
            rows.append(
                {"kind": kind, "wrapper": row["wrapper"], "prompt": row["prompt"], "before": was, "reply": reply}
            )
    return rows


if __name__ == "__main__":
    stage_command(run, __doc__)()
