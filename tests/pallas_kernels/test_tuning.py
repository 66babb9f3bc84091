"""Block sizes of the TPU kernel: the table, and what is used where it has no entry."""

import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import tuning
from pallas_kernels.shapes import MODEL_SHAPES

LLAMA = tuning.Shape(heads=32, kv_heads=8, head_dim=128, page_size=16, dtype=jnp.bfloat16)
CHIPS = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", None]


def test_an_entry_is_used_for_its_chip_and_shape_only(monkeypatch: pytest.MonkeyPatch):
    name = "TPU v6 lite|heads=32|kv_heads=8|head_dim=128|page_size=16|bfloat16"
    entry = {"query_tokens": 24, "pages_per_block": 6, "pages_per_chunk": 3}
    monkeypatch.setattr(tuning, "load_table", lambda: {name: entry})
    assert tuning.lookup("TPU v6 lite", LLAMA) == (24, 6, 3)
    others = [
        ("TPU v5 lite", LLAMA),
        (None, LLAMA),
        ("TPU v6 lite", LLAMA._replace(page_size=32)),
        ("TPU v6 lite", LLAMA._replace(dtype=jnp.float32)),
    ]
    for chip, shape in others:
        assert tuning.lookup(chip, shape) == tuning.heuristic(chip, shape) != (24, 6, 3)


def test_an_entry_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch):
    entry = {"query_tokens": 24, "pages_per_block": 6, "pages_per_chunk": 4}
    monkeypatch.setattr(tuning, "load_table", lambda: {tuning.key("TPU v4", LLAMA): entry})
    with pytest.raises(ValueError, match=r"tuning.json, 'TPU v4\|heads=32.*cannot be used"):
        tuning.lookup("TPU v4", LLAMA)


def test_the_table_that_we_ship_can_be_read():
    for name, entry in tuning.load_table().items():
        assert name.count("|") == 5
        sizes = tuning.BlockSizes(**entry)
        assert sizes.pages_per_block % sizes.pages_per_chunk == 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_heuristic_keeps_within_vector_memory(chip: str | None, page_size: int, dtype):
    for model in MODEL_SHAPES:
        shape = tuning.Shape(*model[1:], page_size=page_size, dtype=dtype)
        sizes = tuning.heuristic(chip, shape)
        assert min(sizes) >= 1 and sizes.pages_per_block % sizes.pages_per_chunk == 0
        limit = tuning.vmem_limit(chip) or 16 * 2**20
        assert tuning.vmem_bytes(shape, sizes) <= limit
