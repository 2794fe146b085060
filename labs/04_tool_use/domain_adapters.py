"""Lab 04: one adapter per domain on the same base, each a specialist, all served by one server.

    python domain_adapters.py                                        # the profile that fits this machine
    python domain_adapters.py --profile tiny adapters.lora.r=32
    python domain_adapters.py adapters.trainer.learning_rate=0       # the negative control: its criteria must fail

For every domain an adapter is trained on that domain's tools alone and asked about every domain's. The table of who is right
where is what multi-LoRA serving is for: the weights are shared, the skill is in a few hundred kilobytes.

An adapter leaves the embeddings alone, and those of the marks of a call (`<tool_call>` and the rest) mean nothing in a model
that has never used them. So with `markup_steps` the shared base first learns, with all of its weights, how calls are written,
and nothing of what people ask for (`tool_data.markup_rows`).

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from function_calls import CheckResult
from shared import LabsError
from shared.profiles import ensure_stage
from shared.report import Measurement, read_metrics
from shared.stages import claim_folder, finish, open_stage, stage_command
from shared.training import (
    atomic_write_text,
    plot_curves,
    quiet_when_unwatched,
    read_log,
    seed_everything,
    wandb_run,
)
from tool_data import markup_rows, test_rows, training_rows
from tool_stage import ask, check_trainer, finetune, judge, lessons, share, tokenized
from tool_world import DOMAINS


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("04", "adapters", profile, seed, restart, overrides)
    if finished:
        return finished
    quiet_when_unwatched()
    check_trainer("adapters", config.trainer)
    for name in ("n_train", "n_validation", "n_test"):
        if config[name] < 1:
            raise LabsError(f"adapters.{name}={config[name]} must be at least 1")
    base = ensure_stage("sft", config.profile)
    if base is not None and not (base / "model").exists():
        raise LabsError(
            f"{base} holds an adapter: adapters are trained on whole weights; `labs run sft sft.method=full` makes them"
        )
    train_stage(config, folder, str(base / "model") if base else config.model, seed, mark, restart)
    return read_metrics(folder)


def prepare(config, base: str, domain: str, seed: int):
    """(the base with a new adapter, its tokenizer, the domain's rows to train on, those to watch). Writes nothing.

    Raises LabsError for settings of the adapter that do not fit the base, and a length that leaves no row.
    """
    from omegaconf import OmegaConf

    from shared.models import load_model

    rows = training_rows(config.n_train + config.n_validation, seed, (domain,))
    seed_everything(seed)
    model, tokenizer = load_model(
        base, for_training=True, backend=config.backend, load_in_4bit=config.load_in_4bit,
        lora=OmegaConf.to_container(config.lora),
    )  # fmt: skip
    length = config.trainer.max_length
    examples = lessons(rows[config.n_validation :], tokenizer, config, seed, (domain,))
    return model, tokenizer, examples, tokenized(rows[: config.n_validation], tokenizer, length)


def base_that_writes_calls(config, start: str, folder: Path, seed: int, mark: str) -> str:
    """The base that the adapters share: `start`, or with `markup_steps` a model made from it that knows how calls are written.

    It is made once for a run (`mark`): one that was interrupted afterwards finds it in `folder`.
    """
    from omegaconf import OmegaConf

    from shared.models import load_model, save_adapter_or_model

    made, note = folder / "base", folder / "base" / "made_for.txt"
    if not config.markup_steps:
        return start
    if note.exists() and note.read_text() == mark:
        return str(made / "model")
    print("the base of all adapters learns how calls are written", flush=True)
    seed_everything(seed)
    model, tokenizer = load_model(start, for_training=True)
    trainer = {**OmegaConf.to_container(config.trainer), "max_steps": config.markup_steps}
    rows = markup_rows(config.markup_steps * trainer["per_device_train_batch_size"] + config.n_validation, seed)
    # The rows are all of the same kind: no drill before them.
    how = OmegaConf.merge(config, {"drill": 0.0})
    model, _ = finetune(
        model, tokenizer, lessons(rows[config.n_validation :], tokenizer, how, seed),
        tokenized(rows[: config.n_validation], tokenizer, config.trainer.max_length), trainer,
        folder=made, seed=seed, muon_learning_rate=config.muon_learning_rate, value_noise=config.value_noise,
    )  # fmt: skip
    save_adapter_or_model(model, tokenizer, made)
    atomic_write_text(note, mark)
    return str(made / "model")


def own_over_others(results: Mapping[str, Mapping[str, Sequence[CheckResult]]], domain: str) -> Measurement:
    """By how much the domain's own adapter is better there than the best of the others, on the same requests, paired."""
    from shared.significance import paired_bootstrap

    right = {name: [float(result.ok) for result in per[domain]] for name, per in results.items()}
    others = {name: values for name, values in right.items() if name != domain}
    best = max(others, key=lambda name: sum(others[name]))
    paired = paired_bootstrap(right[domain], others[best])
    return Measurement(paired.difference, paired.n, (paired.low, paired.high), sum(others[best]) / paired.n)


def train_stage(config, folder: Path, base: str, seed: int, mark: str, restart: bool = False) -> None:
    """Every domain's adapter, the cross table, and everything the stage leaves in its folder."""
    from omegaconf import OmegaConf

    from shared.models import save_adapter_or_model

    prepare(config, base, DOMAINS[0], seed)  # complains before anything is written
    claim_folder(folder, mark, restart)
    base = base_that_writes_calls(config, base, folder, seed, mark)
    before = [read_log(folder / "base" / "train_log.jsonl")] if config.markup_steps else []
    trainer = OmegaConf.to_container(config.trainer)
    tests = {domain: test_rows(config.n_test, "values", (domain,)) for domain in DOMAINS}
    results: dict[str, dict[str, list[CheckResult]]] = {}
    logs: dict[str, list[dict[str, Any]]] = {}
    samples: list[dict[str, Any]] = []
    with wandb_run("adapters", config, folder, config.wandb) as wandb:
        for domain in DOMAINS:
            print(f"the adapter of domain {domain}", flush=True)
            model, tokenizer, examples, validation = prepare(config, base, domain, seed)
            model, logs[domain] = finetune(
                model, tokenizer, examples, validation, trainer, folder=folder / domain, seed=seed,
                value_noise=config.value_noise, wandb=wandb,
            )  # fmt: skip
            save_adapter_or_model(model, tokenizer, folder / domain)
            results[domain] = {}
            for asked, rows in tests.items():
                replies = ask(model, tokenizer, rows, config.max_new_tokens)
                results[domain][asked] = judge(replies, rows)
                samples += [
                    {"adapter": domain, "domain": asked, "prompt": row["messages"][-2]["content"], "reply": reply,
                     "result": result.reason}
                    for row, reply, result in zip(rows, replies, results[domain][asked], strict=True)
                ]  # fmt: skip
    measured = {f"{domain}_gain": own_over_others(results, domain) for domain in DOMAINS}
    measured |= {
        f"{domain}_gain_low": Measurement(gain.ci95[0], gain.n, None, None)
        for domain, gain in ((domain, measured[f"{domain}_gain"]) for domain in DOMAINS)
    }
    measured |= {f"{domain}_exact": share(results[domain][domain]) for domain in DOMAINS}
    atomic_write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    plot_curves(logs, ["train/loss", "validation/loss"], folder / "plots" / "loss.png", y_label="nats a token")
    table = {name: {asked: share(found).value for asked, found in per.items()} for name, per in results.items()}
    finish(
        config, folder, "adapters", seed, mark, logs[DOMAINS[-1]],
        {name: measured[name] for name in config.criteria},
        wall_seconds=sum(log[-1]["elapsed_seconds"] for log in [*logs.values(), *before]),
        cross_table=table,
        base=base,
        adapter_bytes={domain: _size(folder / domain / "adapter") for domain in DOMAINS},
    )  # fmt: skip


def _size(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


if __name__ == "__main__":
    stage_command(run, __doc__)()
