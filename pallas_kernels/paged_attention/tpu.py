"""Paged attention for TPUs (Pallas, Mosaic TPU): prefill chunks and decode rows in one call.

`tpu_body` holds what one program does; this file, how the call is made. The grid runs over blocks
of consecutive query tokens, whoever's they are. Queries and outputs keep their layout
[tokens, heads, head_dim] in HBM (a transposition there would cost as much as a short prefill's
attention); the pool stays in HBM and is read page by page. Where a chip is one device with two
TensorCores (v4 and v5p as "megacore"), the cores take query blocks in turn.

Memory: Pallas wants the pool row-major, which XLA chooses by itself for head_dim 128 and 256. For
head_dim 64 it does not: it makes the pages the minor axis, to fill its lanes of 128, and would
copy the pool to row-major and back in every step. Hold the pool in `paged_batch.pool_format`, into
and out of every program, and, with head_dim 64, with K and V side by side
(`kv_pages.pool_parts`): they fill the lanes, half of which would be padding otherwise, in HBM and
in what is read. Queries are padded, which costs nothing: they fill whole lanes anyway.
Small pages cost as well: each one is a copy to be issued, and 16 slots of one bfloat16 KV head
with head_dim 128 are only 8 KiB. Pages of 64 or 128 slots suit a TPU better.

Compiled for v4, v5e, v5p, v6e and tpu7x and run in the interpreter; not yet run on a device.

Techniques: PagedAttention (Kwon et al., SOSP 2023), FlashAttention's online softmax (Dao et al.,
2022), ragged batches in one call as in JAX's `ragged_paged_attention` and vLLM's TPU backend.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import jax_compat
from pallas_kernels.kv_pages import KvPages, KvPool, head_dim_of, is_joined, is_quantised
from pallas_kernels.paged_attention import tuning
from pallas_kernels.paged_attention.tpu_body import Program, Rules, Scalars, Scratch, run
from pallas_kernels.paged_batch import PagedBatch
from pallas_kernels.tpu_layout import LANES, tile_rows

MAX_TABLE_BYTES = 900 * 2**10  # of 1 MiB of scalar memory on every TPU since v4


def paged_attention(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
    block_sizes: tuning.BlockSizes | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`pallas_kernels.paged_attention.paged_attention` as a Pallas kernel for TPUs.

    Args:
        interpret: run in the TPU interpreter, on any platform.
        block_sizes: instead of those from the tuning table.

    Raises:
        ValueError: shapes or dtypes that the kernel is not made for.
    """
    _check(q, kv_pages, batch)
    call = functools.partial(
        _call, kv_pages=kv_pages, batch=batch, layer=layer, scale=scale,
        sliding_window=sliding_window, soft_cap=soft_cap, return_lse=return_lse,
        interpret=interpret, block_sizes=block_sizes,
    )  # fmt: skip
    if not is_joined(kv_pages):
        outs = call(q)
    else:
        # Zeros meet V when scores are made; of the weighted sums, those of K are not wanted.
        head_dim = q.shape[2]
        outs = call(jnp.pad(q, ((0, 0), (0, 0), (0, head_dim))))
        outs[0] = outs[0][..., head_dim:]
    return (outs[0], outs[1][..., 0]) if return_lse else outs[0]


def _call(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | jax.Array | None,
    soft_cap: float | None,
    return_lse: bool,
    interpret: bool | pltpu.InterpretParams,
    block_sizes: tuning.BlockSizes | None,
) -> list[jax.Array]:
    """The kernel's outputs: of q's shape, whose heads are as wide as the pool's last axis."""
    num_tokens, heads, head_dim = q.shape
    kv_heads, page_size = kv_pages.shape[3:5]
    chip, cores = jax_compat.tpu_kind(), jax_compat.tpu_core_count()
    shape = tuning.Shape(heads, kv_heads, head_dim, page_size, kv_pages.dtype)
    sizes = block_sizes or tuning.lookup(chip, shape)
    # Every core gets a block, if there are tokens enough.
    share = -(-pl.cdiv(num_tokens, cores) // 8) * 8
    query_tokens = min(sizes.query_tokens, share, num_tokens)
    cores = min(cores, pl.cdiv(num_tokens, query_tokens))
    rules = Rules(
        scale=scale,
        soft_cap=soft_cap,
        windowed=sliding_window is not None,
        query_tokens=query_tokens,
        pages_per_block=sizes.pages_per_block,
        pages_per_chunk=sizes.pages_per_chunk,
        cores=cores,
    )
    steps = pl.cdiv(pl.cdiv(num_tokens, query_tokens), cores)
    scalars = _make_scalars(
        batch, layer, sliding_window, query_tokens, num_blocks=(steps + 1) * cores
    )

    def block(*minor: int) -> pl.BlockSpec:
        def index(core: Any, step: Any, call: Any, *_: Any) -> tuple:
            # Behind the last real token a core stays at its last block: there is nothing to copy.
            # At its own: what it leaves there is written back.
            last_step = lax.div(jnp.maximum(call[3] - 1 - core, 0), cores)
            return jnp.minimum(step, last_step) * cores + core, 0, 0

        return pl.BlockSpec((query_tokens, *minor), index)

    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if return_lse:  # the same in every lane: a column would have to be turned into a row
        out_shape.append(jax.ShapeDtypeStruct((num_tokens, heads, LANES), jnp.float32))
    pools = jax.tree.leaves(kv_pages)  # values, and scales of a quantised one
    outs = pl.pallas_call(
        functools.partial(_kernel, rules, return_lse, len(pools)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=[block(heads, head_dim), *[pl.BlockSpec(memory_space=pl.ANY) for _ in pools]],
            out_specs=[block(*shape.shape[1:]) for shape in out_shape],
            scratch_shapes=[each for each in _make_scratch(q, kv_pages, rules) if each is not None],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tuning.vmem_limit(chip),
        ),
        interpret=interpret,
        name="paged_attention",
    )(*scalars, q, *pools)
    return list(outs)


def refusal(shape: tuning.Shape) -> str | None:
    """Why the kernel does not take a shape, or None if it does."""
    queries = shape.dtype if shape.query_dtype is None else shape.query_dtype
    for dtype, are_pages in ((jnp.dtype(shape.dtype), True), (jnp.dtype(queries), False)):
        # Pages are multiplied in the queries' type, codes too.
        is_code = are_pages and is_quantised(dtype)
        if dtype not in (jnp.float32, jnp.bfloat16) and not is_code:
            return f"it takes float32 or bfloat16, not {dtype.name}"
        tile = tile_rows(dtype)
        if shape.page_size % tile:
            return (
                f"it takes pages of a multiple of {tile} slots of {dtype.name}, not "
                f"{shape.page_size}"
            )
    return None


def _check(q: jax.Array, kv_pages: KvPool, batch: PagedBatch) -> None:
    """Refuse with a ValueError what would fail later, or worse, not fail."""
    kv_heads, page_size = kv_pages.shape[3:5]
    heads, head_dim = q.shape[1], head_dim_of(kv_pages)
    if q.shape[2] != head_dim or heads % kv_heads:
        raise ValueError(f"queries {q.shape} do not fit {kv_heads} KV heads of size {head_dim}")
    shape = tuning.Shape(heads, kv_heads, head_dim, page_size, kv_pages.dtype, q.dtype)
    if (reason := refusal(shape)) is not None:
        raise ValueError(f"paged attention on TPU: {reason}")
    table_bytes = 4 * batch.page_table.size
    if table_bytes > MAX_TABLE_BYTES:
        raise ValueError(
            f"a page table of {batch.page_table.shape} takes {table_bytes} bytes of scalar "
            f"memory, and there are {MAX_TABLE_BYTES} for it: take larger pages or fewer rows"
        )


def _make_scalars(
    batch: PagedBatch,
    layer: int | jax.Array,
    sliding_window: int | jax.Array | None,
    query_tokens: int,
    num_blocks: int,
) -> Scalars:
    """What goes to scalar memory. All layers of a step make the same; XLA keeps one of them."""
    real = batch.query_len > 0
    ends = batch.query_start + batch.query_len
    begins = jnp.arange(num_blocks, dtype=jnp.int32) * query_tokens
    num_rows = jnp.sum(real, dtype=jnp.int32)
    num_tokens = jnp.max(jnp.where(real, ends, 0))
    window = 0 if sliding_window is None else sliding_window
    call = (layer, window, num_rows, pl.cdiv(num_tokens, query_tokens))
    return Scalars(
        call=jnp.stack([jnp.asarray(x, jnp.int32) for x in call]),
        first_row=jnp.sum(real & (ends <= begins[:, None]), axis=1, dtype=jnp.int32),
        start=batch.query_start,
        length=batch.query_len,
        context=batch.context_len,
        table=batch.page_table.reshape(-1),
    )


def _make_scratch(q: jax.Array, kv_pages: KvPool, rules: Rules) -> Scratch:
    """The shapes of the kernel's own memory."""
    heads, head_dim = q.shape[1:]
    kv_heads, page_size = kv_pages.shape[3:5]
    rows = rules.query_tokens * (heads // kv_heads)
    block = rules.pages_per_block * page_size
    scales = None
    if isinstance(kv_pages, KvPages):
        each = (2, rules.pages_per_block, 2, kv_heads, page_size)
        scales = pltpu.VMEM(each, kv_pages.scales.dtype)
    return Scratch(
        kv=pltpu.VMEM((2, kv_pages.shape[2], kv_heads, block, head_dim), kv_pages.dtype),
        semaphores=pltpu.SemaphoreType.DMA((2,)),
        slot=pltpu.SMEM((1,), jnp.int32),
        out=pltpu.VMEM((rules.query_tokens, heads, head_dim), jnp.float32),
        token_state=pltpu.VMEM((2, heads, LANES), jnp.float32),
        token_acc=pltpu.VMEM((heads, head_dim), jnp.float32),
        tile_q=pltpu.VMEM((kv_heads, rows, head_dim), q.dtype),
        tile_state=pltpu.VMEM((2, kv_heads, rows, LANES), jnp.float32),
        tile_acc=pltpu.VMEM((kv_heads, rows, head_dim), jnp.float32),
        scales=scales,
    )


def _kernel(rules: Rules, return_lse: bool, num_pools: int, *refs: Any) -> None:
    """One program: scalars, q, pool, scales if any | out, lse if asked for | scratch."""
    scalars, q, rest = Scalars(*refs[:6]), refs[6], refs[7:]
    pool, scales = (*rest[:num_pools], None)[:2]
    out, *rest = rest[num_pools:]
    lse = rest[0] if return_lse else None
    scratch = Scratch(*rest[int(return_lse) :])
    core, step = pl.program_id(0), pl.program_id(1)
    program = Program(rules, scalars, scratch, step * rules.cores + core, q, lse, pool, scales)

    @pl.when(program.block < scalars.call[3])
    def _() -> None:
        run(program, step == 0)
        out[...] = scratch.out[...].astype(out.dtype)
