"""Rules that the whole repository keeps, checked on the files that git would commit. Nothing heavy is imported."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from shared import REPO_ROOT

LESSON_MODULES = {"attention_implementation", "lora_from_scratch", "preference_losses", "policy_gradients"}
# Lab 05 measures what the others made; it may look down on them.
MEASURING_LAB = "05_evaluation"
MAX_MODULE_LINES = 400
MAX_SHARED_LINES = 3_700
# Folders that exist only on somebody's own machine: of a user, of a container, of a temporary run.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}])/(?:home|Users|root|work|mnt)/[\w.-]+|(?<![\w.$}])/tmp/[\w.-]+|[A-Z]:\\\\?Users\\"
)
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load",
    "dill.loads", "joblib.load", "marshal.loads", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {
    ("trust_remote_code", True), ("shell", True), ("weights_only", False), ("allow_pickle", True),
}  # fmt: skip
# Lines for a shell or an installer, not for Python: !ls, x = !ls, %pip, %%bash.
SHELL_LINE = re.compile(r"\s*([\w ,]+=\s*)?(!(?!=)|%%?(bash|sh|pip|cd|system|sx|conda)\b)")
IMPORTANT_PINS = {
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "trl": "1.14.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "4.8.5",
    "bitsandbytes": "0.50.2",
    "wandb": "0.31.0",
}
PINNED_EXTRAS = ("dev", "eval", "label")  # gpu and serve are resolved on GPU machines, see constraints.txt
# Distributions whose import name is another one.
IMPORT_NAMES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "IPython": "ipython"}


def repository_files() -> list[Path]:
    """What git tracks or would add, so that runs/ and other ignored files do not count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    if listing.returncode:  # an unpacked archive: no git, take what is there
        folders = [REPO_ROOT / name for name in ("shared", "labs", "tests", "tools", "benchmarks", "infra")]
        found = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
        return [path for path in [*found, *REPO_ROOT.glob("*")] if path.is_file()]
    return [path for path in (REPO_ROOT / line for line in listing.stdout.splitlines()) if path.is_file()]


FILES = repository_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
MODULES = [path for path in PYTHON if path.parent.parent == REPO_ROOT / "labs"]
SHARED = [path for path in PYTHON if path.parent == REPO_ROOT / "shared"]


def name(path: Path) -> str:
    return path.relative_to(REPO_ROOT).as_posix()


def each(paths: list[Path]):
    """One test a file, named after it."""
    return pytest.mark.parametrize("path", paths, ids=name)


def imported_names(source: str) -> set[str]:
    """Top-level names of every absolute import, at whatever depth of the code it stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def forbidden_code(source: str) -> list[str]:
    """Calls that run or unpickle foreign data, and arguments that allow it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: import {module}" for module in modules if module in ("pickle", "marshal")]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {called}()")
            found += [argument_problem(node, keyword.arg, keyword.value) for keyword in node.keywords]
        if isinstance(node, ast.Dict):  # arguments that are passed on as **settings
            pairs = zip(node.keys, node.values, strict=True)
            found += [argument_problem(node, key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
    return [problem for problem in found if problem]


def argument_problem(node: ast.AST, argument: str | None, value: ast.expr) -> str:
    """The problem with this argument, or nothing."""
    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
        if (argument, value.value) in FORBIDDEN_ARGUMENTS:
            return f"line {node.lineno}: {argument}={value.value}"
    return ""


def notebook_cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def shell_lines(cell: dict) -> list[str]:
    return [line for line in source(cell).splitlines() if SHELL_LINE.match(line)]


def python_source(cell: dict) -> str:
    """The cell without the lines that only IPython understands."""
    return re.sub(r"^(\s*)([\w ,]+=\s*)?[!%](?!=).*", r"\1pass", source(cell), flags=re.MULTILINE)


def output_texts(cell: dict) -> str:
    texts = []
    for output in cell.get("outputs", []):
        texts += [output.get("text", ""), output.get("traceback", "")]
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(text) for text in texts)


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirement_name(requirement: str) -> str:
    return normal(re.match(r"[\w.-]+", requirement).group())


def pins() -> dict[str, str]:
    lines = (REPO_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (re.match(r"([\w.-]+)(?:==|>=)(\S+)$", line) for line in lines if line and not line.startswith("#"))
    return {normal(pair[1]): pair[2] for pair in pairs}


def project() -> dict:
    return tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# The checks themselves, shown to fail on what they are there to find.


def test_the_checks_catch_what_they_look_for():
    assert imported_names("def f():\n    import torch.nn as nn\n    from shared.data import x") == {"torch", "shared"}
    bad = ["eval(text)", "exec('1')", "import pickle", "from pickle import loads", "subprocess.run('ls', shell=True)"]
    bad += ["settings = {'trust_remote_code': True}", "AutoModel.from_pretrained(x, trust_remote_code=True)"]
    bad += ["torch.load(p, weights_only=False)", "yaml.load(t)"]
    for code in bad:
        assert forbidden_code(code), code
    good = ["model.eval()", "re.compile('a')", "ast.literal_eval(text)", "run(x, shell=False)", "'eval(x)'"]
    for code in good:
        assert not forbidden_code(code), code
    for text in ("/root/x/y.py", 'open("/tmp/a")', "in /home/ana/labs", "C:\\Users\\ana", "/work/labs"):
        assert MACHINE_PATH.search(text), text
    for text in ("https://example.org/home/page", "runs/tiny", "/content/drive", "$HOME/work/x", "a/root/b"):
        assert not MACHINE_PATH.search(text), text
    assert shell_lines({"source": ["x != 1\n", "  !ls\n", "y = !ls\n", "%pip install x\n", "%time x"]}) == [
        "  !ls",
        "y = !ls",
        "%pip install x",
    ]
    assert (
        python_source({"source": ["if x != 1:\n", "    y = !ls\n", "a = b % c"]}) == "if x != 1:\n    pass\na = b % c"
    )


# Architecture


@each(SHARED)
def test_shared_imports_no_lab(path):
    labs = {module.stem for module in MODULES}
    assert labs and not imported_names(path.read_text(encoding="utf-8")) & labs


@each(MODULES)
def test_a_lab_imports_no_other_lab(path):
    if path.parent.name == MEASURING_LAB:
        pytest.skip("lab 05 measures the other labs")
    others = {module.stem for module in MODULES if module.parent != path.parent}
    assert not imported_names(path.read_text(encoding="utf-8")) & others


@each([path for path in MODULES if path.stem in LESSON_MODULES])
def test_a_lesson_module_can_be_read_alone(path):
    own = {module.stem for module in MODULES} | {"shared"}
    assert not imported_names(path.read_text(encoding="utf-8")) & own


def test_module_names_are_unique():
    stems = [path.stem for path in MODULES]
    assert len(stems) == len(set(stems))
    taken = set(stems) & (set(sys.stdlib_module_names) | {normal(pin).replace("-", "_") for pin in pins()})
    assert not taken, f"these hide a library's module: {taken}"


@each([*MODULES, *SHARED])
def test_a_module_stays_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


def test_shared_stays_thin():
    lines = [line for path in SHARED for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= MAX_SHARED_LINES


def test_every_lab_is_complete_and_on_the_path():
    configured = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["dev-mode-dirs"]
    analysed = json.loads((REPO_ROOT / "pyrightconfig.json").read_text())["extraPaths"]
    for folder in sorted({path.parent for path in MODULES}):
        assert name(folder) in configured and name(folder) in analysed
        for needed in ("README.md", "profiles.yaml"):
            assert (folder / needed).exists(), f"{name(folder)} has no {needed}"
    assert all((REPO_ROOT / folder).is_dir() for folder in [*configured, *analysed])


def test_the_environment_imports_lab_modules_from_any_folder(tmp_path):
    modules = ["shared", *sorted(path.parent.name + "/" + path.stem for path in MODULES)]
    program = f"import importlib.util as u; print([u.find_spec(m.split('/')[-1]).origin for m in {modules!r}])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(Path(origin).is_relative_to(REPO_ROOT) for origin in ast.literal_eval(done.stdout))


# Safety and portability


# Runs model-written programs, which is its purpose: in a process of its own, behind everything that code_sandbox puts up.
SANDBOXED = ("sandbox_roles.py",)


@each([path for path in PYTHON if path.name not in SANDBOXED])
def test_nothing_runs_or_unpickles_foreign_data(path):
    assert not forbidden_code(path.read_text(encoding="utf-8"))


@each([path for path in FILES if path.suffix in (".yaml", ".yml")])
def test_no_settings_let_a_model_bring_its_own_code(path):
    assert not re.search(r"trust[_-]remote[_-]code\W+(true|yes|on)\b", path.read_text(encoding="utf-8"), re.IGNORECASE)


@each([path for path in FILES if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".sh", "")])
def test_no_path_of_somebodys_machine(path):
    if path == Path(__file__):
        pytest.skip("it names what it looks for")
    found = [match.group() for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))]
    assert not found


def test_scripts_are_executable_and_the_makefile_has_its_targets():
    assert os.access(REPO_ROOT / ".ci" / "run", os.X_OK)
    listed = subprocess.run(
        ["make", "help"], cwd=REPO_ROOT, capture_output=True, text=True, env=dict(os.environ)
    ).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    assert {"run", "test", "test-fast", "notebooks", "bench", "lint", "help", "clean"} <= targets


# Documents


def broken_links(text: str, folder: Path) -> list[str]:
    """Markdown and HTML links to files that are not there; fenced code does not count."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    local = (link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#|data:", link))
    return [link for link in local if link and not (folder / link).exists()]


@each([path for path in FILES if path.suffix == ".md"])
def test_links_lead_somewhere(path):
    assert not broken_links(path.read_text(encoding="utf-8"), path.parent)


@each(NOTEBOOKS)
def test_links_in_notebooks_lead_somewhere(path):
    text = "\n".join(source(cell) for cell in notebook_cells(path, "markdown"))
    assert not broken_links(re.sub(r"\]\(attachment:[^)]*\)", "]", text), path.parent)


def test_a_broken_link_is_found():
    assert broken_links("see [a](none.md#x) and [b](https://example.org) and [c](#here)", REPO_ROOT) == ["none.md"]


# Notebooks


@each(NOTEBOOKS)
def test_a_notebook_is_committed_as_it_ran(path):
    cells = [cell for cell in notebook_cells(path) if source(cell).strip()]
    assert any(cell["outputs"] for cell in cells), "no outputs: `make notebooks` executes it"
    unrun = [position for position, cell in enumerate(cells) if cell["execution_count"] is None]
    assert not unrun, f"code cells {unrun} were not run"
    counts = [cell["execution_count"] for cell in cells]
    assert counts == sorted(counts), "cells were run out of order"
    errors = [output["ename"] for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors


@each(NOTEBOOKS)
def test_a_notebook_shows_nothing_of_the_machine_it_ran_on(path):
    cells = notebook_cells(path)
    found = [m.group() for cell in cells for m in MACHINE_PATH.finditer(output_texts(cell) + source(cell))]
    assert not found


@each(NOTEBOOKS)
def test_shell_commands_stand_in_the_first_code_cell_alone(path):
    assert not [line for cell in notebook_cells(path)[1:] for line in shell_lines(cell)]


@each(NOTEBOOKS)
def test_a_notebook_runs_no_foreign_code(path):
    assert not [problem for cell in notebook_cells(path) for problem in forbidden_code(python_source(cell))]


# Dependencies


def test_the_important_pins_are_those_that_were_tested_together():
    found = pins()
    assert {key: found.get(key) for key in IMPORTANT_PINS} == IMPORTANT_PINS


def test_constraints_fit_both_builds_of_torch():
    lines = (REPO_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert len(pins()) == len(entries), "each line is NAME==VERSION, each name once"
    assert [line for line in entries if "==" not in line] == [f"certifi>={pins()['certifi']}"]
    assert not [line for line in entries if "+" in line or re.match(r"(nvidia|cuda|triton)", line)]


def test_every_requirement_is_pinned_within_its_range():
    specifiers = pytest.importorskip("packaging.requirements")
    found, table = pins(), project()
    wanted = [*table["project"]["dependencies"], *table["build-system"]["requires"]]
    for extra in PINNED_EXTRAS:
        wanted += table["project"]["optional-dependencies"][extra]
    for text in wanted:
        requirement = specifiers.Requirement(text)
        assert normal(requirement.name) in found, f"{requirement.name} has no line in constraints.txt"
        assert requirement.specifier.contains(found[normal(requirement.name)], prereleases=True), text


def test_what_requirements_bring_is_pinned_too():
    """Every installed distribution that the core and the tests need, directly or through others, has its line."""
    specifiers = pytest.importorskip("packaging.requirements")
    found, table = pins(), project()["project"]
    wanted = [*table["dependencies"], *table["optional-dependencies"]["dev"]]
    waiting = [specifiers.Requirement(text) for text in wanted]
    seen, done = set(), set()
    while waiting:
        requirement = waiting.pop()
        current, extras = normal(requirement.name), frozenset(requirement.extras)
        # The CUDA build of torch pins its own.
        if (current, extras) in done or re.match(r"nvidia|cuda|triton", current):
            continue
        done.add((current, extras))
        try:
            brought = metadata.requires(current) or []
        except metadata.PackageNotFoundError:  # not for this platform, or `make run` alone was called
            continue
        seen.add(current)
        for inner in map(specifiers.Requirement, brought):
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(inner)
    assert len(seen) > 50
    assert not seen - set(found)


def test_every_import_is_a_declared_requirement():
    table = project()["project"]
    declared = {requirement_name(text) for text in table["dependencies"]}
    for extra in table["optional-dependencies"].values():
        declared |= {requirement_name(text) for text in extra}
    own = {path.stem for path in [*MODULES, *PYTHON]} | {"shared", "tests"}
    used = set().union(*(imported_names(path.read_text(encoding="utf-8")) for path in [*MODULES, *SHARED]))
    foreign = used - own - set(sys.stdlib_module_names)
    undeclared = {each for each in foreign if normal(IMPORT_NAMES.get(each, each)) not in declared}
    assert not undeclared


def test_unsloth_without_a_gpu_agrees_with_the_constraints():
    path = REPO_ROOT / "requirements-unsloth.txt"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = pins()
    for line in lines:
        package, version = line.split("==")
        assert found.get(normal(package), version) == version, line


def test_the_running_python_is_a_supported_one():
    assert (3, 11) <= sys.version_info[:2] < (3, 14), sysconfig.get_python_version()
