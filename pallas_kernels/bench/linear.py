"""Times the linear layers of a model's step against what the device could do.

    python -m pallas_kernels.bench.linear --tokens 1 8 32

One program holds all products of all layers, one after another, as a step has them; each layer has
weights of its own, so that they come from memory. The implementations take turns; the median
counts, and the best is shown beside it. The bound is the larger of the weights' bytes by a copy's
bandwidth and the FLOPs by the rate of a large matrix product, both measured in the same run; with
int8 activations it is the bytes' alone.

    python -m pallas_kernels.bench.linear --formats int4-g32-float16 int8-g32-float16
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench import timing
from pallas_kernels.bench.workloads import Work
from pallas_kernels.linear import NAMES, Activations, choose_implementation, linear
from pallas_kernels.weights import Format, Quantised, quantise

SMOLLM2 = ("960x576", "576x576", "3072x576", "576x1536")  # query, key, value; output; MLP
ROW = "{:<16}{:<28}{:<13}{:>8}{:>10}{:>10}{:>13}{:>9}{:>10}"


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
    parser.add_argument(
        "--formats", nargs="+", type=Format.parse, default=[], metavar="FORMAT",
        help="of quantised weights, such as int4-g32-float16, int8-channel-float32 or "
        "int4-g32-float16-minimums, multiplied with float and with int8 activations",
    )  # fmt: skip
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


class Side(NamedTuple):
    """What is timed.

    Attributes:
        implementation: of `linear`.
        format: of the weights, or None for those of the activations' type.
        activations: as of `linear`.
    """

    implementation: str
    format: Format | None
    activations: Activations


def sides_of(implementations: Sequence[str], formats: Sequence[Format]) -> list[Side]:
    """Every implementation with weights as they are, and with each format's activations."""
    sides = [Side(name, None, "float") for name in implementations]
    for format in formats:
        kinds: list[Activations] = ["float"] if format.codes == "fp8" else ["float", "int8"]
        sides += [Side(name, format, kind) for name in implementations for kind in kinds]
    return sides


def work_of(weights: Sequence[jax.Array | Quantised], tokens: int) -> Work:
    """Bytes and FLOPs that the products need; activations are too few to count."""
    numbers = sum(math.prod(weight.shape) for weight in weights)
    return Work(sum(weight.nbytes for weight in weights), 2 * tokens * numbers)


def make_step(side: Side) -> Callable[[jax.Array, Sequence[jax.Array | Quantised]], jax.Array]:
    """A program of all products: each is fed with the one before, cut or repeated to fit."""

    @jax.jit
    def step(x: jax.Array, weights: Sequence[jax.Array | Quantised]) -> jax.Array:
        for weight in weights:
            width = weight.shape[1]
            x = jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]
            out = linear(
                x, weight, implementation=side.implementation, activations=side.activations
            )
            x = jnp.tanh(out * width**-0.5)
        return x

    return step


def measure(
    sides: Sequence[Side],
    tokens: int,
    weights: Mapping[Format | None, Sequence[jax.Array | Quantised]],
    dtype: Any,
    repeats: int,
) -> dict[Side, list[float]]:
    """Seconds of each side's step, in turns, after one that compiles it.

    Args:
        sides: what is timed.
        tokens: of a step.
        weights: of each format.
        dtype: of activations.
        repeats: timings of each side.
    """
    x = jax.random.normal(jax.random.key(tokens), (tokens, weights[None][0].shape[1]), dtype)
    steps = {side: make_step(side) for side in sides}
    for side, step in steps.items():
        jax.block_until_ready(step(x, weights[side.format]))
    seconds: dict[Side, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step(x, weights[side.format]))
            seconds[side].append(time.perf_counter() - began)
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
        ["xla", choose_implementation("auto", device, dtype)]
    )
    for name in names:
        try:
            choose_implementation(name, device, dtype)
        except ValueError as error:
            parser.error(str(error))
    keys = iter(jax.random.split(jax.random.key(0), options.layers * len(options.shapes)))
    plain = [
        jax.random.normal(next(keys), shape, dtype)
        for _ in range(options.layers)
        for shape in options.shapes
    ]
    weights: dict[Format | None, list[Any]] = {None: plain}
    for format in options.formats:
        to_format = jax.jit(functools.partial(quantise, format=format))
        try:
            weights[format] = [to_format(weight) for weight in plain]
        except ValueError as error:
            parser.error(str(error))
    sides = sides_of(list(names), options.formats)
    limits = timing.measure_limits(dtype, repeats=options.repeats)
    print(f"{timing.describe(limits, dtype)}; {len(plain)} products")
    heads = ("implementation", "weights", "activations", "tokens", "ms", "best", "bound (ms)")
    print(ROW.format(*heads, "of", "fraction"))
    for tokens in options.tokens:
        for side, seconds in measure(sides, tokens, weights, dtype, options.repeats).items():
            work = work_of(weights[side.format], tokens)
            rate = limits.rate if side.activations == "float" else math.inf
            bound, of = work.bound(limits.bandwidth, rate)
            middle = statistics.median(seconds)
            times = (f"{1e3 * value:.1f}" for value in (middle, min(seconds), bound))
            what = (side.implementation, str(side.format or dtype.name), side.activations, tokens)
            print(ROW.format(*what, *times, of, f"{bound / middle:.2f}"))


if __name__ == "__main__":
    main()
