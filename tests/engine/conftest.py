"""Tiny models, and a guard against the compile watches of engines that a test leaves behind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jaxserve.engine.build
from jaxserve.runner.program_cache import CompileWatch
from jaxserve.testing.tiny_model import write_tiny_checkpoint

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Writes a tiny checkpoint of a family and config, once for all who want the same."""
    written: dict[str, Path] = {}

    def write(family: str = "llama", **config: Any) -> Path:
        key = repr((family, sorted(config.items())))
        if key not in written:
            directory = tmp_path_factory.mktemp(f"tiny-{family}")
            written[key] = write_tiny_checkpoint(directory, family=family, seed=1, **config)
        return written[key]

    return write


@pytest.fixture
def compile_watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the watch of every engine built in the test: a strict one would outlive it."""
    watches: list[CompileWatch] = []
    real = CompileWatch

    def watch(*args: Any, **kwargs: Any) -> CompileWatch:
        watches.append(real(*args, **kwargs))
        return watches[-1]

    monkeypatch.setattr(jaxserve.engine.build, "CompileWatch", watch)
    yield
    for each in watches:
        each.close()
