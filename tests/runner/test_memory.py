"""Temporary memory does not grow with the KV pool, and the pool is updated in place."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxserve.models.backend import KernelBackend
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_readers import from_preset
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_program import StepProgram

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

PAGE_SIZE, HEAD_DIM, KV_HEADS, LAYERS = 8, 32, 2, 2


def model_config(family: str) -> ModelConfig:
    gemma = family == "gemma3"
    return ModelConfig(
        family="gemma3" if gemma else "llama", name="m", vocab_size=64, hidden_size=48,
        intermediate_size=64, num_layers=LAYERS, num_heads=6, num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, max_model_len=2048, norm_eps=1e-5, rope_theta=1e4,
        rope_theta_local=1e4 if gemma else None, tie_embeddings=True, qk_norm=gemma,
        sliding_window=(16, None) if gemma else (),
    )  # fmt: skip


def lowering(
    family: str,
    mesh: str,
    num_pages: int,
    implementation: str,
    loop_layers: bool,
    kv_dtype: str = "float32",
) -> StepLowering:
    config, rules = shard_model(model_config(family), make_mesh(mesh))
    graph = ModelGraph(config)
    buckets = Buckets.for_limits(max_tokens=32, max_rows=8, max_model_len=2048, page_size=PAGE_SIZE)
    backend = KernelBackend(rules, implementation, loop_layers=loop_layers)
    program = StepProgram(graph, backend, buckets)
    return StepLowering(program, jnp.dtype("float32"), num_pages, PAGE_SIZE, jnp.dtype(kv_dtype))


# Both backends with both ways through the layers (whether they are a loop), each for few and for
# many tokens at least once; with one kind of layers, with two, and on a mesh.
@pytest.mark.parametrize(
    ("family", "mesh", "num_tokens", "implementation", "loop_layers"),
    [
        ("llama", "", 1, "cpu", True), ("llama", "", 32, "cpu", False),
        ("llama", "", 32, "xla", True), ("llama", "", 1, "xla", False),
        ("gemma3", "", 1, "cpu", True), ("gemma3", "", 32, "xla", True),
        ("gemma3", "", 1, "cpu", False),
        ("llama", "data=2,tensor=2", 32, "cpu", True),
        ("llama", "data=2,tensor=2", 1, "xla", True),
        ("llama", "data=2,tensor=2", 32, "xla", False),
    ],
)  # fmt: skip
def test_temporaries_do_not_grow_with_the_pool(
    family: str, mesh: str, num_tokens: int, implementation: str, loop_layers: bool
):
    devices = 4 if mesh else 1
    temporaries = []
    for num_pages in (1_000, 10_000):
        lowered = lowering(family, mesh, num_pages, implementation, loop_layers).backbone(
            num_tokens
        )
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        pool = LAYERS * 2 * KV_HEADS * num_pages * PAGE_SIZE * HEAD_DIM * 4 // devices
        assert memory.alias_size_in_bytes >= pool, "the pool is not updated in place"
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1]
    assert temporaries[1] < pool / 10


@pytest.mark.parametrize(("implementation", "loop_layers"), [("cpu", True), ("xla", False)])
def test_spans_hand_the_pool_on(implementation: str, loop_layers: bool):
    """A span's layers are found in it by a number that the program is given."""
    num_pages = 10_000
    whole = lowering("llama", "", num_pages, implementation, loop_layers)
    spans = dataclasses.replace(whole, program=dataclasses.replace(whole.program, num_spans=LAYERS))
    memory = spans.span(0, 32).compile().memory_analysis()
    assert memory is not None
    pool = LAYERS * 2 * KV_HEADS * num_pages * PAGE_SIZE * HEAD_DIM * 4
    assert memory.alias_size_in_bytes >= pool, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < pool / 10


@pytest.mark.parametrize(
    ("num_tokens", "implementation", "kv_dtype"),
    [
        (1, "cpu", "bfloat16"), (32, "cpu", "bfloat16"), (1, "xla", "bfloat16"),
        (32, "xla", "bfloat16"), (1, "xla", "int8"), (32, "cpu", "float8_e4m3fn"),
    ],
)  # fmt: skip
def test_a_narrow_pool_is_never_converted(num_tokens: int, implementation: str, kv_dtype: str):
    """XLA:CPU would make float32 of all of it, and bfloat16 again, in every layer."""
    num_pages = 10_000
    lowered = lowering("llama", "", num_pages, implementation, True, kv_dtype)
    memory = lowered.backbone(num_tokens).compile().memory_analysis()
    assert memory is not None
    itemsize = jnp.dtype(kv_dtype).itemsize
    pool = LAYERS * 2 * KV_HEADS * num_pages * PAGE_SIZE * HEAD_DIM * itemsize
    assert memory.alias_size_in_bytes >= pool, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < pool / 10


@pytest.fixture(scope="module")
def smollm2() -> ModelGraph:
    """30 layers, 3 KV heads, head_dim 64."""
    return ModelGraph(from_preset("smollm2-135m"))


@pytest.mark.parametrize(
    ("mesh", "kv_dtype"), [("", "bfloat16"), ("", "int8"), ("data=2,tensor=3", "float32")]
)
@pytest.mark.parametrize("program", ["save", "fetch", "copy"])
def test_moving_pages_takes_no_memory_that_grows_with_the_pool(
    smollm2: ModelGraph, mesh: str, program: str, kv_dtype: str
):
    _, rules = shard_model(smollm2.config, make_mesh(mesh))
    temporaries = []
    for num_pages in (1_000, 10_000):
        buckets = Buckets((8,), (8,), max_rows=8, max_pages=8)
        step = StepProgram(smollm2, KernelBackend(rules, "xla"), buckets)
        lowering = StepLowering(step, jnp.dtype("float32"), num_pages, 64, jnp.dtype(kv_dtype))
        largest = lowering.page_pieces[-1]
        if program == "save":
            lowered = lowering.save_pages(largest)
        else:
            lowered = lowering.fetch_pages(largest) if program == "fetch" else lowering.copy_pages()
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        pool = num_pages * lowering.page_bytes // rules.data
        if program != "save":
            assert memory.alias_size_in_bytes >= pool, "the pool is not updated in place"
        else:
            assert memory.output_size_in_bytes <= 1.01 * largest * lowering.page_bytes
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1]
    assert temporaries[1] <= 1.01 * lowering.page_bytes
