"""The engine's tokens with the TPU and GPU kernels, in Pallas' interpreters, against XLA's."""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.engine import build as build_module
from jaxserve.engine.engine import Engine
from jaxserve.runner.program_cache import ProgramCache
from tests.engine.harness import build, greedy, run, tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

# Prompt tokens, answer tokens: prompts of several steps, and past the tiny models' window of 24.
REQUESTS = [(29, 4), (1, 6), (17, 2), (5, 5)]

LAYER_TYPES = ["sliding_attention", "full_attention"]


def interpret(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines built from now on run a kernel on this CPU."""

    def interpreter() -> contextlib.AbstractContextManager:
        if kernel == "tpu":
            return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan"))
        gpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
        return gpu.force_gpu_interpret_mode(gpu.InterpretGPUParams())  # from JAX 0.11 on

    def compile_program(_: ProgramCache, name: str, lower: Callable) -> jax.stages.Compiled:
        with interpreter():  # here, since it counts for one thread
            return lower().compile()  # such programs call back: no file can hold them

    monkeypatch.setattr(build_module.paged_attention, "choose_implementation", lambda *_: kernel)
    monkeypatch.setattr(ProgramCache, "get", compile_program)


def answers(engine: Engine, shape: Sequence[tuple[int, int]] = REQUESTS) -> list[list[int]]:
    """What becomes of requests that come one after another: prefill and decode are mixed."""
    random = np.random.default_rng(3)
    requests = [(random.integers(0, 250, n).tolist(), greedy(m)) for n, m in shape]
    return tokens(run(engine, requests))


def shuffle_pages(engine: Engine) -> None:
    """Let pages be given out in no order."""
    for shard in engine._scheduler._shards:
        np.random.default_rng(1).shuffle(shard.pool._free)


def assert_same_tokens(
    kernel: str, directory: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's engine says what XLA's says."""
    expected = answers(build(directory, attention_implementation="xla", **options))
    interpret(kernel, monkeypatch)
    engine = build(directory, **options)
    assert engine.info.attention_implementation == kernel
    shuffle_pages(engine)
    assert answers(engine) == expected


@pytest.mark.parametrize(("family", "kv_dtype"), [("gemma3", "auto"), ("llama", "bfloat16")])
def test_tpu_kernels(
    family: str,
    kv_dtype: str,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    options = {
        "page_size": 8 if kv_dtype == "auto" else 16, "num_pages": 24,
        "max_num_batched_tokens": 16, "kv_cache_dtype": kv_dtype,
    }  # fmt: skip
    kinds = {"layer_types": LAYER_TYPES} if family == "gemma3" else {}
    directory = tiny_model(family, num_hidden_layers=2, **kinds)
    assert_same_tokens("tpu", directory, options, monkeypatch)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.11 has the GPU interpreter")
def test_gpu_kernels(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    options = {
        "page_size": 16, "num_pages": 12, "max_num_batched_tokens": 16, "dtype": "bfloat16",
    }  # fmt: skip
    directory = tiny_model("gemma3", head_dim=64, num_hidden_layers=2, layer_types=LAYER_TYPES)
    assert_same_tokens("gpu", directory, options, monkeypatch)
