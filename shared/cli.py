"""The command `labs`. Everything heavy is imported by the command that needs it, so that --help answers at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from shared import REPO_ROOT, LabsError

HELP = """Post-Training Labs: one model's life, from random weights to a served agent.

Start with `labs doctor` (what this machine can do), then `labs run all`, then `labs chat sft`.
"""
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
data_app = typer.Typer(help="Data sets: what there is, and an offline mirror for a classroom.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ProfileOption = Annotated[
    str | None, typer.Option(help="tiny (laptop CPU), colab (16 GB GPU), local (24 GB). Default: what `doctor` finds.")
]


def _chosen_profile(profile: str | None) -> str:
    from shared.profiles import PROFILES, detect_profile, nearest

    profile = profile or detect_profile()
    if profile not in PROFILES:
        raise LabsError(f"unknown profile {profile!r}: {nearest(profile, PROFILES)}")
    return profile


def _stages(name: str) -> list[str]:
    """The stages that a name stands for: a stage, a lab's number, or "all"."""
    from shared.profiles import STAGES, nearest

    if name == "all":
        return list(STAGES)
    chosen = [stage.name for stage in STAGES.values() if name in (stage.name, stage.lab)]
    if not chosen:
        known = sorted({*STAGES, *(stage.lab for stage in STAGES.values()), "all"})
        raise LabsError(f"unknown stage or lab {name!r}: {nearest(name, known)}")
    return chosen


def _finished(profile: str, names: list[str]) -> list[dict]:
    from shared.profiles import stage_dir
    from shared.report import read_metrics

    folders = [stage_dir(profile, name) for name in names]
    return [read_metrics(folder) for folder in folders if (folder / "metrics.json").exists()]


@app.command()
def doctor() -> None:
    """Show what this machine has, which profile fits it, and what is missing. Example: labs doctor"""
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    from shared.profiles import detect_profile, runs_root

    profile = detect_profile()
    why = {"tiny": "no NVIDIA GPU", "colab": "a GPU with less than 20 GB", "local": "a GPU with 20 GB or more"}[profile]
    typer.echo(f"Python        {platform.python_version()}")
    wrong = []
    constraints = REPO_ROOT / "constraints.txt"
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.exists() else []
    pins = dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line.split("#")[0].split(";")[0])
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        pinned = pins.get(package, found)
        if found.split("+")[0] != pinned:
            wrong.append(f"{package} is {found}, this project is tested with {pinned}: `make clean run` sets it up")
        typer.echo(f"{package:<13} {found}")
    driver = "no NVIDIA driver (no nvidia-smi)" if shutil.which("nvidia-smi") is None else "NVIDIA driver found"
    typer.echo(f"GPU           {driver}")
    typer.echo(f"cores         {os.cpu_count()}")
    if Path("/proc/meminfo").exists():  # Linux
        memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        typer.echo(f"free memory   {int(memory['MemAvailable'].split()[0]) / 2**20:.1f} GiB; the tiny profile wants 4")
    existing = next(folder for folder in (runs_root().absolute(), *runs_root().absolute().parents) if folder.exists())
    typer.echo(f"free disk     {shutil.disk_usage(existing).free / 2**30:.0f} GiB for runs in {runs_root()}")
    if not os.access(existing, os.W_OK):
        wrong.append(f"{existing} cannot be written: set LABS_RUNS_DIR to a folder of yours")
    folder = os.environ.get("LABS_DATA_DIR")
    typer.echo(f"LABS_DATA_DIR {folder or 'not set: generated data is used'}")
    if folder and not Path(folder).is_dir():
        wrong.append(f"LABS_DATA_DIR={folder} is no folder: `labs data fetch {folder}` makes it")
    typer.echo(f"profile       {profile} ({why})")
    for line in wrong:
        typer.echo(f"warning: {line}", err=True)


@app.command("list")
def list_stages(profile: ProfileOption = None) -> None:
    """List labs and stages, and which are finished. Example: labs list --profile tiny"""
    from shared.profiles import STAGES

    profile = _chosen_profile(profile)
    for stage in STAGES.values():
        state = "not run"
        for metrics in _finished(profile, [stage.name]):
            state = "finished" if all(row["passed"] for row in metrics["criteria"]) else "criteria not met"
        typer.echo(f"{stage.lab}  {stage.name:<12} {state:<17} {stage.title}")


@app.command()
def run(
    what: Annotated[str, typer.Argument(help="A stage (base), a lab (00) or all.")] = "all",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, as sft.trainer.learning_rate=1e-4.")] = None,
    profile: ProfileOption = None,
    seed: Annotated[int, typer.Option(help="Everything random is drawn from it.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Train again what is finished or half done.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="Stages at a time. Default: 2 for `all` of tiny on two cores or more, else 1.", min=1),
    ] = None,
) -> None:
    """Run stages in order and end with the report card. Example: labs run base base.trainer.max_steps=500

    A finished stage is not repeated; an interrupted one goes on from its checkpoint. Exit code 1 if a criterion fails.
    """
    from shared.parallel_stages import run_stages
    from shared.profiles import run_stage
    from shared.training import usable_cores

    profile, names = _chosen_profile(profile), _stages(what)
    if overrides and len(names) > 1:
        sections = {override.split(".")[0] for override in overrides}
        if not sections <= set(names):
            raise LabsError(f"settings {', '.join(overrides)}: each must begin with a stage, as {names[0]}.…")
    # SIGTERM would end this process alone and leave the stage's training behind; as an exit it ends both.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    own = {
        name: [override for override in overrides or [] if len(names) == 1 or override.startswith(f"{name}.")]
        for name in names
    }
    start = time.monotonic()
    jobs = jobs or (2 if what == "all" and profile == "tiny" and usable_cores() > 1 else 1)
    if jobs > 1 and len(names) > 1:
        run_stages(names, profile, own, seed, restart, jobs)
    else:
        for name in names:
            typer.echo(f"\n== {name} ({profile})")
            run_stage(name, profile, own[name], seed, restart)
    if len(names) > 1:
        typer.echo(f"\n{len(names)} stages, {(time.monotonic() - start) / 60:.1f} minutes")
    _report(profile, names)


def _report(profile: str, names: list[str]) -> None:
    from shared.profiles import STAGES, runs_root, stage_dir
    from shared.report import CriterionFailed, render_terminal
    from shared.report_html import write_html

    metrics = _finished(profile, names)
    typer.echo()
    render_terminal(metrics)
    life = [stage_dir(profile, row["stage"]) for row in _finished(profile, list(STAGES))]
    typer.echo(f"with curves and samples: {write_html(life, runs_root() / profile / 'report.html')}")
    failed = [f"{row['stage']}: {c['name']}" for row in metrics for c in row["criteria"] if not c["passed"]]
    if failed:
        raise CriterionFailed(f"criteria not met: {', '.join(failed)}")


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="A stage, a lab or all.")] = "all", profile: ProfileOption = None
) -> None:
    """Exit with 1 unless every declared criterion was measured and is met. Example: labs check sft"""
    from shared.profiles import STAGES, load_profile, stage_dir
    from shared.report import CriterionFailed, judge_again, read_metrics
    from shared.report import check as check_metrics

    profile, problems = _chosen_profile(profile), []
    for name in _stages(what):
        try:
            metrics = read_metrics(stage_dir(profile, name))
            declared = load_profile(STAGES[name].lab, profile)[name].criteria
            check_metrics(metrics)
            # The run may have had another threshold, set on its command line or declared before profiles.yaml changed.
            check_metrics(judge_again(metrics, declared))
            new = set(declared) - {row["name"] for row in metrics["criteria"]}
            if new:
                raise CriterionFailed(f"stage {name}: {', '.join(sorted(new))} not measured; run it with --restart")
            typer.echo(f"{name}: every criterion is met")
        except LabsError as error:
            problems.append(str(error))
    if problems:
        raise CriterionFailed("; ".join(problems))


class _LabCommand(typer.core.TyperCommand):
    """A command that with one option is a lab's script, which has options and a --help of its own."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if self.name == "chat" and "--tools" in args:
            _become("labs/04_tool_use/tool_chat.py", [argument for argument in args if argument != "--tools"])
        if self.name == "report" and any(argument.split("=")[0] == "--against" for argument in args):
            _become("labs/05_evaluation/compare_runs.py", args)
        return super().parse_args(ctx, args)


@app.command(cls=_LabCommand)
def report(
    profile: ProfileOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the one-page report with curves here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown here.")] = None,
    readme: Annotated[bool, typer.Option("--readme", help="Put the tables into the READMEs' results blocks.")] = False,
    against: Annotated[str | None, typer.Option(help="Compare with a run; --against X --help says more.")] = None,
) -> None:
    """Show the report card of what has been run. Example: labs report --html report.html"""
    from shared.profiles import STAGES, lab_dir, stage_dir
    from shared.report import render_markdown, render_terminal, update_readme
    from shared.report_html import write_html
    from shared.training import atomic_write_text

    profile = _chosen_profile(profile)
    metrics = _finished(profile, list(STAGES))
    if not metrics:
        raise LabsError(f"nothing has been run in profile {profile}: start with `labs run all --profile {profile}`")
    render_terminal(metrics)
    if html:
        write_html([stage_dir(profile, row["stage"]) for row in metrics], html)
    if markdown:
        atomic_write_text(markdown, render_markdown(metrics))
    if readme:
        update_readme(REPO_ROOT / "README.md", "all", render_markdown(metrics))
        for row in metrics:
            path = lab_dir(STAGES[row["stage"]].lab) / "README.md"
            update_readme(path, row["stage"], render_markdown([row]))


@app.command(cls=_LabCommand)
def chat(
    stage: Annotated[str, typer.Argument(help="A stage (sft, base), a folder with a model, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Ask once and end, instead of a conversation.")] = None,
    profile: ProfileOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: for a base model.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples freely.", min=0)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    tools: Annotated[
        bool, typer.Option("--tools", help="The model calls tools: see `labs chat 04 --tools --help`.")
    ] = False,
) -> None:
    """Talk to a checkpoint or an adapter. Example: labs chat sft --prompt "Ana has 9 pens. Give name as JSON." """
    from shared.models import load_model, stream_reply

    model, tokenizer = load_model(**locate_model(stage, profile))
    raw = raw or stage == "base"
    messages: list[dict[str, str]] = []
    if prompt is None:
        typer.echo("Type a message; an empty line ends the conversation.")
    while True:
        try:
            text = prompt if prompt is not None else input("you: ")
        except EOFError:  # Ctrl-D, or the end of a file piped in
            text = ""
        if not text:
            return
        messages = messages if not raw else []  # a base model continues one text; it knows no turns
        messages.append({"role": "user", "content": text})
        reply = ""
        for piece in stream_reply(model, tokenizer, messages, max_new_tokens, temperature, seed, raw=raw):
            reply += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        typer.echo()
        messages.append({"role": "assistant", "content": reply})
        if prompt is not None:
            return


def locate_model(stage: str, profile: str | None) -> dict:
    """`load_model` arguments for a stage's name, a folder with a model or an adapter, or a hub id."""
    import json

    from shared.profiles import STAGES, stage_dir

    folder = stage_dir(_chosen_profile(profile), stage) if stage in STAGES else Path(stage)
    adapter = (folder / "adapter" if stage in STAGES else folder) / "adapter_config.json"
    if adapter.exists():
        return {"name_or_path": json.loads(adapter.read_text())["base_model_name_or_path"], "adapter": adapter.parent}
    if stage not in STAGES:
        return {"name_or_path": stage}
    if not (folder / "model" / "config.json").exists():
        if stage == "shakespeare":
            raise LabsError(
                "stage shakespeare is a character model without a chat: try `labs run sft`, then `labs chat sft`"
            )
        raise LabsError(f"stage {stage} has not been run: `labs run {stage}` builds it")
    return {"name_or_path": folder / "model"}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def label(context: typer.Context) -> None:
    """Collect human preferences for lab 02. Example: labs label --help"""
    _become("labs/02_preference_alignment/label_cli.py", context.args)


def _become(script: str, arguments: list[str]) -> None:
    """A lab's script takes this process's place: no lab is imported here, and Ctrl-C, a kill and the exit code are its own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(REPO_ROOT / script), *arguments])


@data_app.command("list")
def data_list() -> None:
    """List the data sets with licence and source. Example: labs data list"""
    from shared.data import DATASETS

    for spec in DATASETS.values():
        typer.echo(f"{spec.name:<24} {', '.join(spec.files):<16} {spec.licence:<28} {spec.source}")


@data_app.command("fetch")
def data_fetch(
    destination: Annotated[Path, typer.Argument(help="The folder to fill; then set LABS_DATA_DIR to it.")],
    names: Annotated[list[str] | None, typer.Argument(help="Which sets; default: all.")] = None,
    source: Annotated[str, typer.Option(help="auto (LABS_DATA_DIR, then the hub), mirror, hub or generated.")] = "auto",
) -> None:
    """Write an offline mirror with checksums; run again to go on or repair. Example: labs data fetch mirror gsm8k"""
    from shared.data import fetch

    folder = fetch(destination, names or None, source)
    typer.echo(f"mirror in {folder}; use it with: export LABS_DATA_DIR={folder}")


def main() -> None:
    """Run the command `labs`."""
    run_app(app, "interrupted: run the same command again to go on")


def run_app(app: typer.Typer, interrupted: str = "") -> None:
    """Run a command line; a user's mistake is one line and exit code 1, Ctrl-C is 130 and says `interrupted`."""
    try:
        code = app(standalone_mode=False)  # Typer answers Ctrl-C with 130 and other early ends with their code
    except LabsError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # Typer's own complaints about arguments are shown as it shows them; a defect keeps its trace.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise
    if code == 130 and interrupted:
        typer.echo(interrupted, err=True)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
