"""What a runner keeps on its devices is laid out as its programs expect it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from jaxserve.parallel.mesh import make_mesh, shard_model
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.device_runner import _zeros
from jaxserve.runner.program_cache import CompileWatch
from tests.runner.test_memory import model_config


@pytest.mark.parametrize(("order", "programs"), [(None, 0), ((0, 1, 2), 0), ((2, 0, 1), 1)])
def test_zeros(order: tuple[int, ...] | None, programs: int):
    """Only a layout that is not the device's own takes a program."""
    _, rules = shard_model(model_config("llama"), make_mesh("data=2"))
    sharding = rules.sharding("data")
    placed = sharding if order is None else Format(Layout(order), sharding)
    counter = CompileCounter()
    watch = CompileWatch(counter)
    zeros = _zeros(jax.ShapeDtypeStruct((4, 3, 5), jnp.int32, sharding=placed))
    watch.close()
    assert zeros.sharding == sharding
    layout = zeros.format.layout  # type: ignore
    assert isinstance(layout, Layout)
    assert layout.major_to_minor == (order or (0, 1, 2))
    np.testing.assert_array_equal(np.asarray(zeros), np.zeros((4, 3, 5)))
    assert counter.before_ready == programs
