"""What all tests share: eight CPU devices, the demo models, and one cache of programs."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports JAX; subprocesses that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"  # whatever else is installed: compilers of other chips, too
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # several test processes, and no chip to share
os.environ["TPU_SKIP_MDS_QUERY"] = "true"  # or libtpu looks for a cloud that it might run in
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

import jax
import pytest
from hypothesis import settings

from jaxserve.checkpoints.pull import pull

# A verdict is one of the code alone: it depends neither on how long an example takes, since a
# machine may be busy, nor on chance. `--hypothesis-profile=explore` looks for new examples.
settings.register_profile("verdict", deadline=None, derandomize=True)
settings.load_profile("verdict")
settings.register_profile("explore", deadline=None, max_examples=1000)
# `--hypothesis-profile=fuzz`: many minutes of what the fuzz tests do for seconds.
settings.register_profile("fuzz", max_examples=20_000, deadline=None)
settings.register_profile("rounds", max_examples=100, deadline=None)  # see scripts/fuzz.sh


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one would keep a single worker busy at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Leaves loggers as they were: commands set levels and formats for their whole process."""
    root = logging.getLogger()
    before = {
        name: (one.level, list(one.handlers)) for name, one in [("", root), *_loggers().items()]
    }
    formats = [(handler, handler.formatter) for handler in root.handlers]
    yield
    for name, one in [("", root), *_loggers().items()]:
        level, handlers = before.get(name, (logging.NOTSET, []))
        one.setLevel(level)
        one.handlers[:] = handlers
    for handler, formatter in formats:
        handler.setFormatter(formatter)


def _loggers() -> dict[str, logging.Logger]:
    """jaxserve's own loggers by name."""
    return {
        name: one
        for name, one in logging.root.manager.loggerDict.items()
        if name.partition(".")[0] == "jaxserve" and isinstance(one, logging.Logger)
    }


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, downloaded on first use and kept."""
    return pull("smollm2-135m", progress=False)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M as a GGUF file, downloaded on first use and kept."""
    return pull("gemma3-270m", progress=False)


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """Has LLVM leave the module's programs as XLA wrote them, for faster compiles.

    For tests of many programs that run little or not at all. What XLA itself makes of them, and
    so the memory they take, is the same. For whole modules, since engines that a module's tests
    share are built before what a single test asks for.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def program_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests keep compiled programs, so that equal engines compile once per session."""
    base = tmp_path_factory.getbasetemp()
    # With xdist every worker has a folder of its own in the session's; share the latter.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared / "programs"
