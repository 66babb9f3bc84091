"""Running TPU kernels in JAX's TPU interpreter, with everything that it can find fault with."""

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # nothing public tells of races
from jax.experimental.pallas import tpu as pltpu


def strict(num_cores: int = 1) -> pltpu.InterpretParams:
    """Races are looked for, memory starts as NaN, and accesses out of bounds raise."""
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=num_cores,
    )


def assert_no_race(*results: jax.Array) -> None:
    """Fail if the kernel that made `results`, the last one that ran, had a race.

    From JAX 0.12 on the kernel itself raises a RuntimeError that says where; before, this does.
    """
    jax.block_until_ready(results)
    races = interpret_pallas_call.races
    assert races is not None, "no kernel has run with race detection"
    assert not races.races_found, "the kernel had a race"
