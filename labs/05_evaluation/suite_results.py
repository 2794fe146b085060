"""Checkpoints and what was measured on them, on disk: nothing is measured twice, nothing is lost when a run is stopped.

The items of a task are kept in a file named by a hash of the checkpoint's files, of the task's settings and of the code that
decides its result. Another checkpoint, setting or rule is another file; two stages with the same weights share one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import REPO_ROOT, LabsError
from shared.profiles import STAGES, stage_dir
from shared.training import atomic_write_text, fingerprint
from suite_plan import TASKS, VERSION, Planned
from suite_tasks import Item, Subject

WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt")
ALWAYS = ("suite_tasks", "shared/tiny_world.py", "shared/models.py")


@dataclass(frozen=True)
class Checkpoint:
    """Where a stage's model lies, and a hash of everything that decides what it says. `missing` says why there is none."""

    stage: str
    folder: Path
    base: str | None = None
    mark: str = ""
    missing: str | None = None


@dataclass
class Result:
    """The items of one (stage, task); `state` is "measured", or says why there are none."""

    planned: Planned
    items: list[Item] = field(default_factory=list)
    seconds: float = 0.0
    state: str = "measured"
    fresh: bool = False


def folder_mark(folder: Path) -> str:
    """A hash of every file of weights, configuration, template and tokenizer in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in WEIGHTS:
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def find_checkpoint(profile: str, stage: str) -> Checkpoint:
    """The checkpoint of a finished stage, or why there is none and which command builds it."""
    folder = stage_dir(profile, stage)
    again = f"`labs run {stage} --profile {profile}` builds it"
    if not (folder / "metrics.json").exists():
        return Checkpoint(stage, folder, missing=f"{stage} has not been run: {again}")
    adapter, model = folder / "adapter", folder / "model"
    if (adapter / "adapter_model.safetensors").exists():
        try:
            base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            return Checkpoint(stage, folder, missing=f"{stage} has a damaged adapter: {again} with --restart")
        marks = [folder_mark(adapter), folder_mark(Path(base)) if Path(base).is_dir() else base]
        return Checkpoint(stage, folder, base, fingerprint(marks))
    if not (model / "config.json").exists() or not list(model.glob("*.safetensors")):
        return Checkpoint(stage, folder, missing=f"{stage} has no weights in {folder}: {again} with --restart")
    return Checkpoint(stage, folder, None, fingerprint([folder_mark(model)]))


def load_subject(checkpoint: Checkpoint) -> Subject:
    """The model of a checkpoint, an adapter merged into its base. Raises LabsError for one that cannot be loaded."""
    from shared.models import load_model

    folder = checkpoint.folder
    if checkpoint.stage == "reward":
        return Subject(checkpoint.stage, *_load_reward(checkpoint))
    if checkpoint.base is None:
        return Subject(checkpoint.stage, *load_model(folder / "model"))
    model, tokenizer = load_model(checkpoint.base, adapter=folder / "adapter")
    return Subject(checkpoint.stage, model.merge_and_unload().eval(), tokenizer)  # merged, it answers twice as fast


def _load_reward(checkpoint: Checkpoint):
    from reward_model import load_reward_model

    if checkpoint.base is None:
        return load_reward_model(checkpoint.folder / "model")
    from peft import PeftModel

    model, tokenizer = load_reward_model(checkpoint.base)
    return PeftModel.from_pretrained(model, str(checkpoint.folder / "adapter")), tokenizer


def code_mark(modules: Sequence[str]) -> str:
    """A hash of the source of these modules, which are found without being imported."""
    texts = []
    for name in (*ALWAYS, *modules):
        if name.endswith(".py"):
            path = REPO_ROOT / name
        else:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:
                raise LabsError(f"module {name} is not there: install the project again (`pip install -e .`)")
            path = Path(found.origin)
        texts.append(path.read_text(encoding="utf-8"))
    return fingerprint(texts)


class ItemStore:
    """Items of tasks by key, a file each: a header line with what was measured and how long it took, then a line an item."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.damaged = 0

    def key(self, checkpoint: Checkpoint, planned: Planned) -> str:
        task = TASKS[planned.task]
        return fingerprint(
            VERSION,
            checkpoint.mark if task.asks else "",
            task.run.__name__,
            dict(planned.settings),
            code_mark(task.modules),
        )

    def path(self, checkpoint: Checkpoint, planned: Planned) -> Path:
        return self.folder / f"{planned.task}-{self.key(checkpoint, planned)}.jsonl"

    def load(self, checkpoint: Checkpoint, planned: Planned) -> Result | None:
        """What was measured before, or None. A file that is damaged counts as not there, and is counted in `damaged`."""
        path = self.path(checkpoint, planned)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            header, items = lines[0], lines[1:]
            if header["n"] != len(items) or not all(isinstance(item["scores"], dict) for item in items):
                raise ValueError("cut short")
            return Result(planned, items, float(header["seconds"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError):
            self.damaged += 1
            return None

    def save(self, checkpoint: Checkpoint, result: Result) -> None:
        """Keep a result, whole or not at all."""
        planned = result.planned
        header = {
            "task": planned.task, "stage": planned.stage, "checkpoint": checkpoint.mark, "n": len(result.items),
            "settings": dict(planned.settings), "seconds": round(result.seconds, 2),
        }  # fmt: skip
        lines = [json.dumps(row) + "\n" for row in (header, *result.items)]
        atomic_write_text(self.path(checkpoint, planned), "".join(lines))


def inputs_mark(config: Any, seed: int, checkpoints: Mapping[str, Checkpoint], plan: Sequence[Planned]) -> str:
    """A hash of everything that the table depends on: settings, weights, the stages' own metrics and logs, and code."""
    from omegaconf import OmegaConf

    modules = {name for task in TASKS.values() for name in task.modules}
    modules |= {"eval_suite", "suite_plan", "suite_results", "suite_table", "suite_report", "suite_rows"}
    own = []
    for stage, checkpoint in checkpoints.items():
        files = [checkpoint.folder / name for name in ("metrics.json", "train_log.jsonl")]
        own.append([stage, checkpoint.mark, checkpoint.missing, [_file_mark(path) for path in files]])
    # How a missing checkpoint came to be and who else hears of the table change nothing in it.
    settings = {name: value for name, value in OmegaConf.to_container(config).items() if name not in ("build", "wandb")}
    return fingerprint(settings, seed, VERSION, own, code_mark(sorted(modules)), [dict(each.settings) for each in plan])


def _file_mark(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def measured_stages() -> list[str]:
    """The stages of the plan in the order in which they are built."""
    from suite_plan import PLAN

    return [name for name in STAGES if name in PLAN]
