"""docs/notebook.ipynb runs in a Jupyter kernel as it stands, and shows what it says."""

from pathlib import Path

import nbformat  # nbclient brings it
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
    """Each result shows itself, each plot is a picture, and progress leaves no escape sequences."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):  # not the user's kernels
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # no stale numbers
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    shown = [(cell.source.splitlines()[-1], cell.outputs) for cell in cells]
    said = "".join(
        out.text for _, outputs in shown for out in outputs if out.get("name") == "stdout"
    )
    for part in ("by 1.00 ± 0.0", "dept=8: no such key; did you mean depth?", "model=olmo2_7b"):
        assert part in said
    assert not any("\x1b" in o.text for _, out in shown for o in out if o.get("name") == "stderr")
    displays = {last: out.data for last, outputs in shown for out in outputs if "data" in out}
    for last, display in displays.items():
        if last.endswith(";"):
            assert "image/png" in display, last
        elif not last.startswith(("r.theory", "sweep.table")):
            assert "<img" in display["text/html"], last
            assert "<table" in display["text/html"], last
            assert len(display["text/plain"]) < 500, last
    assert len(displays) == 8
    assert (tmp_path / "outputs" / "olmo2_7b_init" / "report.html").is_file()
