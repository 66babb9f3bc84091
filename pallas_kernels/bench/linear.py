"""Times the linear layers of a model's step against what the device could do.

    python -m pallas_kernels.bench.linear --tokens 1 8 32

One program holds all products of all layers, one after another, as a step has them; each layer has
weights of its own, so that they come from memory. The implementations take turns; the median
counts, and the best is shown beside it. The bound is the larger of the weights' bytes by a copy's
bandwidth and the FLOPs by the rate of a large matrix product, both measured in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.bench import timing
from pallas_kernels.bench.workloads import Work
from pallas_kernels.linear import NAMES, choose_implementation, linear

SMOLLM2 = ("960x576", "576x576", "3072x576", "576x1536")  # query, key, value; output; MLP
ROW = "{:<16}{:>8}{:>10}{:>10}{:>13}{:>9}{:>10}"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench.linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128])
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=[parse_shape(s) for s in SMOLLM2],
        metavar="OUTxIN", help=f"of a layer's weights (default: {' '.join(SMOLLM2)}, SmolLM2-135M)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--implementations", nargs="+", choices=NAMES[1:],
                        help="default: XLA and every kernel that can run here")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=9, help="timings of each")
    return parser


def parse_shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of "OUTxIN".

    Raises:
        ValueError: it is something else.
    """
    outputs, inputs = map(int, text.split("x"))
    if outputs < 1 or inputs < 1:
        raise ValueError(f"sizes must be positive, not {text}")
    return outputs, inputs


def work_of(shapes: Sequence[tuple[int, int]], layers: int, tokens: int, itemsize: int) -> Work:
    """Bytes and FLOPs that the products need; activations are too few to count."""
    weights = layers * sum(outputs * inputs for outputs, inputs in shapes)
    return Work(itemsize * weights, 2 * tokens * weights)


def make_step(implementation: str) -> Callable[[jax.Array, list[jax.Array]], jax.Array]:
    """A program of all products: each is fed with the one before, cut or repeated to fit."""

    @jax.jit
    def step(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for weight in weights:
            width = weight.shape[1]
            x = jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]
            x = jnp.tanh(linear(x, weight, implementation=implementation) * width**-0.5)
        return x

    return step


def measure(
    names: Sequence[str], tokens: int, weights: list[jax.Array], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each implementation's step, in turns, after one that compiles it."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, weights[0].shape[1]), weights[0].dtype)
    steps = {name: make_step(name) for name in names}
    for step in steps.values():
        jax.block_until_ready(step(x, weights))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step(x, weights))
            seconds[name].append(time.perf_counter() - began)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if min(*options.tokens, options.layers, options.repeats) < 1:
        parser.error("--tokens, --layers and --repeats must be positive")
    device, dtype = jax.devices()[0], jnp.dtype(options.dtype)
    names = options.implementations or dict.fromkeys(
        ["xla", choose_implementation("auto", device, 1, dtype)]
    )
    for name in names:
        try:
            choose_implementation(name, device, 1, dtype)
        except ValueError as error:
            parser.error(str(error))
    keys = iter(jax.random.split(jax.random.key(0), options.layers * len(options.shapes)))
    weights = [
        jax.random.normal(next(keys), shape, dtype)
        for _ in range(options.layers)
        for shape in options.shapes
    ]
    limits = timing.measure_limits(dtype, repeats=options.repeats)
    print(f"{timing.describe(limits, dtype)}; {len(weights)} products")
    print(ROW.format("implementation", "tokens", "ms", "best", "bound (ms)", "of", "fraction"))
    for tokens in options.tokens:
        bound, of = work_of(options.shapes, options.layers, tokens, dtype.itemsize).bound(*limits)
        for name, seconds in measure(list(names), tokens, weights, options.repeats).items():
            middle = statistics.median(seconds)
            times = (f"{1e3 * value:.1f}" for value in (middle, min(seconds), bound))
            print(ROW.format(name, tokens, *times, of, f"{bound / middle:.2f}"))


if __name__ == "__main__":
    main()
