"""Lab 03, before the reinforcement: the base model reads worked problems, as plain text among its other reading.

    python midtrain.py                                       # the profile that fits this machine
    python midtrain.py --profile tiny midtrain.trainer.max_steps=200 midtrain.trainer.lr_scheduler_kwargs.num_decay_steps=140

Reinforcement learning makes likely what a model already says now and then; it cannot reward an answer that is never given.
The models that reasoning recipes are shown on have read much mathematics (and gain little where they have not: Wang et al.
2025, arXiv 2506.20512). Lab 00's base has read sums, and never a story with a sum in it: what "gives 3 away" does to a number
is nothing it can know. So it reads on for a minute: worked problems as plain text, no conversation, no tags, and the old
kinds of text among the new so that they are not forgotten.

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gsm8k_data_prep import prepare
from reasoning_stage import check_trainer, solution_loss, sum_accuracy
from shared import LabsError, tiny_world
from shared.profiles import nearest
from shared.report import Measurement, read_metrics
from shared.stages import (
    claim_folder,
    finish,
    load_policy,
    log_callback,
    newest_checkpoint,
    open_stage,
    save,
    stage_command,
    trainer_defaults,
)
from shared.training import TrainLog, plot_curves, seed_everything, wandb_run

LOGGED = {"loss": "train/loss", "eval_loss": "validation/loss", "grad_norm": "train/grad_norm"}


Document = tuple[str, str]  # a question and its solution, or "" and the whole text; all of it is learned from


def worked_problem(rng: random.Random, split: str = "train") -> Document:
    """A word problem of one to three steps as a book tells it: the question, then its steps and its answer, no tags."""
    row = tiny_world.word_problem(rng, split, rng.randint(1, 3))
    return row["question"], f" {tiny_world.worked_steps(row)} {row['answer']}."


def events(rng: random.Random, split: str = "train") -> Document:
    """What happened to somebody, told and then noted: `Ida loses 5. Ida buys 3 more. = loses 5. buys 3 more.`

    Lab 00 copied names, towns and things; this makes the verbs into words that can be copied, too.
    """
    name = rng.choice(tiny_world.pool("name", split))
    forms = rng.choices((*tiny_world.GAINS, *tiny_world.LOSSES), k=rng.randint(1, 4))
    told = [form.format(name=name, k=rng.randint(1, tiny_world.LARGEST)) for form in forms]
    return " ".join(told), f" = {' '.join(event.removeprefix(f'{name} ') for event in told)}"


def whole(make: Callable[[random.Random, str], str]) -> Callable[[random.Random, str], Document]:
    """A kind of lab 00's texts as a document without a question."""
    return lambda rng, split="train": ("", make(rng, split))


KINDS: dict[str, Callable[[random.Random, str], Document]] = {
    **{kind: whole(make) for kind, make in tiny_world.TEXTS.items()},
    "worked_problem": worked_problem,
    "events": events,
}


def published(name: str) -> Callable[[random.Random, str], Document]:
    """Questions and solutions of a published set (gsm8k, math) as documents."""

    @functools.cache
    def rows(split: str) -> list[dict]:
        return prepare(name, "train" if split == "train" else "test")

    def draw(rng: random.Random, split: str = "train") -> Document:
        row = rng.choice(rows(split))
        return row["question"], f" {row['solution']} {row['answer']}"

    return draw


def documents(rng: random.Random, mix: Sequence[str], split: str = "train") -> Iterator[Document]:
    """An endless stream of documents: `mix` names the kinds, each with its weight, as in "events:0.1" (default: 1).

    Raises LabsError for an unknown kind and for a weight that is no number above 0.
    """
    known = {**KINDS, "gsm8k": published("gsm8k"), "math": published("math")}
    makers, weights = [], []
    for entry in mix:
        kind, _, weight = str(entry).partition(":")
        if kind not in known:
            raise LabsError(f"midtrain.mix has an unknown kind {kind!r}: {nearest(kind, known)}")
        if not re.fullmatch(r"\d+(\.\d+)?", weight or "1") or not float(weight or 1):
            raise LabsError(f"midtrain.mix: {entry!r} wants a weight above 0, as in {kind}:0.5")
        makers.append(known[kind])
        weights.append(float(weight or 1))
    if not makers:
        raise LabsError(f"midtrain.mix is empty: name some of {', '.join(known)}")
    while True:
        yield rng.choices(makers, weights)[0](rng, split)


def windows(tokenizer, stream: Iterator[Document], count: int, length: int):
    """A `datasets.Dataset` of `count` rows of `length` tokens: documents joined, each behind the begin mark, and cut."""
    from datasets import Dataset

    begin = (
        tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    )  # Qwen has no begin mark
    ids: list[int] = []
    while len(ids) < count * length:
        texts = ["".join(next(stream)) for _ in range(500)]
        for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids += [begin, *row]
    rows = [ids[start : start + length] for start in range(0, count * length, length)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def read_on(model, tokenizer, config, *, folder: Path, seed: int = 0, lora: Mapping | None = None, wandb=None):
    """Train on; return (the model, the rows of `folder`/train_log.jsonl). Goes on from the newest whole checkpoint there."""
    from omegaconf import OmegaConf
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    settings = OmegaConf.to_container(config.trainer)
    checkpoints = folder / "checkpoints"
    last = newest_checkpoint(checkpoints)
    log = TrainLog(folder / "train_log.jsonl", resume_from=int(last.rsplit("-", 1)[1]) if last else 0)
    rows = settings["max_steps"] * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    mix = config.mix
    held_out = documents(random.Random("validation texts"), config.held_out_mix, "held_out")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**trainer_defaults(checkpoints, seed), **settings}),
        processing_class=tokenizer,
        train_dataset=windows(tokenizer, documents(random.Random(f"midtrain {seed}"), mix), rows, config.context),
        eval_dataset=windows(tokenizer, held_out, 100, config.context),
        peft_config=LoraConfig(**lora) if lora else None,
        callbacks=[log_callback(log, LOGGED, wandb)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    trainer.model.eval()
    return trainer.model, log.rows


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("03", "midtrain", profile, seed, restart, overrides)
    if finished:
        return finished
    check_trainer("midtrain", config.trainer, "SFTConfig")
    if config.n_test < 1:
        raise LabsError(f"n_test={config.n_test} must be at least 1")
    for mix, split in ((config.mix, "train"), (config.held_out_mix, "held_out")):
        next(documents(random.Random(0), mix, split))  # raises for a mix that cannot be
    model, tokenizer, lora = load_policy(config, "base")
    claim_folder(folder, mark, restart)
    train_stage(config, folder, model, tokenizer, lora, seed, mark)
    return read_metrics(folder)


def train_stage(config, folder: Path, model, tokenizer, lora, seed: int, mark: str) -> None:
    """The text, training, what was learned and what was kept, and everything the stage leaves in its folder."""
    from shared.significance import bootstrap_ci, wilson_interval

    seed_everything(seed)
    stream = documents(random.Random("held-out worked problems"), config.held_out_mix, "held_out")
    texts = [next(stream) for _ in range(config.n_test)]
    before, sums_before = solution_loss(model, tokenizer, texts), sum_accuracy(model, tokenizer, config.n_test)
    with wandb_run("midtrain", config, folder, config.wandb) as wandb:
        model, log = read_on(model, tokenizer, config, folder=folder, seed=seed, lora=lora, wandb=wandb)
    losses, sums = solution_loss(model, tokenizer, texts), sum_accuracy(model, tokenizer, config.n_test)
    n = len(texts)
    measured = {
        "solution_loss": Measurement(sum(losses) / n, n, bootstrap_ci(losses, seed=0), sum(before) / n),
        "sum_accuracy": Measurement(sum(sums) / n, n, wilson_interval(sum(sums), n), sum(sums_before) / n),
    }
    rows = zip(texts, losses, strict=True)
    save(
        model, tokenizer, folder, [{"prompt": question, "text": text, "loss": loss} for (question, text), loss in rows]
    )
    columns = ["train/loss", "validation/loss"]
    plot_curves({"midtrain": log}, columns, folder / "plots" / "loss.png", y_label="nats a token")
    finish(config, folder, "midtrain", seed, mark, log, measured)


if __name__ == "__main__":
    stage_command(run, __doc__)()
