"""Products over a mesh: every shard multiplies its own part, and sums are made once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.models.backend import KernelBackend
from jaxserve.models.weights import axes_of
from jaxserve.parallel.mesh import ShardingRules, make_mesh
from jaxserve.runner.collectives import collectives
from pallas_kernels.linear import linear
from pallas_kernels.weights import Format, quantise

FORMATS = [
    None,
    Format("int8"),
    Format("int8", 32, "float16"),
    Format("int4", 32, "float16", has_minimums=True),
    Format("int6", 16, "bfloat16"),
    Format("fp8"),
]
COLUMN, ROW = ("mlp", None), (None, "mlp")  # what a weight [out, in] is split by


def backend(mesh: str, implementation: str, activations: Any = "float") -> KernelBackend:
    rules = ShardingRules(make_mesh(mesh), frozenset({"mlp"}))
    return KernelBackend(
        rules, "xla", linear_implementation=implementation, activations=activations
    )


def placed(weight: Any, axes: tuple[str | None, ...], rules: ShardingRules) -> nnx.Param:
    arrays = jax.tree.map(
        lambda a: jax.device_put(a, rules.sharding(*axes_of(a, weight, axes))), weight
    )
    return nnx.Param(arrays, axes=axes)


@pytest.mark.parametrize("axes", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_product_is_that_of_one_device(
    format: Format | None, implementation: str, axes: tuple[str | None, ...]
) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 256), np.float32)
    array = rng.standard_normal((44, 256), np.float32)
    weight = jnp.asarray(array) if format is None else quantise(jnp.asarray(array), format)
    expected = linear(jnp.asarray(x), weight, implementation="reference")
    on = backend("data=2,tensor=2", implementation)
    param = placed(weight, axes, on.rules)
    given = jax.device_put(x, on.rules.sharding("data", axes[-1]))
    run = jax.jit(on.linear).lower(given, param).compile()
    np.testing.assert_allclose(run(given, param), expected, rtol=1e-5, atol=2e-5)
    found = [(one.kind, one.size) for one in collectives(run)]
    if axes == ROW:
        assert found == [("all-reduce", 6 // on.rules.data * 44)]
    else:
        assert found == []


def test_activations_in_int8() -> None:
    """Groups lie within shards, so that what each rounds is what one device rounds."""
    rng, format = np.random.default_rng(3), Format("int4", 32, "float16")
    x = rng.standard_normal((5, 256), np.float32)
    weight = quantise(jnp.asarray(rng.standard_normal((44, 256), np.float32)), format)
    expected = linear(jnp.asarray(x), weight, implementation="reference", activations="int8")
    on = backend("tensor=4", "cpu", "int8")
    param = placed(weight, ROW, on.rules)
    np.testing.assert_allclose(jax.jit(on.linear)(x, param), expected, rtol=1e-5, atol=2e-5)
