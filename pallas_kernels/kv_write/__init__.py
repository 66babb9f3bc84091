"""Writing a step's new K and V rows into their pages."""

import jax

from pallas_kernels import jax_compat
from pallas_kernels.kv_pages import KvPool, check_scales
from pallas_kernels.kv_write import reference, tpu, xla
from pallas_kernels.paged_batch import PagedBatch


def resolve_implementation(implementation: str) -> str:
    """The implementation that a name stands for on this machine.

    Raises:
        ValueError: there is no implementation of that name.
    """
    auto = "xla" if jax_compat.tpu_kind() is None else "tpu"
    names = {"auto": auto, "tpu": "tpu", "xla": "xla", "reference": "reference"}
    if implementation not in names:
        raise ValueError(f"no KV write {implementation!r}; there are {', '.join(names)}")
    return names[implementation]


def kv_write(
    kv_pages: KvPool,
    k: jax.Array,
    v: jax.Array,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    implementation: str = "auto",
) -> KvPool:
    """Store one layer's new keys and values; in place when `kv_pages` is donated.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim]; with scales, see `KvPages`.
        k: [tokens, kv_heads, head_dim]; rounded to the pool's type, or quantised by token and head.
        v: [tokens, kv_heads, head_dim], likewise.
        batch: which token goes to which position of which page table row.
        layer: index on the pool's first axis.
        implementation: "auto" picks the fastest for the platform; a named one is used or fails.

    Returns:
        `kv_pages` with the rows of real tokens replaced; padding tokens write nothing.

    Raises:
        ValueError: unknown implementation, or one that does not take the pool.
    """
    check_scales(kv_pages)
    implementations = {
        "tpu": tpu.kv_write,
        "xla": xla.kv_write,
        "reference": reference.kv_write,
    }
    write = implementations[resolve_implementation(implementation)]
    return write(kv_pages, k, v, batch, layer=layer)
