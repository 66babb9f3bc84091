"""Spans: consecutive layers of a model that run as a program of their own, from hidden to hidden.

What comes later cuts a model here: stages on other devices, layers whose weights or KV pages are
moved while others run. On one device spans let alike layers share a program.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TypeVar

from jaxserve.models.graph import ModelGraph

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
    """Cut a model's layers into spans, as equal in length as they can be.

    Raises:
        ValueError: there are fewer layers than spans.
    """
    layers = graph.config.num_layers
    if not 1 <= num_spans <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {num_spans} spans")
    ends = [layers * i // num_spans for i in range(num_spans + 1)]
    return tuple(Span(a, graph.layers(a, b)) for a, b in itertools.pairwise(ends))
