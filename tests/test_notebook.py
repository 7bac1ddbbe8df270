"""The example notebook was executed, says nothing of the machine, and its cells run."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tune.ipynb"


def code_cells() -> list[dict[str, Any]]:  # Any: JSON values
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_has_the_outputs_of_one_run_in_order() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("<table>" in "".join(data.get("text/html", ())) for data in shown)
    assert "site-packages" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}  # Any: what the cells define
    for cell in code_cells():
        exec("".join(cell["source"]), names)
    assert names["guard"].in_bf16 == ("blocks.1",)
    assert names["run"].verification
