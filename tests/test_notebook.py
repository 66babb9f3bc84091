"""The notebook runs from top to bottom, inside the event loop that a kernel runs cells in."""

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "quickstart.ipynb"

CHECK = """
import asyncio
assert asyncio.get_running_loop().is_running()  # LLM worked inside of it
assert [len(r.outputs[0].token_ids) for r in results] == [24, 24, 24]
assert "Paris" in results[0].outputs[0].text
load = llm.load()
assert load.compiles_after_ready == 0
assert load.num_used_pages == 0
"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not c.outputs and c.execution_count is None for c in code)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_gguf")  # downloaded outside of the cells' time limit
def test_it_runs(notebook: Any) -> None:
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (streaming,) = (cell for cell in code if "llm.stream" in cell.source)
    # One output or many: the kernel flushes its stdout when it likes.
    assert len("".join(output.text for output in streaming.outputs)) > 20
    # With ipywidgets the bar is a widget, whose first text is kept; without, text on stderr.
    bars = [str(o.get("data", o.get("text"))) for c in code for o in c.outputs]
    assert any("generating" in bar and "/3" in bar for bar in bars), "no progress bar"
