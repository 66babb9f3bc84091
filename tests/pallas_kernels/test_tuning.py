"""Block sizes of the kernels: the table, and what is used where it has no entry."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import jax_compat
from pallas_kernels.paged_attention import gpu, tuning
from pallas_kernels.paged_attention.gpu_tiles import GpuTiles, gpu_tiles, lookup_tiles
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


@pytest.mark.parametrize(
    "entry",
    [
        {"query_tokens": 24, "pages_per_block": 6},
        {"query_tokens": 24, "pages_per_block": 6, "pages_per_chunk": 3, "pages": 1},
        {"query_tokens": 24, "pages_per_block": 6, "pages_per_chunk": 0},
        {"query_tokens": "24", "pages_per_block": 6, "pages_per_chunk": 3},
    ],
)
def test_other_fields_and_values_are_refused(entry: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "load_table", lambda: {tuning.key("TPU v4", LLAMA): entry})
    with pytest.raises(ValueError, match=r"tuning.json, 'TPU v4\|heads=32"):
        tuning.lookup("TPU v4", LLAMA)


H100 = "NVIDIA H100 80GB HBM3"
MEASURED = dataclasses.replace(gpu_tiles(128, 132), decode_stages=5, prefill_tile=128)


def on_h100():
    """A context in which an H100 is traced for."""
    device = AbstractDevice(platform="cuda", device_kind=H100, num_cores=132)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_a_gpu_uses_its_entry_for_its_chip_and_shape_only(monkeypatch: pytest.MonkeyPatch):
    table = {tuning.key(H100, LLAMA): dataclasses.asdict(MEASURED)}
    monkeypatch.setattr(tuning, "load_table", lambda: table)
    assert lookup_tiles(H100, 132, LLAMA) == MEASURED != gpu_tiles(128, 132)
    for chip, shape in [
        ("NVIDIA H200", LLAMA),
        (None, LLAMA),
        (H100, LLAMA._replace(page_size=32)),
        (H100, LLAMA._replace(dtype=jnp.float16)),
    ]:
        assert lookup_tiles(chip, 132, shape) == gpu_tiles(128, 132)


@pytest.mark.parametrize(
    "wrong",
    [
        {"decode_tile": 96},
        {"prefill_tile": 256},
        {"prefill_warpgroups": 3},
        {"decode_stages": 0},
        {"prefill_blocks": None},
    ],
)
def test_a_gpu_entry_that_makes_no_sense_is_refused(wrong: dict, monkeypatch: pytest.MonkeyPatch):
    entry = {**dataclasses.asdict(MEASURED), **wrong}
    monkeypatch.setattr(tuning, "load_table", lambda: {tuning.key(H100, LLAMA): entry})
    with pytest.raises(ValueError, match=r"tuning.json, 'NVIDIA H100.*\|heads=32.*cannot be used"):
        lookup_tiles(H100, 132, LLAMA)


def test_the_gpu_kernel_takes_the_entry_of_the_gpu_that_is_traced_for(
    monkeypatch: pytest.MonkeyPatch,
):
    shape = LLAMA._replace(page_size=96)  # no tile of 64 is made of such pages, one of 192 is
    tiles = dataclasses.replace(MEASURED, decode_tile=192)
    table = {tuning.key(H100, shape): dataclasses.asdict(tiles)}
    monkeypatch.setattr(tuning, "load_table", lambda: table)
    assert jax_compat.gpu_kind() is None
    assert "divide 64" in (gpu.refusal(shape) or "")
    with on_h100():
        assert jax_compat.gpu_kind() == H100
        assert "divide 128" in (gpu.refusal(shape) or "")  # the prefill tile of the entry


def test_the_table_that_we_ship_can_be_read():
    for name in tuning.load_table():
        assert name.count("|") == 5
        chip, *sizes, dtype = name.split("|")
        fields = dict(size.split("=") for size in sizes)
        shape = tuning.Shape(**{k: int(v) for k, v in fields.items()}, dtype=jnp.dtype(dtype))
        assert tuning.key(chip, shape) == name
        if chip.startswith("TPU"):
            assert isinstance(tuning.lookup(chip, shape), tuning.BlockSizes)
        else:
            assert isinstance(lookup_tiles(chip, 1, shape), GpuTiles)


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
