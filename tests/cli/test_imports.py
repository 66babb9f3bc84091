"""What takes seconds to import is imported when it is used, not before."""

import subprocess
import sys

import pytest

HELP = """
import contextlib, sys
from jaxserve.cli.main import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1].split())
"""
BUILD = """
import sys
import jaxserve.engine.build
"""
# `serve`'s half second of web frameworks, the engine's of JAX, and what few models need.
SERVING = {"grpc", "fastapi", "uvicorn", "pydantic", "prometheus_client", "cryptography", "numpy"}
ENGINE = {"jax", "jaxlib", "flax", "orbax", "numba", "gguf", "transformers", "torch"}


def imported(code: str, *arguments: str) -> set[str]:
    code += "\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("command", ["", "serve", "generate", "pull", "convert"])
def test_help_imports_neither_engine_nor_server(command: str) -> None:
    heavy = SERVING | ENGINE
    if command == "serve":
        heavy -= {"numpy"}  # of the tokenizers, which know how tool calls are spelled
    assert not heavy & imported(HELP, f"{command} --help")


def test_building_an_engine_imports_no_kernel_compilers_nor_other_formats() -> None:
    modules = imported(BUILD)
    assert "jax" in modules
    for heavy in ("numba", "orbax.checkpoint", "jax.experimental.mosaic.gpu"):
        assert heavy not in modules
