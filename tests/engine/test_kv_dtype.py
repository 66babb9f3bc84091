"""A KV cache of another type than the weights: its tokens, its size, and who else may use it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve import LLM
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine import blueprint
from jaxserve.engine.engine import Engine
from tests.engine.harness import greedy, maker, prompts, run, tokens
from tests.models.numpy_reference import NumpyModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

PAGE_SIZE = 4
HEAD_DIM = 8


@pytest.fixture(scope="module")
def make(tiny_model: Callable[..., Path], program_cache_dir: Path) -> Iterator[Callable]:
    """Builds engines that keep KV in bfloat16 unless told otherwise."""
    limits = {
        "page_size": PAGE_SIZE, "max_num_batched_tokens": 16, "num_pages": 48,
        "kv_cache_dtype": "bfloat16", "compilation_cache_dir": str(program_cache_dir),
    }  # fmt: skip
    with maker(tiny_model("llama"), **limits) as make:
        yield make


def test_greedy_equals_the_dense_model_with_rounded_kv(
    make: Callable[..., Engine], tiny_model: Callable[..., Path]
) -> None:
    """Both fast implementations, with chunks and decodes.

    Five of six answers at least, since one key in thousands may be rounded the other way.
    """
    requests = [(prompt, greedy(15)) for prompt in prompts(6, 40, seed=2)]
    rounded = NumpyModel(tiny_model("llama"), ml_dtypes.bfloat16)
    expected = [rounded.greedy(prompt, 15) for prompt, _ in requests]
    answers = [
        tokens(run(make(attention_implementation=name), requests)) for name in ("cpu", "xla")
    ]
    for got in answers:
        assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 5
    assert answers[0] == answers[1]


def test_bytes_and_pages(tiny_model: Callable[..., Path], program_cache_dir: Path) -> None:
    """By the notebook's class, which takes all options as keywords."""
    sizes = {}
    for dtype in ("auto", "bfloat16", "int8", "fp8"):
        llm = LLM(
            str(tiny_model("llama")), kv_cache_dtype=dtype, kv_cache_memory=2e-4, max_num_seqs=32,
            page_size=PAGE_SIZE, max_num_batched_tokens=16, token_buckets="16", row_buckets="32",
            compilation_cache_dir=str(program_cache_dir),
        )  # fmt: skip
        pool: Any = llm._engine.executor._kv_pages  # type: ignore[attr-defined]
        assert 0.9 * 2e-4 * 2**30 < pool.nbytes <= 2e-4 * 2**30
        assert llm.model_info.dtype == "float32"
        sizes[llm.model_info.kv_cache_dtype] = (llm.model_info.num_pages, pool.nbytes)
        llm.close()
    assert sizes["bfloat16"][0] // 2 == sizes["float32"][0]
    assert sizes["int8"] == sizes["fp8"]
    of_page = {dtype: nbytes // pages for dtype, (pages, nbytes) in sizes.items()}
    values = of_page["float32"] // 4
    numbers = values // HEAD_DIM
    assert of_page["bfloat16"] == 2 * values
    assert of_page["int8"] == values + 4 * numbers  # and a scale for each token and head


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_tokens_depend_on_positions_alone(
    make: Callable[..., Engine], kv_dtype: str
) -> None:
    """Alone, in chunks beside others, after a prefix hit, preempted, and swapped: codes, scales."""
    options = {"kv_cache_dtype": kv_dtype, "token_buckets": "16", "row_buckets": "4"}
    requests = [(prompt, greedy(24)) for prompt in prompts(8, 40, seed=5)]
    engine = make(**options)
    assert engine.info.kv_cache_dtype == kv_dtype
    alone = [tokens(run(engine, [request]))[0] for request in requests]
    assert tokens(run(engine, requests)) == alone
    assert tokens(run(engine, requests[-1:])) == alone[-1:]
    assert engine.load().num_device_hit_tokens > 0
    for kind, host in (("recompute", 0.0), ("swap", 0.01)):
        engine = make(num_pages=24, preemption=kind, host_cache_memory=host, **options)
        assert tokens(run(engine, requests)) == alone, kind
        load = engine.load()
        assert load.num_preemptions > 0
        assert load.num_restored_tokens > 0 or kind == "recompute"


def test_quantised_tokens_on_a_mesh(make: Callable[..., Engine]) -> None:
    """Pages of two data shards, and scales split by heads, travel to the host and back."""
    options = {"kv_cache_dtype": "int8", "token_buckets": "16", "row_buckets": "4"}
    requests = [(prompt, greedy(24)) for prompt in prompts(8, 40, seed=5)]
    expected = tokens(run(make(**options), requests))
    engine = make(
        mesh="data=2,tensor=2", num_pages=36, preemption="swap", host_cache_memory=0.01, **options
    )
    got = tokens(run(engine, requests))
    # Sums over two tensor shards are rounded otherwise.
    assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 6
    assert engine.load().num_restored_tokens > 0


def test_swapped_pages_come_back_as_they_were(make: Callable[..., Engine]) -> None:
    requests = [(p, greedy(24)) for p in prompts(8, 12, seed=5)]
    expected = tokens(run(make(prefix_cache=False), requests))
    engine = make(num_pages=20, preemption="swap", host_cache_memory=0.01)
    assert tokens(run(engine, requests)) == expected
    load = engine.load()
    assert load.num_preemptions > 0 and load.num_restored_tokens > 0


def test_pages_on_disk_are_for_one_pair_of_types(
    make: Callable[..., Engine], tmp_path: Path
) -> None:
    """Rounded KV, and KV that another type's weights made, is not what this engine computes."""
    prompt = list(range(60, 100))

    def store_hits(held: str, **options: Any) -> int:
        engine = make(disk_cache_memory=0.01, disk_cache_dir=str(tmp_path), **options)
        run(engine, [(prompt, greedy(4))])
        assert engine.info.kv_cache_dtype == held
        engine.close()  # what it holds goes to disk
        return engine.load().num_store_hit_tokens

    kinds: list[tuple[str, dict[str, str]]] = [
        ("bfloat16", {"kv_cache_dtype": "bfloat16"}),
        ("float32", {"kv_cache_dtype": "auto"}),
        ("bfloat16", {"kv_cache_dtype": "auto", "dtype": "bfloat16"}),
        ("float32", {"kv_cache_dtype": "float32", "dtype": "bfloat16"}),
        ("int8", {"kv_cache_dtype": "int8"}),
        ("fp8", {"kv_cache_dtype": "fp8"}),  # as many bytes as int8
    ]
    for number, (held, options) in enumerate(kinds):
        assert store_hits(held, **options) == 0, options
        assert len(list(tmp_path.glob("*.pages"))) == number + 1
    full_pages = len(prompt) - PAGE_SIZE  # the last token's page is computed
    for held, options in kinds:
        assert store_hits(held, **options) == full_pages, options
    assert store_hits("float32", kv_cache_dtype="float32") == full_pages, "as auto is by itself"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_implementation": "gpu"}, r"one dtype, not float32 and bfloat16; give both .*"
         r"'xla'.* \(--dtype float32, --kv-cache-dtype bfloat16\)"),
        ({"attention_implementation": "gpu", "dtype": "bfloat16", "kv_cache_dtype": "float32"},
         r"not float32: .* \(--dtype bfloat16, --kv-cache-dtype float32\)"),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_is_refused(options: dict[str, str], message: str) -> None:
    """A named kernel; `auto` says that it takes XLA's instead (`pallas_kernels/test_choice`)."""
    hopper = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    rules: Any = SimpleNamespace(
        mesh=SimpleNamespace(devices=np.array([hopper], object)), head_parts=1
    )
    model: Any = SimpleNamespace(num_heads=8, num_kv_heads=2, head_dim=64)
    fields = {"dtype": "float32", "kv_cache_dtype": "bfloat16"} | options
    config = EngineConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        blueprint._attention(
            config, model, rules, np.dtype(fields["dtype"]), np.dtype(fields["kv_cache_dtype"])
        )
