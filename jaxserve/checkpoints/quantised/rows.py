"""Outputs of quantised weights, taken, joined and put into another order.

All arrays of a weight lead with the outputs' axes, so that what a dense weight's rows go through on
their way into a model (rows of Q and K put back into half-and-half order, K and V joined to Q, KV
heads repeated for a mesh, a vocabulary padded) is done to values, scales and minimums alike, and
changes no number. Nothing here may touch the last axis, the inputs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.weights import Quantised


def on_outputs(combine: Callable[..., Any], *weights: Quantised) -> Quantised:
    """Make one weight of several, by a function that makes one array of one of each.

    Args:
        combine: takes an array of each weight, and must treat all of its last axis alike, whose
            size and meaning differ from array to array.
        weights: of one format and as many inputs.

    Raises:
        ValueError: their formats differ, or the inputs do.
    """
    first = weights[0]
    if len(formats := {str(weight.format) for weight in weights}) > 1:
        raise ValueError(
            f"weights in {' and '.join(sorted(formats))} cannot be one: they stay parts"
        )
    if len(inputs := {weight.shape[-1] for weight in weights}) > 1:
        raise ValueError(f"weights of {' and '.join(map(str, sorted(inputs)))} inputs")

    def combined(name: str) -> Any:
        return combine(*(getattr(weight, name) for weight in weights))

    minimums = combined("minimums") if first.format.has_minimums else None
    result = Quantised(combined("values"), combined("scales"), minimums, first.format)
    result.check()
    return result


def map_rows(arrange: Callable[[Any], Any], weight: Any) -> Any:
    """A weight with its rows moved; `arrange` takes an array, of a quantised weight each."""
    return on_outputs(arrange, weight) if isinstance(weight, Quantised) else arrange(weight)


def take_rows(weight: Quantised, index: Any) -> Quantised:
    """Some outputs of a weight, by anything that indexes its axes of outputs."""
    return on_outputs(lambda array: array[index], weight)


def concatenate(*weights: Quantised, axis: int = 0) -> Quantised:
    """Weights joined along an axis of outputs.

    Raises:
        ValueError: their formats or inputs differ.
    """
    return on_outputs(lambda *arrays: np.concatenate(arrays, axis), *weights)
