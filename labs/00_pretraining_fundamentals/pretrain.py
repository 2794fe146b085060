"""Lab 00: pretrain two small models from random weights.

    python pretrain.py shakespeare                        # (a) the classic: a character model on Shakespeare
    python pretrain.py base                               # (b) the curriculum's base model, on the tiny world
    python pretrain.py base --seed 1 base.trainer.muon_learning_rate=0.01
    python pretrain.py shakespeare --profile colab        # the same code, larger, on a GPU

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result. A finished run is not
repeated unless you say --restart or change a setting.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import base_probes
from attention_implementation import LanguageModel, ModelConfig, to_huggingface
from shared import LabsError, tiny_world
from shared.data import load_text
from shared.profiles import PROFILES, load_profile, stage_dir
from shared.report import Measurement, check, criteria_table, evaluate, read_metrics, write_metrics
from shared.significance import wilson_interval
from shared.training import (
    atomic_folder,
    atomic_write_text,
    fingerprint,
    plot_curves,
    quiet_when_unwatched,
    read_log,
    seed_everything,
    wandb_run,
)
from tokenizer_training import CharTokenizer, train_tokenizer
from training_loop import TrainerConfig, train


def from_section(kind: type, section) -> object:
    """A dataclass from a section of profiles.yaml; unknown names are refused by name."""
    known = {field.name for field in fields(kind)}
    unknown = set(section) - known
    if unknown:
        raise LabsError(f"{kind.__name__} has no setting {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}")
    return kind(**section)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------------- (a) characters


def character_data(text: str, held_out_fraction: float = 0.1) -> tuple[CharTokenizer, Tensor, Tensor]:
    """The tokenizer, and the training and validation ids: the text's last part is held out, as in nanoGPT."""
    tokenizer = CharTokenizer(text)
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int16)
    border = round(len(ids) * (1 - held_out_fraction))
    return tokenizer, ids[:border], ids[border:]


def random_windows(ids: Tensor, batch_size: int, context: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """batches(i) → (token ids, targets), each (B, T): random windows that depend on the seed and on i alone."""
    offsets = torch.arange(context + 1)

    def batch(index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        starts = torch.randint(len(ids) - context, (batch_size,), generator=generator)
        windows = ids[starts[:, None] + offsets].long()
        return windows[:, :-1], windows[:, 1:]

    return batch


def run_shakespeare(config, folder: Path, seed: int, restart: bool) -> None:
    """Train the character model and write its folder: model.safetensors, metrics, samples, log, plot."""
    from safetensors.torch import save_model

    text, source = load_text("tinyshakespeare")
    tokenizer, train_ids, validation_ids = character_data(text)
    trainer = from_section(TrainerConfig, config.trainer)
    seed_everything(seed)
    model = LanguageModel(
        from_section(
            ModelConfig, {**config.model, "vocab_size": tokenizer.vocab_size, "max_positions": trainer.context}
        )
    ).to(device())
    print(f"{source} text, {len(text):,} characters; {model.parameter_count():,} parameters; {trainer.max_steps} steps")
    kept = read_log(folder / "samples.jsonl") if (folder / "checkpoints").exists() else []  # of a run that was cut off
    samples = {row["step"]: row for row in kept}

    def evaluate_model(model: LanguageModel, step: int) -> dict[str, float]:
        if step == trainer.max_steps:  # the number that counts is taken on the whole validation text
            loss = base_probes.validation_loss(model, validation_ids, trainer.context)
        else:
            loss = base_probes.validation_loss(model, validation_ids, trainer.context, n_windows=256)
        start = torch.tensor([tokenizer.encode("\n")], device=device())
        generator = torch.Generator(device=device()).manual_seed(seed)
        drawn = model.generate(start, 200, temperature=0.8, generator=generator)[0].tolist()
        samples[step] = {"step": step, "text": tokenizer.decode(drawn).strip()}
        write_samples(folder, samples.values())
        return {"validation/loss": loss}

    with wandb_run("shakespeare", config, folder, config.wandb) as run:
        rows = train(
            model,
            random_windows(train_ids, trainer.batch_size, trainer.context, seed),
            trainer,
            folder=folder,
            evaluate=evaluate_model,
            settings=fingerprint(config, seed, source),
            restart=restart,
            description="shakespeare",
            wandb=run,
        )
    first, last = rows[0]["validation/loss"], rows[-1]["validation/loss"]
    low, high = window_loss_interval(model, validation_ids, trainer.context)
    finite = [math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row]
    measured = {
        "validation_loss": Measurement(last, (len(validation_ids) - 1) // trainer.context, (low, high), baseline=first),
        "loss_stays_finite": Measurement(
            sum(finite) / len(finite), len(finite), wilson_interval(sum(finite), len(finite))
        ),
    }
    with atomic_folder(folder / "model") as temporary:
        save_model(model, str(temporary / "model.safetensors"))
        atomic_write_text(temporary / "characters.json", json.dumps(tokenizer.characters))
    plot_curves(
        {"shakespeare": rows},
        ["train/loss", "validation/loss"],
        folder / "plots" / "loss.png",
        "step",
        y_label="nats a character",
    )
    finish(config, folder, "shakespeare", seed, rows, measured, source)


def window_loss_interval(model: LanguageModel, ids: Tensor, context: int) -> tuple[float, float]:
    """95 % interval of the mean validation loss, from the spread between 40 equal stretches of the text.

    Neighbouring characters are not independent draws; stretches of thousands of characters nearly are.
    """
    from shared.significance import bootstrap_ci

    size = (len(ids) - 1) // 40
    losses = [base_probes.validation_loss(model, ids[i * size : (i + 1) * size + 1], context) for i in range(40)]
    return tuple(bootstrap_ci(losses, seed=0))


# ------------------------------------------------------------------------------------------------------- (b) base model


def world_rows(tokenizer, phases, steps: int, batch_size: int, context: int, seed: int) -> Tensor:
    """Every training window, (steps · B, T + 1): documents of each phase's mix, joined and cut.

    `phases` is a list of {"share": part of the steps, "mix": {kind: weight}}. All of it is generated before training,
    which takes seconds, so that the window of a step depends on the seed alone.
    """
    windows = []
    left = steps
    for index, phase in enumerate(phases):
        count = left if index == len(phases) - 1 else min(left, round(phase["share"] * steps))
        left -= count
        needed = count * batch_size * (context + 1)
        texts = tiny_world.documents(random.Random(f"pretraining {seed} {index}"), dict(phase["mix"]))
        ids: list[int] = []
        while len(ids) < needed:
            for row in tokenizer([next(texts) for _ in range(1000)], add_special_tokens=False)["input_ids"]:
                ids.append(tokenizer.bos_token_id)
                ids.extend(row)
        windows.append(torch.tensor(ids[:needed], dtype=torch.int16).view(-1, context + 1))
    return torch.cat(windows)


def run_base(config, folder: Path, seed: int, restart: bool) -> None:
    """Train tokenizer and base model and write its folder: an ordinary Hugging Face checkpoint, metrics, samples, log."""
    trainer = from_section(TrainerConfig, config.trainer)
    tokenizer = train_tokenizer(
        tiny_world.tokenizer_texts(random.Random("tokenizer"), 9000), config.vocab_size, config.model.max_positions
    )
    rows = world_rows(
        tokenizer,
        config.phases,
        trainer.max_steps * trainer.gradient_accumulation_steps,
        trainer.batch_size,
        trainer.context,
        seed,
    )
    held_out_mix = {"lookup": 1.0, "arithmetic": 1.0, "word_problem": 1.0}
    held_out_texts = tiny_world.documents(random.Random("held-out texts"), held_out_mix, "held_out")
    held_out = []
    for _ in range(400):
        held_out += [tokenizer.bos_token_id, *tokenizer(next(held_out_texts), add_special_tokens=False)["input_ids"]]
    seed_everything(seed)
    model = LanguageModel(from_section(ModelConfig, {**config.model, "vocab_size": len(tokenizer)})).to(device())
    print(
        f"{len(tokenizer)} tokens, {rows.numel():,} of text; {model.parameter_count():,} parameters; {trainer.max_steps} steps"
    )

    def batch(index: int) -> tuple[Tensor, Tensor]:
        windows = rows[index * trainer.batch_size : (index + 1) * trainer.batch_size].long()
        return windows[:, :-1], windows[:, 1:]

    def evaluate_model(model: LanguageModel, step: int) -> dict[str, float]:
        n = config.n_test if step == trainer.max_steps else 60
        copied = base_probes.copy_accuracy(model, tokenizer, n, seed=1 if step == trainer.max_steps else 2)
        bound = base_probes.copy_accuracy(model, tokenizer, n, seed=1 if step == trainer.max_steps else 2, facts=2)
        added = base_probes.sum_accuracy(model, tokenizer, n, seed=1 if step == trainer.max_steps else 2)
        first_half, second_half = base_probes.repeated_text_losses(model, tokenizer)
        return {
            "validation/loss": base_probes.validation_loss(model, torch.tensor(held_out), trainer.context),
            "copy/accuracy": sum(copied) / n,
            "binding/accuracy": sum(bound) / n,
            "arithmetic/accuracy": sum(added) / n,
            "copy/loss_first_time": first_half,
            "copy/loss_second_time": second_half,
            "induction/strongest_head": base_probes.induction_scores(model, tokenizer).max().item(),
        }

    with wandb_run("base", config, folder, config.wandb) as run:
        log = train(
            model,
            batch,
            trainer,
            folder=folder,
            evaluate=evaluate_model,
            settings=fingerprint(config, seed),
            restart=restart,
            description="base model",
            wandb=run,
        )
    n = config.n_test
    measured = {}
    for name, column in (("copy_accuracy", "copy/accuracy"), ("sum_accuracy", "arithmetic/accuracy")):
        value = log[-1][column]
        measured[name] = Measurement(value, n, wilson_interval(round(value * n), n), baseline=log[0][column])
    prompts = [tiny_world.lookup(random.Random(f"sample {i}"), "held_out")["prompt"] for i in range(5)]
    prompts += [tiny_world.sum_problem(random.Random(f"sample {i}"), "held_out")["prompt"] for i in range(5)]
    texts = base_probes.continuations(model, tokenizer, prompts, 12)
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    write_samples(folder, samples)
    with atomic_folder(folder / "model") as temporary:
        hf_model = to_huggingface(model)
        hf_model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
        hf_model.generation_config.bos_token_id = hf_model.config.bos_token_id = tokenizer.bos_token_id
        hf_model.generation_config.pad_token_id = hf_model.config.pad_token_id = tokenizer.pad_token_id
        hf_model.config.eos_token_id = tokenizer.eos_token_id
        hf_model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    plots = folder / "plots"
    plot_curves({"base": log}, ["train/loss", "validation/loss"], plots / "loss.png", y_label="nats a token")
    plot_curves(
        {"base": log},
        ["copy/accuracy", "binding/accuracy", "arithmetic/accuracy", "induction/strongest_head"],
        plots / "induction.png",
        title="induction heads form, and copying with them",
    )
    two_facts = {"share_right": log[-1]["binding/accuracy"], "n": n}  # no criterion: no lab above asks it of the base
    finish(config, folder, "base", seed, log, measured, "generated", two_facts=two_facts)


def write_samples(folder: Path, samples: Iterable[dict]) -> None:
    atomic_write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))


def finish(config, folder: Path, stage: str, seed: int, rows, measured, source: str, **extra) -> None:
    """Metrics to disk, the checkpoints away, the criteria shown."""
    metrics = write_metrics(
        folder,
        stage=stage,
        profile=config.profile,
        seed=seed,
        wall_seconds=rows[-1]["elapsed_seconds"],
        criteria=evaluate(config.criteria, measured),
        extra={
            "settings": fingerprint(config, seed),
            "time_budget_seconds": config.time_budget_seconds,
            "tokens": rows[-1]["tokens"],
            "data": source,
            **extra,
        },
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(criteria_table(metrics))


RUNS = {"shakespeare": run_shakespeare, "base": run_base}


def run(
    stage: str, profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None
):
    """Run one stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    from omegaconf import OmegaConf

    if stage not in RUNS:
        raise LabsError(f"unknown run {stage!r}: choose {' or '.join(RUNS)}")
    settings = load_profile("00", profile, overrides or [])
    config = OmegaConf.merge({"profile": settings.profile}, settings[stage])
    folder = stage_dir(settings.profile, stage)
    if not restart and (folder / "metrics.json").exists():
        metrics = read_metrics(folder)
        if metrics.get("settings") == fingerprint(config, seed):
            print(f"{stage} is finished; --restart trains it again")
            return metrics
        (folder / "metrics.json").unlink()  # other settings: until this run ends, the folder holds no result
        restart = True
    if restart:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if settings.profile != "tiny":  # the real profiles take real data, from the hub where no mirror is set
        os.environ.setdefault("LABS_ALLOW_HUB", "1")
    quiet_when_unwatched()
    RUNS[stage](config, folder, seed, restart)
    return read_metrics(folder)


def main(
    stage: Annotated[str, typer.Argument(help="What to train: shakespeare or base.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, as base.trainer.max_steps=200.")] = None,
    profile: Annotated[str | None, typer.Option(help=f"{', '.join(PROFILES)}; default: what the machine has.")] = None,
    seed: Annotated[int, typer.Option(help="Weights and data are drawn from it.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, whatever is there.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a criterion is not met.")] = False,
) -> None:
    try:
        metrics = run(stage, profile, seed, restart, overrides)
        if strict:
            check(metrics)
    except LabsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
    app.command(help=__doc__)(main)
    app()
