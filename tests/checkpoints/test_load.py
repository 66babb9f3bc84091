import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.checkpoints import load
from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.checkpoints.orbax import write_orbax
from jaxserve.core.errors import CheckpointError
from jaxserve.models.config_readers import from_preset
from jaxserve.models.registry import parameter_shapes, parameters_of


def load_params(checkpoint, targets) -> dict[str, Any]:
    """Weights that are all arrays."""
    return load.load_params(checkpoint, targets)


def targets(shapes, dtype=np.float32, sharding_of=lambda name: None):
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(name))
        for name, shape in shapes.items()
    }


def tensor_sharding(mesh):
    """KV heads over the mesh, the rest on every device."""
    specs = {"qkv": P("tensor"), "qkv_bias": P("tensor"), "o": P(None, "tensor")}
    return lambda name: NamedSharding(mesh, specs.get(name.rpartition(".")[2], P()))


def as_orbax(path, checkpoint):
    params = ((name, checkpoint.read(name)) for name in checkpoint.names)
    write_orbax(path, checkpoint.config, params, lambda _: None)
    return open_checkpoint(path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_default_device(make_hf, family):
    path, expected = make_hf(family)
    checkpoint = open_checkpoint(path)
    params = load_params(checkpoint, targets(parameter_shapes(checkpoint.config)))
    assert list(params) == list(parameter_shapes(checkpoint.config))
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value)
        assert params[name].devices() == {jax.devices()[0]}


@pytest.mark.parametrize("orbax", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_device_holds_its_shard(make_hf, tmp_path, orbax, dtype):
    path, expected = make_hf("qwen2")
    checkpoint = open_checkpoint(path)
    if orbax:
        checkpoint = as_orbax(tmp_path / "orbax", checkpoint)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    wanted = targets(parameter_shapes(checkpoint.config), dtype, tensor_sharding(mesh))
    params = load_params(checkpoint, wanted)
    for name, value in expected.items():
        assert params[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(params[name], value.astype(dtype))
    shards = params["layers.1.qkv"].addressable_shards
    assert [s.data.shape for s in shards] == [(1, 5, 10, 22)] * 2
    np.testing.assert_array_equal(shards[1].data, expected["layers.1.qkv"][1:].astype(dtype))
    assert {s.data.shape for s in params["layers.0.o"].addressable_shards} == {(22, 30)}


@pytest.mark.parametrize("source", ["hf", "orbax", "gguf"])
def test_repeats_kv_heads_over_more_devices(make_hf, make_gguf, tmp_path, source):
    """2 KV heads with 2 query heads each, over 4 devices: one query head and a KV copy each."""
    if source == "gguf":
        path, expected = make_gguf("qwen2", Kind.Q8_0)
    else:
        path, expected = make_hf("qwen2", even=True)
    checkpoint = open_checkpoint(path)
    if source == "orbax":
        checkpoint = as_orbax(tmp_path / "orbax", checkpoint)
    shapes = parameter_shapes(checkpoint.config)
    for n in range(2):
        shapes |= {f"layers.{n}.qkv": (4, 3, 16, 64), f"layers.{n}.qkv_bias": (4, 3, 16)}
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    params = load_params(checkpoint, targets(shapes, sharding_of=tensor_sharding(mesh)))
    for part in ("qkv", "qkv_bias"):
        old, new = expected[f"layers.1.{part}"], params[f"layers.1.{part}"]
        for shard in new.addressable_shards:
            head = shard.index[0].start
            q, k, v = np.asarray(shard.data)[0]
            np.testing.assert_array_equal(q, old[head // 2, head % 2])
            np.testing.assert_array_equal(k, old[head // 2, -2])
            np.testing.assert_array_equal(v, old[head // 2, -1])
    for shard in params["layers.1.o"].addressable_shards:
        columns = slice(shard.index[1].start, shard.index[1].start + 16)
        np.testing.assert_array_equal(np.asarray(shard.data), expected["layers.1.o"][:, columns])


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3]))
def test_every_query_head_keeps_its_key(kv_heads, new_group, repeats):
    group = new_group * repeats
    old = np.arange(kv_heads * (group + 2) * 5).reshape(kv_heads, group + 2, 5)
    config = dataclasses.replace(
        from_preset("smollm2-135m"), num_heads=kv_heads * group, num_kv_heads=kv_heads
    )
    qkv = parameters_of(config)["layers.0.qkv"]
    parts = zip(qkv.repeats, qkv.split(old), strict=True)
    new = qkv.join([repeat(part, repeats) for repeat, part in parts])
    assert new.shape == (kv_heads * repeats, new_group + 2, 5)
    for head in range(kv_heads * group):
        was, now = old[head // group], new[head // new_group]
        np.testing.assert_array_equal(now[head % new_group], was[head % group])
        np.testing.assert_array_equal(now[-2:], was[-2:])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.qkv", (4, 3, 10, 22)),  # 3 query heads cannot be dealt out to 2 copies
        ("layers.0.qkv", (2, 5, 10, 21)),
        ("layers.0.o", (22, 59)),
        ("layers.0.down", (29, 22)),
        ("embed", (74, 11)),
    ],
)
@pytest.mark.parametrize("orbax", [False, True])
def test_wrong_shape(make_hf, tmp_path, name, shape, orbax):
    checkpoint = open_checkpoint(make_hf("llama")[0])
    if orbax:
        checkpoint = as_orbax(tmp_path / "orbax", checkpoint)
    shapes = parameter_shapes(checkpoint.config) | {name: shape}
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_params(checkpoint, targets(shapes))


def test_names_must_match(make_hf):
    checkpoint = open_checkpoint(make_hf("llama")[0])
    shapes = parameter_shapes(checkpoint.config)
    with pytest.raises(CheckpointError, match="lacks parameter more"):
        load_params(checkpoint, targets(shapes | {"more": (1,)}))
    shapes.pop("lm_head")
    with pytest.raises(CheckpointError, match="no place for parameter lm_head"):
        load_params(checkpoint, targets(shapes))


def test_nothing_to_open(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only \.gguf"):
        open_checkpoint(tmp_path / "x.bin")
