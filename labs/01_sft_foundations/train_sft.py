"""Lab 01: teach the base model to follow instructions and to answer in the schema that was asked for.

    python train_sft.py                                         # the profile that fits this machine
    python train_sft.py --profile tiny sft.method=lora          # an adapter instead of all weights
    python train_sft.py --profile local --seed 1                # QLoRA on a 24 GB card
    python train_sft.py sft.trainer.learning_rate=0             # the negative control: its criteria must fail
    python train_sft.py sft.data=my_rows.jsonl                  # your own rows: Alpaca, ShareGPT or messages

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from data_formatting import clean, deduplicate, read_rows, render, split, to_messages, validate
from schema_answers import SchemaResult, score
from shared import LabsError, tiny_world
from shared.profiles import ensure_stage
from shared.report import Measurement, criteria_table, evaluate, read_metrics, write_metrics
from shared.stages import claim_folder, log_callback, newest_checkpoint, open_stage, stage_command, trainer_defaults
from shared.training import (
    TrainLog,
    atomic_write_text,
    plot_curves,
    quiet_when_unwatched,
    seed_everything,
    wandb_run,
)

# TRL's numbers under this curriculum's names.
LOGGED = {
    "loss": "train/loss",
    "eval_loss": "validation/loss",
    "mean_token_accuracy": "train/token_accuracy",
    "eval_mean_token_accuracy": "validation/token_accuracy",
    "grad_norm": "train/grad_norm",
}


def generated_rows(n: int, seed: int, question_share: float = 0.0) -> list[dict]:
    """`n` training rows of the tiny world, as Alpaca records: instructions to answer in a schema and, in the share given,
    questions to answer in words (most of them at length, as people who are paid by the word write).

    Without questions the instructions are bare; with them they come as people write them, with small talk and reasons.
    """
    rng = random.Random(f"instructions {seed}")
    rows = []
    for _ in range(n):
        if not question_share:
            rows.append(tiny_world.instruction(rng, "train"))
        elif rng.random() >= question_share:
            rows.append(tiny_world.chatty_instruction(rng, "train"))
        else:
            asked = tiny_world.question(rng, "train")
            # Of the ways to begin one must be the usual one. If all are as likely, the likeliest word, which is what greedy
            # decoding says, is as often brief as not, and lab 02's preference for brevity has only half of it to change.
            answer = asked[rng.choices(("usual", "long", "brief"), (2, 4, 4))[0]]
            rows.append({"instruction": asked["prompt"], "input": "", "output": answer})
    return rows


def test_rows(n: int, phrasing: str = "train", seed: int = 0) -> list[dict]:
    """`n` instructions about held-out people, places and numbers; with phrasing="held_out" in unseen words as well.

    They do not depend on the training seed: every run is judged on the same questions.
    """
    rng = random.Random(f"held-out instructions {phrasing} {seed}")
    return [tiny_world.instruction(rng, "held_out", phrasing) for _ in range(n)]


def test_questions(n: int, seed: int = 0) -> list[dict]:
    """`n` questions about held-out people and things, to be answered in words."""
    rng = random.Random(f"held-out questions in words {seed}")
    rows = [tiny_world.question(rng, "held_out") for _ in range(n)]
    return [{"instruction": row["prompt"], "input": "", "output": row["brief"], "value": row["value"]} for row in rows]


def load_data(config, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and validation rows, cleaned, checked and split: the generated ones or those of the file `config.data`."""
    rows = (
        generated_rows(config.n_train, seed, config.question_share)
        if config.data == "tiny_world"
        else read_rows(config.data)
    )
    rows = clean(rows)
    validate(rows)
    rows = list(deduplicate(rows, config.near_copy_threshold))
    return split(rows, config.validation_fraction, seed)


def tokenized(rows: list[dict], tokenizer, max_length: int, mask: bool = True):
    """A `datasets.Dataset` of input_ids and labels: -100 wherever the assistant does not speak (or nowhere: mask=False)."""
    from datasets import Dataset

    examples = []
    for row in rows:
        ids, loss_mask = render(to_messages(row), tokenizer)
        labels = [token if keep or not mask else -100 for token, keep in zip(ids, loss_mask, strict=True)]
        if len(ids) <= max_length and any(label != -100 for label in labels):
            examples.append({"input_ids": ids, "labels": labels})
    if not examples:
        raise LabsError(f"every row is longer than trainer.max_length={max_length} tokens: raise it")
    return Dataset.from_list(examples)


def answers(model, tokenizer, rows: list[dict], max_new_tokens: int = 64) -> list[str]:
    """The model's greedy reply to each instruction."""
    from shared.models import generate_replies

    conversations = [to_messages(row)[:-1] for row in rows]
    return generate_replies(model, tokenizer, conversations, max_new_tokens=max_new_tokens)


def finetune(
    model, tokenizer, train_rows: list[dict], validation_rows: list[dict], trainer_settings: dict[str, Any], *,
    folder: Path, seed: int = 0, mask: bool = True, resume: bool = True, wandb=None,
) -> list[dict]:  # fmt: skip
    """Train with TRL's `SFTTrainer` and return the rows of `folder`/train_log.jsonl.

    `trainer_settings` are fields of `trl.SFTConfig`. The model is changed in place; checkpoints go to
    `folder`/checkpoints, and with `resume` the newest complete one is gone on from. `wandb` is a run to log to as well.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(folder)
    checkpoints = folder / "checkpoints"
    last = newest_checkpoint(checkpoints, resume)
    log = TrainLog(folder / "train_log.jsonl", resume_from=int(last.rsplit("-", 1)[1]) if last else 0)
    max_length = trainer_settings.get("max_length") or 1024
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**trainer_defaults(checkpoints, seed), **trainer_settings}),
        processing_class=tokenizer,
        train_dataset=tokenized(train_rows, tokenizer, max_length, mask),
        # The validation loss is always that of the answers, whatever the training loss counts.
        eval_dataset=tokenized(validation_rows, tokenizer, max_length),
        callbacks=[log_callback(log, LOGGED, wandb)],
    )
    trainer.remove_callback(PrinterCallback)  # the log file and the plot show the same numbers, readably
    trainer.train(resume_from_checkpoint=last)
    trainer.model.eval()
    return log.rows


def losses_of(model, dataset) -> list[float]:
    """The loss (nats a token) of each row of a `tokenized` data set by itself."""
    import torch

    losses = []
    with torch.no_grad():
        for row in dataset:
            ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return losses


def measure(results: list[SchemaResult]) -> dict[str, tuple[float, int]]:
    n = len(results)
    return {"valid": (sum(r.valid for r in results), n), "right": (sum(r.right for r in results), n)}


def answered(model, tokenizer, rows: list[dict]) -> tuple[int, int]:
    """(questions in words that are answered with the right value, all of them)."""
    replies = answers(model, tokenizer, rows)
    return sum(tiny_world.gives_value(reply, row["value"]) for reply, row in zip(replies, rows, strict=True)), len(rows)


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("01", "sft", profile, seed, restart, overrides)
    if config.method not in ("full", "lora"):
        raise LabsError(f"sft.method={config.method!r}: choose full or lora")
    if finished:
        return finished
    train_rows, validation_rows = load_data(config, seed)
    base = ensure_stage("base", config.profile)
    claim_folder(folder, mark, restart)
    train_stage(config, folder, str(base / "model") if base else config.model, train_rows, validation_rows, seed, mark)
    return read_metrics(folder)


def train_stage(config, folder: Path, model_name: str, train_rows, validation_rows, seed: int, mark: str) -> None:
    """Baseline, training, measurement and everything the stage leaves in its folder."""
    from omegaconf import OmegaConf

    from shared.models import load_model, save_adapter_or_model
    from shared.significance import bootstrap_ci, wilson_interval

    quiet_when_unwatched()
    seed_everything(seed)
    lora = OmegaConf.to_container(config.lora) if config.method == "lora" else None
    model, tokenizer = load_model(
        model_name, for_training=True, backend=config.backend, load_in_4bit=config.load_in_4bit, lora=lora
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(train_rows)} training and {len(validation_rows)} validation rows; {trainable:,} trainable parameters")
    questions = test_rows(config.n_test)
    in_words = test_questions(config.n_test)
    before = measure(score(answers(model, tokenizer, questions), questions))
    words_before = answered(model, tokenizer, in_words)
    trainer = OmegaConf.to_container(config.trainer)
    with wandb_run("sft", config, folder, config.wandb) as run:
        log = finetune(model, tokenizer, train_rows, validation_rows, trainer, folder=folder, seed=seed, wandb=run)
    replies = answers(model, tokenizer, questions)
    results = score(replies, questions)
    after = measure(results)
    rephrased = test_rows(config.n_test, "held_out")
    new_words = measure(score(answers(model, tokenizer, rephrased), rephrased))

    def share(counts: tuple[int, int], baseline: tuple[int, int] | None = None) -> Measurement:
        right, n = counts
        return Measurement(right / n, n, wilson_interval(right, n), baseline[0] / baseline[1] if baseline else None)

    losses = [row["validation/loss"] for row in log if "validation/loss" in row]
    plateau = losses[-1] / min(losses)
    row_losses = losses_of(model, tokenized(validation_rows, tokenizer, config.trainer.max_length))
    spread = [bound / (sum(row_losses) / len(row_losses)) for bound in bootstrap_ci(row_losses, seed=0)]
    measured = {
        "values_right": share(after["right"], before["right"]),
        "schema_valid": share(after["valid"], before["valid"]),
        "values_right_before": share(before["right"]),
        "questions_right": share(answered(model, tokenizer, in_words), words_before),
        "validation_plateau": Measurement(plateau, len(row_losses), tuple(plateau * bound for bound in spread)),
    }
    rows = [
        {"prompt": question["instruction"], "reply": reply, "expected": question["output"], "result": result.reason}
        for question, reply, result in zip(questions, replies, results, strict=True)
    ]
    atomic_write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    kept = save_adapter_or_model(model, tokenizer, folder)
    shutil.rmtree(folder / ("model" if kept.name == "adapter" else "adapter"), ignore_errors=True)
    plot_curves({"sft": log}, ["train/loss", "validation/loss"], folder / "plots" / "loss.png", y_label="nats a token")
    metrics = write_metrics(
        folder,
        stage="sft",
        profile=config.profile,
        seed=seed,
        wall_seconds=log[-1]["elapsed_seconds"],
        criteria=evaluate(config.criteria, measured),
        extra={
            "settings": mark,
            "time_budget_seconds": config.time_budget_seconds,
            "method": config.method,
            "trainable_parameters": trainable,
            "new_phrasing": {key: dict(zip(("right", "n"), counts, strict=True)) for key, counts in new_words.items()},
        },
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(criteria_table(metrics))


if __name__ == "__main__":
    stage_command(run, __doc__)()
