"""Mesh options, and which axes of which model they split."""

from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh, parse_mesh


def config(**sizes: int) -> ModelConfig:
    shape: dict[str, Any] = (
        dict(vocab_size=64, intermediate_size=48, num_heads=8, num_kv_heads=4) | sizes
    )
    return ModelConfig(
        family="llama", name="m", hidden_size=16, num_layers=1, head_dim=4, max_model_len=32,
        norm_eps=1e-5, rope_theta=1e4, **shape,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (1, 1)),
        ("data=2", (2, 1)),
        ("tensor=4", (1, 4)),
        ("data=2,tensor=4", (2, 4)),
        (" tensor=4 , data=2 ", (2, 4)),
    ],
)
def test_parse(text: str, sizes: tuple[int, int]):
    assert parse_mesh(text) == dict(zip(("data", "tensor"), sizes, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "tensor",
        "tensor=",
        "tensor=0",
        "tensor=-1",
        "expert=2",
        "data=2,data=2",
        "2x4",
        "tensor=two",
    ],
)
def test_malformed(text: str):
    with pytest.raises(ConfigError, match="--mesh must look like data=D,tensor=T"):
        parse_mesh(text)


def test_too_few_devices():
    with pytest.raises(ConfigError, match=r"data=4,tensor=4 needs 16 devices.* has 8 \(cpu\)"):
        make_mesh("data=4,tensor=4")


def test_make_mesh():
    mesh = make_mesh("data=2,tensor=4")
    assert mesh.shape == {"data": 2, "tensor": 4}
    assert mesh.devices.ravel().tolist() == jax.devices()[:8]
    assert make_mesh("tensor=2").size == 2


def test_everything_divides():
    model, rules = shard_model(config(), make_mesh("data=2,tensor=4"))
    assert model == config()
    assert rules.split == {"vocab", "mlp", "kv_heads"}
    assert rules.spec(("vocab", None)) == PartitionSpec("tensor", None)
    assert rules.spec(("data", "kv_heads", None)) == PartitionSpec("data", "tensor", None)
    assert (rules.data, rules.tensor) == (2, 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "runs_with", "split"),
    [
        (8, 1, 4, 4, True),  # one KV head for each shard
        (8, 2, 4, 4, True),
        (9, 3, 2, 3, False),  # SmolLM2: heads do not divide
        (6, 2, 4, 2, False),  # nor can two query heads be split in four
        (12, 3, 4, 3, False),  # 4 is no multiple of 3
        (4, 4, 8, 4, False),  # more shards than heads
    ],
)
def test_kv_heads(heads: int, kv_heads: int, tensor: int, runs_with: int, split: bool):
    model, rules = shard_model(
        config(num_heads=heads, num_kv_heads=kv_heads), make_mesh(f"tensor={tensor}")
    )
    assert model.num_kv_heads == runs_with
    assert model.num_heads == heads
    assert ("kv_heads" in rules.split) == split


def test_what_does_not_divide_is_replicated(caplog: pytest.LogCaptureFixture):
    _, rules = shard_model(config(vocab_size=63, intermediate_size=46), make_mesh("tensor=4"))
    assert rules.split == {"kv_heads"}
    assert "vocab: 63 does not divide by tensor=4" in caplog.text
    assert "mlp: 46 does not divide by tensor=4" in caplog.text


def test_one_device_splits_nothing():
    _, rules = shard_model(config(), make_mesh(""))
    assert rules.split == frozenset()
    assert rules.spec(("vocab", None)) == PartitionSpec(None, None)
