"""How calls are timed, and what the device can do at most."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.workloads import Inputs, pool_formats
from pallas_kernels.kv_pages import KvPool
from pallas_kernels.paged_batch import PagedBatch

TIMING_SECONDS = 0.02  # of one timing at least: the clock and the wait at its end vanish in it
MAX_CALLS = 1000


class Limits(NamedTuple):
    """What was measured on this device.

    Attributes:
        bandwidth: bytes per second of a copy, read and written ones together.
        rate: FLOPs per second of a matrix product.
    """

    bandwidth: float
    rate: float


def describe(limits: Limits, dtype: Any) -> str:
    """The device and its limits, in a line.

    Args:
        limits: what `measure_limits` gave.
        dtype: of the product whose rate it is.
    """
    device = jax.devices()[0]
    return (
        f"{device.device_kind} ({device.platform}), JAX {jax.__version__}, "
        f"{jnp.dtype(dtype).name}: copies {limits.bandwidth / 1e9:.4g} GB/s, "
        f"multiplies {limits.rate / 1e12:.3g} TFLOP/s"
    )


def calls_in_program() -> int:
    """Calls of a kernel in one program.

    A step has one for each layer. Several hide what an accelerator's host takes to start a
    program; a CPU's calls take longer than that.
    """
    return 1 if jax.default_backend() == "cpu" else 8


def seconds_per_call(
    advance: Callable[[Any], Any], state: Any, *, repeats: int, wait: Callable[[Any], Any]
) -> float:
    """Median time of a call after warm-up.

    Args:
        advance: the call: takes a state, starts the work and returns the next state.
        state: the first one.
        repeats: timings; each of so many calls that it takes TIMING_SECONDS.
        wait: waits for a state.
    """

    def timing(calls: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(calls):
            state = advance(state)
        wait(state)
        return (time.perf_counter() - began) / calls

    timing(1)  # compiles
    calls = int(min(max(TIMING_SECONDS / timing(1), 1), MAX_CALLS))
    timing(calls)
    return statistics.median(timing(calls) for _ in range(repeats))


def time_attention(call: Callable[..., jax.Array], inputs: Inputs, *, repeats: int) -> float:
    """Seconds of one attention over pages.

    Several calls in a program read one layer and take one another's output as queries: equal
    ones would be computed once. All that the program works on are its arguments.

    Args:
        call: (q, kv_pages, batch) -> [tokens, heads, head_dim].
        inputs: the workload's.
        repeats: as for `seconds_per_call`.
    """
    count = calls_in_program()

    @jax.jit
    def program(q: jax.Array, kv_pages: KvPool, batch: PagedBatch) -> jax.Array:
        for _ in range(count):
            q = call(q, kv_pages, batch)
        return q

    def advance(_: Any) -> jax.Array:
        return program(inputs.q, inputs.kv_pages, inputs.batch)

    return seconds_per_call(advance, None, repeats=repeats, wait=jax.block_until_ready) / count


def time_kv_write(call: Callable[..., KvPool], inputs: Inputs, *, repeats: int) -> float:
    """Seconds of one write into a donated pool; `inputs.kv_pages` itself stays as it is.

    Args:
        call: (kv_pages, k, v, batch) -> kv_pages.
        inputs: the workload's.
        repeats: as for `seconds_per_call`.
    """
    count = calls_in_program()
    row_major = pool_formats(inputs.kv_pages)  # out of the program as into it

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=row_major)
    def program(kv_pages: KvPool, k: jax.Array, v: jax.Array, batch: PagedBatch) -> KvPool:
        for _ in range(count):
            kv_pages = call(kv_pages, k, v, batch)
            k, v = v, k  # a write of the same once more could be left out
        return kv_pages

    def advance(pool: KvPool) -> KvPool:
        return program(pool, inputs.k, inputs.v, inputs.batch)

    pool = jax.device_put(inputs.kv_pages, row_major, may_alias=False)
    return seconds_per_call(advance, pool, repeats=repeats, wait=jax.block_until_ready) / count


def measure_limits(dtype: Any, *, repeats: int) -> Limits:
    """The copy bandwidth and the rate of a large matrix product, here and now.

    The copy reads and writes; what mostly reads can be somewhat faster than it.

    Args:
        dtype: of the product's operands.
        repeats: as for `seconds_per_call`.
    """
    on_cpu = jax.default_backend() == "cpu"
    words, size = (2**27, 768) if on_cpu else (2**28, 8192)
    keys = jax.random.split(jax.random.key(1), 3)

    # Far larger than caches; in place, as fresh memory costs a CPU page faults.
    bits = jax.random.bits(keys[0], (words,), jnp.uint32)
    copied = 2 * bits.nbytes
    copy = jax.jit(jnp.invert, donate_argnums=0)
    seconds = seconds_per_call(copy, bits, repeats=repeats, wait=jax.block_until_ready)
    bandwidth = copied / seconds

    a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys[1:])
    multiply = jax.jit(jnp.dot)
    seconds = seconds_per_call(
        lambda _: multiply(a, b), None, repeats=repeats, wait=jax.block_until_ready
    )
    return Limits(bandwidth, 2 * size**3 / seconds)
