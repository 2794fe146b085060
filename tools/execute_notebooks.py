"""Execute every notebook of the labs in place, with its outputs: `make notebooks`, or name some of them.

python tools/execute_notebooks.py [labs/00_pretraining_fundamentals/nanogpt_from_scratch.ipynb ...]
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    paths = [Path(argument).resolve() for argument in sys.argv[1:]] or sorted(ROOT.glob("labs/*/*.ipynb"))
    os.environ["WANDB_MODE"] = "disabled"
    for path in paths:
        print(f"executing {path.relative_to(ROOT)}", flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": path.parent}},
        ).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps would make every run a change
            # Standard error holds the libraries' remarks about this machine; what the lesson says is on standard output.
            outputs = cell.get("outputs", [])
            cell["outputs"] = (
                [out for out in outputs if out.get("name") != "stderr"] if cell.cell_type == "code" else None
            )
            if cell.cell_type != "code":
                del cell["outputs"]
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
