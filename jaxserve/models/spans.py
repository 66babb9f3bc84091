"""Spans: consecutive layers of a model that run as a program of their own, from hidden to hidden.

What comes later cuts a model here: stages on other devices, layers whose weights or KV pages are
moved while others run. On one device spans let alike layers share a program.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

from jaxserve.models.config import ModelConfig
from jaxserve.models.graph import ModelGraph

# Of a span, where nobody says how many there are. A device reads so much in 0.2 ms or more.
LEAST_LAYERS, LEAST_BYTES = 8, 2**29

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive layers of a model.

    Attributes:
        first: the first of them; where they begin in a pool that has all of the model's layers.
        graph: the model with these layers alone, numbered from 0.
    """

    first: int
    graph: ModelGraph

    def own(self, by_name: Mapping[str, T]) -> dict[str, T]:
        """What belongs to the span's parameters.

        Args:
            by_name: something for parameters of the whole model.

        Returns:
            That for the span's layers, by the names that these have in `graph`.
        """
        numbers = {f"{self.first + i}": i for i in range(self.graph.config.num_layers)}
        own: dict[str, T] = {}
        for name, value in by_name.items():
            place, _, rest = name.partition(".")
            number, _, parameter = rest.partition(".")
            if place == "layers" and number in numbers:
                own[f"layers.{numbers[number]}.{parameter}"] = value
        return own


def cut(graph: ModelGraph, num_spans: int) -> tuple[Span, ...]:
    """Cut a model's layers into spans: so that few of them differ, then as evenly as can be.

    Raises:
        ValueError: there are fewer layers than spans.
    """
    ends = _ends(graph.config, num_spans)
    return tuple(Span(a, graph.layers(a, b)) for a, b in itertools.pairwise(ends))


def choose_num_spans(config: ModelConfig, weight_bytes: int) -> int:
    """Into how many spans to cut layers that a compiler sees one by one.

    Spans alike share a program, so the fewest layers are left to compile. But a span must be so
    long that a device is at work with it while the host launches the next one.

    Args:
        config: the model.
        weight_bytes: of all weights, on each device.
    """

    def layers_to_compile(num_spans: int) -> int:
        different = _different(config, _ends(config, num_spans))
        return sum(span.num_layers for span in different)

    most = min(config.num_layers // LEAST_LAYERS, weight_bytes // LEAST_BYTES)
    return min(range(1, max(most, 1) + 1), key=layers_to_compile)


def _ends(config: ModelConfig, num_spans: int) -> list[int]:
    """Where spans begin, and where the last one ends."""
    layers = config.num_layers
    if not 1 <= num_spans <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {num_spans} spans")
    cuts = [[layers * i // num_spans for i in range(num_spans + 1)]]
    # Or of one length but for the last: where kinds of layers take turns, that may fit the turns.
    for length in range(-(-layers // num_spans), (layers - 1) // max(num_spans - 1, 1) + 1):
        ends = [*range(0, layers, length), layers]
        if len(ends) == num_spans + 1:
            cuts.append(ends)
    return min(cuts, key=lambda ends: len(_different(config, ends)))


def _different(config: ModelConfig, ends: Sequence[int]) -> set[ModelConfig]:
    return {config.layers(a, b) for a, b in itertools.pairwise(ends)}
