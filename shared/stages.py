"""What every stage script around a Hugging Face trainer shares: its command line, its resume, its trainer's defaults and log.

A stage is finished when its folder holds a metrics.json with the fingerprint of its settings. Until then the folder holds
`settings.txt`, which says whose checkpoints lie there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shared import LabsError
from shared.profiles import PROFILES, ensure_stage, load_profile, stage_dir
from shared.report import check, criteria_table, evaluate, read_metrics, write_metrics
from shared.training import TrainLog, atomic_write_text, fingerprint, quiet_when_unwatched, watched

# At import, which TRL and PEFT do for it, bitsandbytes warns that an optional CPU kernel is not installed; none is wanted.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def open_stage(lab: str, stage: str, profile: str | None, seed: int, restart: bool, overrides: list[str] | None):
    """(settings of the stage, its folder, its fingerprint, its metrics if it is finished with these settings, else None)."""
    from omegaconf import OmegaConf

    settings = load_profile(lab, profile, overrides or [])
    config = OmegaConf.merge({"profile": settings.profile}, settings[stage])
    folder = stage_dir(config.profile, stage)
    mark = fingerprint(config, seed)
    finished = None
    if not restart and (folder / "metrics.json").exists() and read_metrics(folder).get("settings") == mark:
        print(f"{stage} is finished; --restart trains it again")
        finished = read_metrics(folder)
    return config, folder, mark, finished


def claim_folder(folder: Path, mark: str, restart: bool) -> None:
    """Note whose checkpoints these are; those of another run, or with `restart` any, are removed.

    So are those in folders below: a stage may train for comparison there.
    """
    note = folder / "settings.txt"
    same = note.exists() and note.read_text() == mark
    if restart or not same:
        for checkpoints in list(folder.rglob("checkpoints")):
            shutil.rmtree(checkpoints, ignore_errors=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    atomic_write_text(note, mark)


def newest_checkpoint(folder: Path, resume: bool = True) -> str | None:
    """The newest whole checkpoint under `folder`; what a kill cut short is removed."""
    from transformers.trainer_utils import get_last_checkpoint

    for partial in folder.glob("checkpoint-*"):
        try:
            json.loads((partial / "trainer_state.json").read_text())  # written last, and not in one step
        except (OSError, ValueError):
            shutil.rmtree(partial)
    return get_last_checkpoint(str(folder)) if resume and folder.exists() else None


def trainer_defaults(folder: Path, seed: int) -> dict[str, Any]:
    """Arguments for any of TRL's configurations that suit this machine; a profile's own settings go on top."""
    import torch

    on_gpu = torch.cuda.is_available()
    has_bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "report_to": [],
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 1,
        "use_cpu": not on_gpu,
        # TRL turns these on by default; on a CPU the one is slow and the other is not needed.
        "bf16": has_bfloat16,
        "fp16": on_gpu and not has_bfloat16,
        "gradient_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "eval_on_start": True,
        "logging_nan_inf_filter": False,
        "disable_tqdm": not watched(),
    }


def log_callback(log: TrainLog, names: Mapping[str, str], wandb=None):
    """A trainer callback that writes the trainer's numbers to `log` under this curriculum's `names`."""
    from transformers import TrainerCallback

    class LogCallback(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            # TRL logs None where every value of a mean was NaN.
            known = {name: value for name, value in (logs or {}).items() if name in names and value is not None}
            numbers = {names[name]: float(value) for name, value in known.items()}
            if numbers:
                row = log.write(state.global_step, tokens=int((logs or {}).get("num_tokens", 0)), **numbers)
                if wandb is not None:
                    wandb.log(row, step=state.global_step)

    return LogCallback()


def load_policy(config, after: str = "sft") -> tuple[Any, Any, dict[str, Any] | None]:
    """(model, tokenizer, LoRA settings or None): the result of stage `after`, else the hub model of the profile.

    An adapter is trained on; TRL then keeps a copy of it as the reference. So no new adapter is made for it. With `backend`
    set to unsloth (or to auto, where it is installed beside a GPU), Unsloth loads the model and puts a new adapter on it.
    """
    from omegaconf import OmegaConf

    from shared.models import load_model

    if config.method not in ("full", "lora"):
        raise LabsError(f"method={config.method!r}: choose full or lora")
    options = {"for_training": config.method == "full", "load_in_4bit": config.load_in_4bit, "backend": "transformers"}
    lora = OmegaConf.to_container(config.lora) if config.method == "lora" else None
    folder = ensure_stage(after, config.profile)
    quiet_when_unwatched()
    backend = config.get("backend", "transformers")
    if folder is None and lora and backend != "transformers":
        options |= {"backend": backend, "for_training": True}
        return *load_model(config.model, **options, lora=lora), None
    if folder is None:
        return *load_model(config.model, **options), lora
    adapter = folder / "adapter"
    if adapter.exists():
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        return *load_model(base, adapter=adapter, **{**options, "for_training": True}), None
    return *load_model(folder / "model", **options), lora


def save(model, tokenizer, folder: Path, samples: Sequence[Mapping]) -> None:
    """The adapter or the whole model, and the samples, into the stage's folder."""
    from shared.models import save_adapter_or_model

    atomic_write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    kept = save_adapter_or_model(model, tokenizer, folder)
    shutil.rmtree(folder / ("model" if kept.name == "adapter" else "adapter"), ignore_errors=True)


def finish(config, folder: Path, stage: str, seed: int, mark: str, log: list[dict], measured, **extra) -> None:
    """Metrics to disk, the checkpoints away, the criteria shown."""
    metrics = write_metrics(
        folder,
        stage=stage,
        profile=config.profile,
        seed=seed,
        wall_seconds=extra.pop("wall_seconds", log[-1]["elapsed_seconds"]),
        criteria=evaluate(config.criteria, measured),
        extra={"settings": mark, "time_budget_seconds": config.time_budget_seconds, **extra},
    )
    for checkpoints in list(folder.rglob("checkpoints")):  # those of a comparison run in a folder below, too
        shutil.rmtree(checkpoints, ignore_errors=True)
    print(criteria_table(metrics))


def stage_command(run: Callable[..., dict], description: str | None) -> typer.Typer:
    """The command line of a stage: `run(profile, seed, restart, overrides)` with options, exit codes and one-line errors."""

    def main(
        overrides: Annotated[
            list[str] | None, typer.Argument(help="Settings, as sft.trainer.learning_rate=1e-4.")
        ] = None,
        profile: Annotated[str | None, typer.Option(help=f"{', '.join(PROFILES)}; default: what fits here.")] = None,
        seed: Annotated[int, typer.Option(help="Data order and new weights are drawn from it.")] = 0,
        restart: Annotated[bool, typer.Option("--restart", help="Begin again, whatever is there.")] = False,
        strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a criterion is not met.")] = False,
    ) -> None:
        try:
            metrics = run(profile, seed, restart, overrides)
            if strict:
                check(metrics)
        except LabsError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command goes on from the last checkpoint", err=True)
            raise typer.Exit(130) from None

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=description)(main)
    return app
