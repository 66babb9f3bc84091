"""That the checks which the kernels' tests rely on can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.tpu_interpreter import assert_no_race, strict


@pytest.mark.parametrize("too_early", [False, True])
def test_a_read_before_the_copy_has_arrived_is_a_race(too_early: bool):
    def kernel(source, out, buffer, semaphore):
        copy = pltpu.make_async_copy(source, buffer, semaphore)
        copy.start()
        if too_early:
            out[...] = buffer[...]
            copy.wait()
        else:
            copy.wait()
            out[...] = buffer[...]

    x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)
    copied = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=strict(),
    )
    if too_early:
        try:
            with pytest.raises((AssertionError, RuntimeError), match=r"race|RACE DETECTED"):
                out = copied(x)
                assert np.isnan(np.asarray(out)).all(), "what was read too early is not NaN"
                assert_no_race(out)
        finally:
            pltpu.reset_tpu_interpret_mode_state()  # what an interrupted kernel leaves behind
    else:
        out = copied(x)
        assert_no_race(out)
        np.testing.assert_array_equal(np.asarray(out), np.asarray(x))
