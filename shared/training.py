"""What every training run shares: seeding, a progress bar, a log, checkpoints that survive a power cut, plots.

Everything a run leaves behind is written to a temporary name first and renamed when complete, so that a kill at any
moment leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import LabsError

REPORTED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "numpy")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPU)."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def watched() -> bool:
    """Whether somebody looks at standard error (a terminal, or LABS_PROGRESS=1): then progress bars are shown."""
    return sys.stderr.isatty() or os.environ.get("LABS_PROGRESS") == "1"


def quiet_when_unwatched() -> None:
    """Silence the libraries' own progress bars in logs and notebooks."""
    if not watched():
        import datasets
        import transformers

        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def progress(steps: Iterable | None = None, description: str = "", total: int | None = None, initial: int = 0):
    """A tqdm bar on standard error; silent where nobody watches (no terminal), unless LABS_PROGRESS=1."""
    from tqdm.auto import tqdm

    return tqdm(
        steps, desc=description, total=total, initial=initial, dynamic_ncols=True, disable=not watched(), leave=False
    )


# ------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _clear_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise LabsError(
            f"cannot write {path}: {reason}; free the space or set LABS_RUNS_DIR to another folder"
        ) from error


def atomic_write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all. Raises LabsError where the folder cannot be written."""
    path = Path(path)
    with _clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends without an error."""
    path = Path(path)
    with _clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        with _clear_write_errors(path):
            os.chmod(temporary, 0o755)
            if path.exists():  # a folder cannot be replaced in one step: the old one steps aside first
                aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                os.replace(path, aside / "old")
                os.replace(temporary, path)
                shutil.rmtree(aside)
            else:
                os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fingerprint(*parts: Any) -> str:
    """A short hash of settings (anything JSON or OmegaConf can hold): the same settings, the same run."""
    plain = []
    for part in parts:
        if type(part).__module__.startswith("omegaconf"):
            from omegaconf import OmegaConf

            part = OmegaConf.to_container(part, resolve=True)
        plain.append(part)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------- log


class TrainLog:
    """`train_log.jsonl`: one row a measurement, numbers under names like "train/loss" and "validation/loss".

    `resume_from=N` drops the rows after step N, which a run that was killed between two checkpoints had written and will
    write again; the clock goes on from the last row kept.
    """

    def __init__(self, path: str | Path, resume_from: int = 0):
        self.path = Path(path)
        self.rows = [row for row in read_log(self.path) if resume_from and row["step"] <= resume_from]
        self._before = self.rows[-1]["elapsed_seconds"] if self.rows else 0.0
        self._start = time.perf_counter()
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def elapsed(self) -> float:
        """Seconds of training, those of the killed attempt's kept part included."""
        return self._before + time.perf_counter() - self._start

    def write(self, step: int, **numbers: float) -> dict:
        """Append a row and hand it back. Keyword names use "/" through a dictionary: `write(5, **{"train/loss": 2.1})`."""
        row = {"step": step, "elapsed_seconds": round(self.elapsed(), 3), **numbers}
        self.rows.append(row)
        with _clear_write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def read_log(path: str | Path) -> list[dict]:
    """The rows of a train_log.jsonl; a last line cut short by a kill is left out. An absent file has no rows."""
    rows: list[dict] = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


@contextlib.contextmanager
def wandb_run(stage: str, settings: Mapping, folder: Path, mode: str = "offline") -> Iterator[Any]:
    """A Weights & Biases run, or None. `mode`: "disabled", "offline" (files beside the run, no account) or "online".

    It is never required: where it cannot start, one line says so and the training goes on without it.
    """
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        yield None
        return
    try:
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(silent=True)
        run = wandb.init(
            project="post-training-labs", name=stage, config=dict(settings), dir=str(folder), mode=mode, settings=quiet
        )
    except Exception as error:  # noqa: BLE001 - whatever ails the logger, the run is worth more
        print(f"no Weights & Biases log ({type(error).__name__}: {error}); the training goes on", file=sys.stderr)
        yield None
        return
    try:
        yield run
    finally:
        run.finish()


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    folder: str | Path, step: int, model, optimizers: Sequence, settings: str, extra: dict | None = None
):
    """Weights and optimizer state as safetensors under `folder`/step-N, then the older checkpoints go.

    `settings` is the run's `fingerprint`. Batches are drawn from the seed and the step number, so no other state exists.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    tensors = {f"model.{name}": value.detach().contiguous().clone() for name, value in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for slot, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"optimizer.{index}.{slot}.{name}"] = value.detach().contiguous().clone()
    with atomic_folder(folder / f"step-{step:07d}") as temporary:
        save_file(tensors, temporary / "state.safetensors")
        atomic_write_text(temporary / "state.json", json.dumps({"step": step, "settings": settings, **(extra or {})}))
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: str | Path, model, optimizers: Sequence, settings: str) -> dict | None:
    """Load the newest checkpoint in place and return its state ({"step", ...}); None where there is none.

    Raises LabsError when the checkpoint belongs to a run with other settings.
    """
    import torch
    from safetensors.torch import load_file

    newest = max(Path(folder).glob("step-*"), default=None)
    if newest is None:
        return None
    state = json.loads((newest / "state.json").read_text())
    if state["settings"] != settings:
        raise LabsError(f"{newest} is the checkpoint of a run with other settings: add --restart to begin again")
    tensors = load_file(newest / "state.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
    for index, optimizer in enumerate(optimizers):
        slots: dict[int, dict] = {}
        prefix = f"optimizer.{index}."
        for name, value in tensors.items():
            if name.startswith(prefix):
                slot, key = name.removeprefix(prefix).split(".", 1)
                slots.setdefault(int(slot), {})[key] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


# ------------------------------------------------------------------------------------------------- machine and plots


def peak_memory_bytes() -> int:
    """The most memory this process has held: GPU memory where there is a GPU, else resident main memory."""
    import resource

    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_of(function: Callable[[], Any]) -> int | None:
    """Bytes by which memory rises at most while `function` runs; None where the system does not tell (not Linux, no GPU).

    On a GPU this is what torch allocates. On Linux it is the process's resident peak, which the kernel is asked to reset.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # What earlier work freed and the C library keeps would be used again, unseen: back to the system with it.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
        function()
        return _resident_bytes("VmHWM") - before
    except OSError:
        return None


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """What the run ran on: processor cores and, where there is one, the GPU's name."""
    import platform

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cores": usable_cores(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str]:
    """Python and the installed versions of the packages that decide a result."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def plot_curves(
    logs: Mapping[str, Sequence[Mapping]],
    columns: Sequence[str],
    path: str | Path | None = None,
    x: str = "step",
    title: str = "",
    y_label: str = "",
    marks: Mapping[str, float] | None = None,
):
    """Curves of `columns` from one or more logs ({label: rows}); `marks` are labelled horizontal lines.

    Returns the matplotlib Axes; with `path` the picture is also saved (PNG) and the figure closed.
    """
    import matplotlib

    if path is not None:
        matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, rows in logs.items():
        for column in columns:
            points = [(row[x], row[column]) for row in rows if column in row]
            if points:
                name = column if len(logs) == 1 else label if len(columns) == 1 else f"{label}: {column}"
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3
                )
    for label, height in (marks or {}).items():
        axes.axhline(height, linestyle="--", linewidth=1, color="grey")
        axes.annotate(label, (0.99, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel=x.replace("_", " "), ylabel=y_label, title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return axes
