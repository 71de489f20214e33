"""The notebooks run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
ENDS = {
    "01_a_small_deepseek": "def ",
    "02_dualpipe": "pipeline  DualPipe, 4 ranks",
    "03_fp8": "             mean error",
    "04_inference": "def ",
}
"""How the last output of each begins."""
SHORT = {"01_a_small_deepseek": "seconds = 3", "03_fp8": "steps = 3", "04_inference": "seconds = 3"}
"""Parameters that make a notebook short."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = SHORT[path.stem]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert len([o for o in outputs if {"image/png", "image/svg+xml"} & {*o.get("data", {})}]) >= 3
    assert notebook.cells[-1].outputs[0].text.startswith(ENDS[path.stem])
