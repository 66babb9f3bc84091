"""The TPU kernels through the real TPU compiler, for chips that are not here."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh
from jax.stages import Compiled

from pallas_kernels.kv_pages import KvPages, is_quantised, pool_parts
from pallas_kernels.kv_write.tpu import kv_write
from pallas_kernels.paged_attention.tpu import MAX_TABLE_BYTES, paged_attention
from pallas_kernels.paged_batch import PagedBatch, pool_format
from pallas_kernels.shapes import MODEL_SHAPES, AttentionShape

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed (pip: jax[tpu])")
pytestmark = pytest.mark.slow

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
BATCHES = {"decode": (64, 64), "prefill": (2048, 4), "mixed": (512, 61)}  # tokens, rows
PAGE_SIZES = (16, 64, 128)

# Every chip with every other model, and the reverse; batches and page sizes in turn.
PAIRS = [
    (chip, model, list(BATCHES)[(c + m) % 3], PAGE_SIZES[(c + 2 * m) % 3])
    for c, chip in enumerate(TOPOLOGIES)
    for m, model in enumerate(MODEL_SHAPES)
    if (c + m) % 2 == 0
]


def compile_both(
    chip: str,
    model: AttentionShape,
    batch: str,
    page_size: int,
    *,
    pool_bytes: int = 2**30,
    dtype=jnp.bfloat16,
    row_major: bool = True,
    tell_chip: bool = True,
    context: int = 8192,
    joined: bool = False,
    **options,
) -> tuple[Compiled, Any]:
    """One layer of a step: write K and V, then attend; the pool is donated.

    Args:
        context: positions that a row's page table reaches.
        pool_bytes, row_major: of the pool.
        joined: of K and V in the pool.
        tell_chip: name the chip while tracing, as an engine does that compiles for one.

    Returns:
        The program, and the pool that it takes, of about `pool_bytes` logical bytes.
    """
    device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    tokens, rows = BATCHES[batch]
    page_bytes = 2 * model.kv_heads * page_size * model.head_dim * jnp.dtype(dtype).itemsize
    parts, width = pool_parts(model.head_dim, joined=joined)
    shape = (2, pool_bytes // page_bytes // 2, parts, model.kv_heads, page_size, width)

    def struct(shape: tuple[int, ...], dtype, where: Any = sharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    where: Any = pool_format(sharding) if row_major else sharding
    pool: Any = struct(shape, dtype, where)
    if is_quantised(dtype):
        where = KvPages(where, pool_format(sharding, ndim=5))
        pool = KvPages(pool, struct((*shape[:2], 2, *shape[3:5]), jnp.float32, where.scales))
        dtype = jnp.bfloat16
    q = struct((tokens, model.heads, model.head_dim), dtype)
    k = struct((tokens, model.kv_heads, model.head_dim), dtype)
    per_row = struct((rows,), jnp.int32)
    table = struct((rows, context // page_size), jnp.int32)

    def layer_of_step(pool, q, k, v, batch):
        pool = kv_write(pool, k, v, batch, layer=1)
        scale = model.head_dim**-0.5
        return pool, paged_attention(q, pool, batch, layer=1, scale=scale, **options)

    program = jax.jit(layer_of_step, donate_argnums=0, out_shardings=(where, None))
    traced_for = AbstractDevice(device.device_kind, device.num_cores, platform="tpu")
    mesh = AbstractMesh((), (), abstract_device=traced_for if tell_chip else None)
    with use_abstract_mesh(mesh):
        traced = program.trace(pool, q, k, k, PagedBatch(per_row, per_row, per_row, table))
        return traced.lower(lowering_platforms=("tpu",)).compile(), pool


def copies_of(pool: jax.ShapeDtypeStruct, program: Compiled) -> list[str]:
    """Operations that make an array of the pool's shape, other than our two kernels' aliases."""
    shape = ",".join(map(str, pool.shape))
    made = re.findall(rf"= \S*\[{shape}\]\S* ([\w-]+)\(", program.as_text() or "")
    return [operation for operation in made if operation not in ("parameter", "custom-call")]


def check(program: Compiled, pool: jax.ShapeDtypeStruct, *, padding: int) -> None:
    """The pool is updated in place, and takes `padding` times its logical size."""
    memory = program.memory_analysis()
    assert memory is not None
    nbytes = pool.size * pool.dtype.itemsize * padding
    assert memory.alias_size_in_bytes == nbytes
    assert memory.temp_size_in_bytes < nbytes / 100
    assert not copies_of(pool, program)
    assert (program.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("chip", "model", "batch", "page_size"), PAIRS)
def test_compiles_and_updates_the_pool_in_place(
    chip: str, model: AttentionShape, batch: str, page_size: int
):
    """With heads of 64, K and V lie side by side, and nothing is padding."""
    joined = model.head_dim == 64
    program, pool = compile_both(chip, model, batch, page_size, joined=joined)
    check(program, pool, padding=1)


def test_heads_of_64_apart_take_twice_their_size():
    program, pool = compile_both("v5e", MODEL_SHAPES[0], "decode", 16)
    check(program, pool, padding=2)


@pytest.mark.parametrize(
    ("chip", "model", "options"),
    [
        ("v4", MODEL_SHAPES[1], {"dtype": jnp.float32}),
        ("v5e", MODEL_SHAPES[3], {"dtype": jnp.float32, "soft_cap": 30.0}),
        ("v5e", MODEL_SHAPES[4], {"soft_cap": 50.0, "return_lse": True}),
        ("v6e", MODEL_SHAPES[2], {"sliding_window": 1024, "tell_chip": False}),
        ("tpu7x", AttentionShape("Llama-3.1-8B, an eighth", 4, 1, 128), {"sliding_window": 77}),
    ],
)
def test_options_compile(chip: str, model: AttentionShape, options: dict):
    program, pool = compile_both(chip, model, "mixed", 32, **options)
    check(program, pool, padding=1)


@pytest.mark.parametrize(
    ("chip", "model", "page_size", "dtype"),
    [
        ("v5e", MODEL_SHAPES[0], 64, jnp.int8), ("v6e", MODEL_SHAPES[1], 128, jnp.float8_e4m3fn),
        ("v5p", MODEL_SHAPES[4], 32, jnp.float8_e4m3fn), ("tpu7x", MODEL_SHAPES[2], 64, jnp.int8),
    ],
)  # fmt: skip
def test_a_quantised_pool_is_updated_in_place(
    chip: str, model: AttentionShape, page_size: int, dtype: Any
):
    """Lanes of scales are padded up to 128 slots, and their heads up to 8."""
    program, pool = compile_both(chip, model, "mixed", page_size, dtype=dtype)
    memory = program.memory_analysis()
    assert memory is not None
    rows = pool.values.size // model.head_dim
    values = rows * max(model.head_dim, 128)
    assert memory.alias_size_in_bytes >= values + 4 * rows
    assert memory.alias_size_in_bytes <= values + 4 * rows * (128 / page_size) * (8 / 3)
    assert memory.temp_size_in_bytes < values / 20
    assert not copies_of(pool.values, program)
    assert (program.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("model", MODEL_SHAPES[:2])
def test_temporary_memory_does_not_grow_with_the_pool(model: AttentionShape):
    def temporary(pool_bytes: int) -> int:
        program, _ = compile_both("v5e", model, "decode", 16, pool_bytes=pool_bytes)
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(5 * 2**29) <= temporary(2**28) + 2**16


def test_xla_s_own_layout_for_head_dim_64_would_copy_the_pool():
    """Why there is `pool_format`; and that the test for copies finds some."""
    program, pool = compile_both("v5e", MODEL_SHAPES[0], "decode", 16, row_major=False)
    assert copies_of(pool, program)
    program, pool = compile_both("v5e", MODEL_SHAPES[1], "decode", 16, row_major=False)
    check(program, pool, padding=1)


def test_the_largest_page_table_fits_scalar_memory(monkeypatch: pytest.MonkeyPatch):
    rows, width = 225, 1024
    assert 4 * rows * width == MAX_TABLE_BYTES
    monkeypatch.setitem(BATCHES, "largest", (256, rows))
    for chip in ("v4", "tpu7x"):
        compile_both(chip, MODEL_SHAPES[3], "largest", 16, context=width * 16)
