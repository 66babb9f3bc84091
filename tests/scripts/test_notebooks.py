"""The notebooks run from top to bottom, from an empty folder, with the wheel that they install."""

import re
import socket
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.scripts.wheel import ROOT, make_environment, make_kernel

NAMES = ("quickstart.ipynb", "accelerators.ipynb", "serving.ipynb")

QUICKSTART_CHECK = """
import asyncio
assert asyncio.get_running_loop().is_running()  # LLM worked inside of it
assert [len(r.outputs[0].token_ids) for r in results] == [24, 24, 24]
assert "Paris" in results[0].outputs[0].text
load = llm.load()
assert load.compiles_after_ready == 0
assert load.num_used_pages == 0
"""

ACCELERATORS_CHECK = """
assert (data, tensor, len(jax.devices())) == (2, 2, 4)
assert sorted(rates) == [1, 2, 4] and all(rate > 0 for rate in rates.values())
assert load.compiles_after_ready == 0
"""

SERVING_CHECK = """
assert server.returncode == 0
assert contents.startswith("{")
assert len(answers) == 4 and all(answer.choices[0].text for answer in answers)
"""


def read(name: str) -> Any:
    return nbformat.read(ROOT / "scripts" / name, as_version=4)


def fill_in(notebook: Any, **fields: Any) -> None:
    """Fill in form fields, as a user does: `name = value  # @param ...`."""
    for field, value in fields.items():
        pattern = re.compile(rf"^{field} = .*?(?=  # @param)", re.MULTILINE)
        found = [cell for cell in notebook.cells if pattern.search(cell.source)]
        assert len(found) == 1, f"{len(found)} fields {field}"
        found[0].source = pattern.sub(lambda _: f"{field} = {value!r}", found[0].source)  # noqa: B023


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model for notebooks in which answers need make no sense."""
    folder = tmp_path_factory.mktemp("notebooks") / "tiny"
    return str(write_tiny_checkpoint(folder, max_position_embeddings=1024))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(its folder, the name of its kernel): new, and without jaxserve before the first notebook.

    The others find the wheel installed, and kernels compiled.
    """
    folder = tmp_path_factory.mktemp("environment")
    python = make_environment(folder / "venv")
    return folder, make_kernel(folder / "jupyter", python)


@pytest.fixture
def execute(
    wheel: Path, environment: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Runs a notebook in an empty folder, in an environment that it installs the wheel into."""
    folder, kernel = environment
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))

    def run(name: str, check: str, *, num_devices: int = 1, **fields: Any) -> list[Any]:
        flag = f"--xla_force_host_platform_device_count={num_devices}"
        monkeypatch.setenv("XLA_FLAGS", flag)
        empty = tmp_path / "empty"
        empty.mkdir()
        notebook = read(name)
        fill_in(notebook, hardware="cpu", source=str(wheel), **fields)
        is_from_wheel = f"import jaxserve\nassert jaxserve.__file__.startswith({str(folder)!r})"
        notebook.cells.append(nbformat.v4.new_code_cell(f"{check}\n{is_from_wheel}"))
        client = nbclient.NotebookClient(
            notebook, timeout=1200, startup_timeout=600, kernel_name=kernel,
            resources={"metadata": {"path": str(empty)}},
        )  # fmt: skip
        client.execute()
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    return run


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `quick_compiles` is, in the processes that a test starts."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


def printed(cells: list[Any], part: str) -> str:
    """What the one cell that has this in it printed."""
    (cell,) = (cell for cell in cells if part in cell.source)
    # One output or many: the kernel flushes its stdout when it likes.
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_without_outputs_and_its_badge_opens_it(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not c.outputs and c.execution_count is None for c in code)
    badge = f"https://colab.research.google.com/github/OWNER/jaxserve/blob/main/scripts/{name}"
    assert badge in notebook.cells[0].source
    (install,) = (cell for cell in code if "%pip" in cell.source)
    assert '"git+https://github.com/OWNER/jaxserve"' in install.source
    links = re.findall(r"\]\(([^):]+)\)", "".join(cell.source for cell in notebook.cells))
    assert all((ROOT / "scripts" / link).is_file() for link in links)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_gguf")  # downloaded outside of the cells' time limit
def test_quickstart(execute: Any) -> None:
    code = execute("quickstart.ipynb", QUICKSTART_CHECK)
    assert len(printed(code, "llm.stream")) > 20
    # With ipywidgets the bar is a widget, whose first text is kept; without, text on stderr.
    bars = [str(o.get("data", o.get("text"))) for c in code for o in c.outputs]
    assert any("generating" in bar and "/3" in bar for bar in bars), "no progress bar"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_accelerators(execute: Any, tiny: str) -> None:
    fields = {"model": tiny, "tensor": 2, "rows_per_copy": 2, "answer_len": 4}
    code = execute("accelerators.ipynb", ACCELERATORS_CHECK, num_devices=4, **fields)
    assert printed(code, "rates = {}").count("tokens/s") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_serving(execute: Any, tiny: str) -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    code = execute("serving.ipynb", SERVING_CHECK, model=tiny, port=port)
    assert printed(code, "stream=True")
