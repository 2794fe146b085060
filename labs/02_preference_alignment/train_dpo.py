"""Lab 02: a preference becomes a gradient. Teaches the fine-tuned model a concise persona by DPO.

    python train_dpo.py                                          # the profile that fits this machine
    python train_dpo.py dpo.trainer.beta=0.5                     # a shorter leash to the reference
    python train_dpo.py 'dpo.trainer.loss_type=[sigmoid]'        # without the SFT term: watch what happens to the text
    python train_dpo.py --profile local --seed 1                 # QLoRA on a 24 GB card
    python train_dpo.py dpo.data=pairs.jsonl                     # your own triplets, as the labelling app exports them
    python train_dpo.py dpo.trainer.learning_rate=0              # the negative control: its criteria must fail

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

import random
from pathlib import Path

import alignment_world
from alignment_scores import facts_right, persona_judge, records_right
from preference_data_creation import (
    as_messages,
    collect,
    filter_pairs,
    from_samples,
    held_out_prompts,
    report_lines,
    split_pairs,
    test_instructions,
)
from preference_stage import align, answers, change, check_trainer, finish, load_policy, plot_margins, save
from shared import LabsError, tiny_world
from shared.pairwise import compare
from shared.report import Measurement, read_metrics
from shared.stages import claim_folder, open_stage, stage_command
from shared.training import quiet_when_unwatched, seed_everything, wandb_run


def sampled_pairs(model, tokenizer, n: int, seed: int) -> tuple[list[dict], dict[str, int]]:
    """Two answers of the model itself to each of `n` questions, judged by the rubric: pairs it might really have to tell
    apart, which no template gives. Returns (triplets, how many questions gave none and why)."""
    from shared.models import generate_replies

    rng = random.Random(f"questions to sample on {seed}")
    rows = list({row["prompt"]: row for row in (tiny_world.question(rng) for _ in range(n))}.values())
    prompts = [row["prompt"] for row in rows]
    first, second = (
        generate_replies(model, tokenizer, [as_messages(p) for p in prompts], 48, temperature=1.0, seed=2 * seed + turn)
        for turn in (0, 1)
    )
    usable = [index for index in range(len(prompts)) if first[index].strip() and second[index].strip()]
    chosen = [[texts[index] for index in usable] for texts in (prompts, first, second)]
    triplets, dropped = from_samples(*chosen, persona_judge(rows))
    return triplets, {**dropped, "empty answer": len(prompts) - len(usable)}


def check_sources(config, seed: int) -> None:
    """Read a little of every source, so that a mistake in somebody's own file shows before anything is built."""
    if not sources(config.data) and not config.n_sampled:
        raise LabsError("there is nothing to train on: name a source in the setting `data`, or set n_sampled")
    for source, _ in sources(config.data):
        collect(source, 2, seed, config.max_length_ratio)


def sources(data) -> list[tuple[str, int]]:
    """(source, how many of its rows at most) of every entry of a `data` setting, which may also be a single entry."""
    return [source_and_count(str(entry)) for entry in ([data] if isinstance(data, str) else data or [])]


def source_and_count(entry: str) -> tuple[str, int]:
    """ "safety:2000" → ("safety", 2000): a source and how many of its rows at most; without a number, all there are."""
    source, _, count = entry.rpartition(":")
    return (source, int(count)) if source and count.isdigit() else (entry, 10**6 if Path(entry).suffix else 2000)


def prepare_pairs(config, model, tokenizer, seed: int) -> tuple[list[dict], list[dict]]:
    """(training, validation) triplets of `config.data` and of the model's own samples; says what was dropped and why."""
    pairs: list[dict] = []
    for source, count in sources(config.data):
        rows, lines = collect(source, count, seed, config.max_length_ratio)
        print(f"{source}: " + "; ".join(lines))
        pairs += rows
    if config.n_sampled:
        rows, dropped = sampled_pairs(model, tokenizer, config.n_sampled, seed)
        rows, filtered = filter_pairs(rows, held_out_prompts(), config.max_length_ratio)
        print("samples: " + "; ".join(report_lines(len(rows), {**dropped, **filtered})))
        pairs += rows
    return split_pairs(pairs, config.validation_fraction, seed)


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("02", "dpo", profile, seed, restart, overrides)
    if finished:
        return finished
    check_sources(config, seed)
    check_trainer("dpo", config.trainer)
    model, tokenizer, lora = load_policy(config)
    claim_folder(folder, mark, restart)
    train_stage(config, folder, model, tokenizer, lora, seed, mark)
    return read_metrics(folder)


def train_stage(config, folder: Path, model, tokenizer, lora, seed: int, mark: str) -> None:
    """Pairs, training, measurement against the model as it was, and everything the stage leaves in its folder."""
    from omegaconf import OmegaConf

    quiet_when_unwatched()
    seed_everything(seed)
    pairs, validation = prepare_pairs(config, model, tokenizer, seed)
    print(f"{len(pairs)} training and {len(validation)} validation pairs")
    questions, instructions = alignment_world.test_questions(config.n_test), test_instructions(config.n_test)
    asked = [row["prompt"] for row in questions]
    told = [row["instruction"] for row in instructions]
    before, forms_before = (answers(model, tokenizer, prompts) for prompts in (asked, told))
    with wandb_run("dpo", config, folder, config.wandb) as wandb:
        trainer = OmegaConf.to_container(config.trainer)
        model, log = align(
            model, tokenizer, pairs, validation, trainer, folder=folder, seed=seed, lora=lora, wandb=wandb
        )
    after, forms_after = (answers(model, tokenizer, prompts) for prompts in (asked, told))
    result = compare(asked, after, before, persona_judge(questions))
    rows = [
        {"prompt": row["prompt"], "reply": new, "before": old, "value": row["value"], "verdict": verdict}
        for row, new, old, verdict in zip(questions, after, before, result.verdicts, strict=True)
    ]
    measured = {
        "persona_win_rate": Measurement(result.win_rate, result.n_valid, result.ci95, 0.5),
        "persona_win_rate_low": Measurement(result.ci95[0], result.n_valid, result.ci95, 0.5),
        "facts_change": change(facts_right(after, questions), facts_right(before, questions)),
        "records_change": change(records_right(forms_after, instructions), records_right(forms_before, instructions)),
    }
    words = {name: sum(len(text.split()) for text in texts) / len(texts) for name, texts in
             (("before", before), ("after", after))}  # fmt: skip
    save(model, tokenizer, folder, rows)
    plot_margins(log, folder / "plots")
    finish(config, folder, "dpo", seed, mark, log, measured, words_in_an_answer=words, pairs=len(pairs))


if __name__ == "__main__":
    stage_command(run, __doc__)()
