"""Which implementation of paged attention runs where, and what a name that cannot run gets."""

import logging
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import Shape, choose_implementation, paged_attention

LLAMA = Shape(heads=32, kv_heads=8, head_dim=128, page_size=64, dtype=jnp.bfloat16)
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")


@pytest.mark.parametrize(
    ("device", "changes", "chosen"),
    [
        (CPU, {}, "cpu"),
        (CPU, {"dtype": jnp.float16}, "xla"),
        (TPU, {}, "tpu"),
        (TPU, {"dtype": jnp.float32}, "tpu"),
        (TPU, {"page_size": 8}, "xla"),  # no whole tile of bfloat16
        (H200, {}, "gpu"),
        (H200, {"dtype": jnp.float32}, "xla"),
        (H200, {"head_dim": 96}, "xla"),
        (A100, {}, "xla"),
        (CPU, {"query_dtype": jnp.float32}, "cpu"),
        (TPU, {"query_dtype": jnp.float32}, "tpu"),
        (TPU, {"dtype": jnp.float32, "query_dtype": jnp.bfloat16, "page_size": 8}, "xla"),
        (H200, {"query_dtype": jnp.bfloat16}, "gpu"),
        (H200, {"query_dtype": jnp.float32}, "xla"),
        (CPU, {"dtype": jnp.float8_e4m3fn, "query_dtype": jnp.float32}, "cpu"),
        (TPU, {"dtype": jnp.int8, "query_dtype": jnp.bfloat16}, "tpu"),
        (TPU, {"dtype": jnp.int8, "query_dtype": jnp.bfloat16, "page_size": 16}, "xla"),
        (TPU, {"dtype": jnp.int8, "query_dtype": jnp.int8}, "xla"),
        (H200, {"dtype": jnp.int8, "query_dtype": jnp.bfloat16}, "xla"),
    ],
)
def test_auto(device: Any, changes: dict, chosen: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert choose_implementation("auto", device, LLAMA._replace(**changes)) == chosen
    said = [record for record in caplog.records if "instead of the" in record.getMessage()]
    assert len(said) == (chosen == "xla"), "one line says so, or none"


def test_a_name_never_stands_for_another():
    for device in (CPU, TPU, H200, A100):
        for name in ("xla", "reference"):
            assert choose_implementation(name, device, LLAMA) == name
    assert choose_implementation("tpu", TPU, LLAMA) == "tpu"
    assert choose_implementation("cpu", CPU, LLAMA) == "cpu"
    assert choose_implementation("gpu", H200, LLAMA) == "gpu"
    for name, device, changes, message in [
        ("tpu", CPU, {}, "takes a TPU, and this is cpu"),
        ("cpu", TPU, {}, "takes a CPU, and this is tpu"),
        ("cpu", CPU, {"dtype": jnp.float16}, "int8 or float8_e4m3fn, not float16"),
        ("gpu", CPU, {}, "takes an NVIDIA GPU, and this is cpu"),
        ("gpu", A100, {}, "NVIDIA A100 has 8.0"),
        ("gpu", H200, {"dtype": jnp.float32}, "not float32"),
        ("gpu", H200, {"query_dtype": jnp.float32}, "one dtype, not float32 and bfloat16; give"),
        ("gpu", H200, {"dtype": jnp.float8_e4m3fn}, "no quantised KV pages such as float8_e4m3fn"),
        ("tpu", TPU, {"page_size": 24}, "multiple of 16 slots"),
        ("magic", TPU, {}, "no paged attention 'magic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_implementation(name, device, LLAMA._replace(**changes))


def test_the_function_knows_no_other_names():
    q, pool = jnp.zeros((1, 2, 8)), jnp.zeros((1, 1, 2, 1, 4, 8))
    with pytest.raises(ValueError, match="no paged attention 'magic'"):
        paged_attention(q, pool, None, layer=0, scale=1.0, implementation="magic")  # type: ignore[arg-type]
