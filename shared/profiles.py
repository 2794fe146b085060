"""Which machine, which settings, which stage: one word (`tiny`, `colab`, `local`) chooses sizes, never the algorithm.

Each lab's `profiles.yaml` holds a `common` section and one section a profile; what a profile does not say is as in
`common`. On the command line any field can be set in dotlist form: `sft.trainer.learning_rate=1e-4`.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared import REPO_ROOT, LabsError

if TYPE_CHECKING:
    from omegaconf import DictConfig

PROFILES = ("tiny", "colab", "local")


@dataclass(frozen=True)
class Stage:
    """One step of the model's life: the script that runs it and the stages whose results it starts from."""

    name: str
    lab: str
    script: str
    title: str
    args: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()


_PRETRAIN = "labs/00_pretraining_fundamentals/pretrain.py"
_LAB_02 = "labs/02_preference_alignment"
_LAB_03 = "labs/03_reasoning_rl"
_LAB_04 = "labs/04_tool_use"
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("shakespeare", "00", _PRETRAIN, "a character model learns Shakespeare", ("shakespeare",)),
        Stage("base", "00", _PRETRAIN, "the curriculum's base model learns the tiny world", ("base",)),
        Stage("sft", "01", "labs/01_sft_foundations/train_sft.py", "the base model learns instructions", (), ("base",)),
        Stage("dpo", "02", f"{_LAB_02}/train_dpo.py", "it learns a brief persona from preferences", (), ("sft",)),
        Stage("safedpo", "02", f"{_LAB_02}/safety_hardening_dpo.py", "it learns what to refuse", (), ("sft",)),
        Stage(
            "reward", "02", f"{_LAB_02}/reward_model.py", "a reward model learns the same preferences", (), ("safedpo",)
        ),
        Stage("midtrain", "03", f"{_LAB_03}/midtrain.py", "the base model reads worked problems", (), ("base",)),
        Stage("cold_start", "03", f"{_LAB_03}/cold_start.py", "it sees a few reasoned answers", (), ("midtrain",)),
        Stage("grpo", "03", f"{_LAB_03}/train_grpo.py", "it learns to reason from rewards", (), ("cold_start",)),
        Stage("hacked", "03", f"{_LAB_03}/reward_hacking.py", "it learns to cheat a bad reward", (), ("cold_start",)),
        Stage("tools", "04", f"{_LAB_04}/train_tool_use.py", "it learns to call functions", (), ("sft",)),
        Stage("adapters", "04", f"{_LAB_04}/domain_adapters.py", "two adapters, a specialist each", (), ("sft",)),
        Stage("evaluation", "05", "labs/05_evaluation/eval_suite.py", "every stage measured again by one suite"),
    )
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for a misspelt name, or the list of what there is."""
    known = [str(word) for word in known]
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"


def detect_profile() -> str:
    """tiny without an NVIDIA GPU, colab below 20 GB of GPU memory, else local. Does not import torch."""
    if shutil.which("nvidia-smi") is None:
        return "tiny"
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        mebibytes = max(int(line) for line in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver without a card answers with an error
        return "tiny"
    return "colab" if mebibytes < 20_000 else "local"


def lab_dir(lab: str | Path) -> Path:
    """The folder of a lab, by number ("01"), folder name or path. Raises LabsError where there is none."""
    for folder in sorted((REPO_ROOT / "labs").iterdir()):
        if str(lab) in (folder.name, folder.name[:2]) or Path(lab) == folder:
            return folder
    if Path(lab).is_dir():
        return Path(lab)
    raise LabsError(f"no lab {lab}: see `labs list`")


def load_profile(lab: str | Path, profile: str | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The settings of one lab for one profile, `overrides` ("a.b=value") on top; unknown names are refused by name.

    The result has a further key `profile`. Raises LabsError for an unknown profile or key, a value of the wrong kind,
    and a broken or missing profiles.yaml.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    profile = profile or detect_profile()
    if profile not in PROFILES:
        raise LabsError(f"unknown profile {profile!r}: {nearest(profile, PROFILES)}")
    path = lab_dir(lab) / "profiles.yaml"
    try:
        sections = OmegaConf.load(path)
    except FileNotFoundError:
        raise LabsError(f"{path} is missing: every lab keeps its settings there") from None
    except YAMLError as error:
        raise LabsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    for section in ("common", profile):
        if section not in sections:
            raise LabsError(f"{path} has no section {section!r}")
    if not isinstance(sections["common"], DictConfig):
        raise LabsError(f"{path}: section 'common' must hold the settings by name")
    # A profile may give `common` a new value but not a new name, or a misspelt name would be silently ignored.
    config = _merge(sections["common"], sections[profile] or {}, f"{path}, section {profile}")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise LabsError(f"override {override!r}: write it as section.name=value")
        try:
            change = OmegaConf.from_dotlist([override])
        except (YAMLError, OmegaConfBaseException) as error:
            raise LabsError(f"override {override!r} cannot be read: {' '.join(str(error).split())}") from error
        config = _merge(config, change, "command line")
    config = OmegaConf.merge({"profile": profile}, config)
    OmegaConf.set_struct(config, True)
    return config


def _merge(config, change, where: str):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_unknown(config, change, where, "")
    try:
        return OmegaConf.merge(config, change)
    except OmegaConfBaseException as error:
        raise LabsError(f"{where}: {str(error).splitlines()[0]}") from error


def _refuse_unknown(config, change, where: str, prefix: str) -> None:
    """A setting that is null or an empty mapping in `common` is open: anything may stand there. So are `rewards`, whose names
    the stage that uses them knows."""
    from omegaconf import DictConfig, OmegaConf

    for key in change:
        full = f"{prefix}{key}"
        if key not in config and prefix.endswith("rewards."):
            continue
        if key not in config:
            raise LabsError(f"{where}: unknown setting {full!r}; {nearest(str(key), config)}")
        old, new = config[key], change[key]
        if isinstance(old, DictConfig) and old:
            if not isinstance(new, DictConfig):
                raise LabsError(f"{where}: {full!r} is a section with the names {', '.join(map(str, old))}")
            _refuse_unknown(old, new, where, f"{full}.")
        elif isinstance(old, bool | int | float | str) and not OmegaConf.is_missing(change, key):
            numeric = isinstance(old, int | float) and not isinstance(old, bool)
            if numeric and (isinstance(new, bool) or not isinstance(new, int | float)):
                raise LabsError(f"{where}: {full}={new!r} must be a number like {old}")
            if isinstance(old, bool) and not isinstance(new, bool):
                raise LabsError(f"{where}: {full}={new!r} must be true or false")


# -------------------------------------------------------------------------------------------------------- run folders


def runs_root() -> Path:
    """Where runs are kept: LABS_RUNS_DIR, or `runs/` in the repository."""
    return Path(os.environ.get("LABS_RUNS_DIR") or REPO_ROOT / "runs")


def stage_dir(profile: str, stage: str) -> Path:
    """runs/<profile>/<stage>. Raises LabsError for an unknown stage."""
    if stage not in STAGES:
        raise LabsError(f"unknown stage {stage!r}: {nearest(stage, STAGES)}")
    return runs_root() / profile / stage


def command_of(
    stage: str, profile: str, overrides: Sequence[str] = (), seed: int = 0, restart: bool = False
) -> list[str]:
    """The command that runs a stage's script."""
    chosen = STAGES[stage]
    command = [sys.executable, str(REPO_ROOT / chosen.script), *chosen.args, "--profile", profile, "--seed", str(seed)]
    return [*command, *["--restart"] * restart, *overrides]


def run_stage(stage: str, profile: str, overrides: Sequence[str] = (), seed: int = 0, restart: bool = False) -> None:
    """Run a stage's script in a process of its own, so that its memory is its own and no lab imports another.

    Raises LabsError when the script fails; it has then said why.
    """
    finished = subprocess.run(command_of(stage, profile, overrides, seed, restart), cwd=REPO_ROOT)
    if finished.returncode == 130:
        raise KeyboardInterrupt
    if finished.returncode:
        raise LabsError(f"stage {stage} stopped with exit code {finished.returncode}; run it again to go on")


def ensure_stage(stage: str, profile: str) -> Path | None:
    """The finished folder of an earlier stage. In the tiny profile a missing one is built first, and that is said.

    On real profiles a missing stage returns None: the caller takes the hub model that its settings name.
    """
    folder = stage_dir(profile, stage)
    if (folder / "metrics.json").exists():
        return folder
    if profile != "tiny":
        return None
    print(f"{folder} is not there yet: running stage {stage!r} first ({STAGES[stage].title})", flush=True)
    run_stage(stage, profile)
    return folder
