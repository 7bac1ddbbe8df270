"""Run the cells of examples/tune.ipynb anew and write their outputs into it.

pip install nbclient ipykernel
python bench/notebook.py
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tune.ipynb"


def main() -> None:
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, without ipywidgets
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:  # the run's files go there
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran is no news
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
