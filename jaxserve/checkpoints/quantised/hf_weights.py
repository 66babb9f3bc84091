"""A quantised Hugging Face checkpoint, seen as if each weight were one tensor."""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from jaxserve.checkpoints.quantised.hf_config import Quantisation
from jaxserve.checkpoints.quantised.scheme import Scheme, Shape
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, Quantised

_WEIGHT = "weight"
_EMBEDDING = "embed_tokens"
# Scales of a KV cache in fewer bits, which some checkpoints bring: beside a layer's projections,
# or in them.
_CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale")


class HfWeights:
    """The tensors of a checkpoint, whose quantised weights are put together when they are read.

    A weight whose inputs are in an order of their own (GPTQ's activation order) is dequantised,
    with its inputs in order; who can take inputs in another order reads it by `read_ordered`.

    Args:
        tensors: all tensors of the checkpoint by name, best mapped (`files.safetensors_file`).
        quantisation: what its configuration says.

    Attributes:
        shapes: name -> shape of every tensor that is not quantised, and `MODULE.weight` -> (out,
            in) of every weight that is.

    Raises:
        CheckpointError: tensors of a quantised weight are missing, or have wrong shapes.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], quantisation: Quantisation) -> None:
        self._tensors = tensors
        modules: dict[str, set[str]] = {}
        for name in tensors:
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, set()).add(suffix)
        self._schemes: dict[str, tuple[Scheme, Shape, frozenset[str]]] = {}
        self.shapes: dict[str, Shape] = {}
        for module, suffixes in modules.items():
            kind = "Embedding" if module.endswith(_EMBEDDING) else "Linear"
            scheme = quantisation.scheme(module, suffixes, kind)
            if scheme is not None:
                suffixes = self._take(module, scheme, suffixes)
            for name in (f"{module}.{suffix}" if module else suffix for suffix in suffixes):
                if not name.endswith(_CACHE_SCALES):
                    self.shapes[name] = tensors[name].shape

    def format(self, name: str) -> Format | None:
        """The format of what `read` gives; None if it is an array."""
        found = self._schemes.get(name)
        if found is None or self.order(name) is not None:
            return None
        return self._format(name, *found[:2])

    def type(self, name: str) -> np.dtype | None:
        """The type of a tensor that is not quantised; None of one that is."""
        return None if name in self._schemes else self._tensors[name].dtype

    def order(self, name: str) -> np.ndarray | None:
        """Which input each column that `read_ordered` gives takes; None where all are in order."""
        found = self._schemes.get(name)
        return None if found is None else found[0].order(self._parts(name))

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray | Quantised:
        """One tensor, or some of its rows; inputs are in order.

        Args:
            name: one of `shapes`.
            rows: along the first axis, without a step.

        Raises:
            CheckpointError: the tensors of a quantised weight contradict each other.
        """
        if name not in self._schemes:
            return self._tensors[name][rows]
        weight, order = self.read_ordered(name, rows), self.order(name)
        if order is None:
            return weight
        numbers = weight.dequantise()
        in_order = np.empty_like(numbers)
        in_order[:, order] = numbers
        return in_order

    def read_ordered(self, name: str, rows: slice = slice(None)) -> Quantised:
        """One quantised weight, or some of its rows, with its inputs in `order`.

        Raises:
            CheckpointError: its tensors contradict each other.
        """
        scheme, shape, _ = self._schemes[name]
        with _named(name):
            return scheme.read(self._parts(name), shape, rows)

    def _take(self, module: str, scheme: Scheme, suffixes: set[str]) -> set[str]:
        """Note a quantised weight, and return the suffixes that are not of it."""
        name = f"{module}.{_WEIGHT}"
        found = {suffix: self._tensors[f"{module}.{suffix}"].shape for suffix in suffixes}
        with _named(name):
            shape = scheme.shape(found)
            scheme.check(found, shape)
            parts = {*scheme.tensors(shape), *scheme.optional(shape)} & suffixes
            self._format(name, scheme, shape)  # or no format holds it
        self._schemes[name] = scheme, shape, frozenset(parts)
        self.shapes[name] = shape
        return suffixes - parts - scheme.unused

    def _format(self, name: str, scheme: Scheme, shape: Shape) -> Format:
        scales = self._tensors[name.removesuffix(_WEIGHT) + scheme.scales]
        return scheme.format(shape, scales.dtype.name)

    def _parts(self, name: str) -> dict[str, np.ndarray]:
        module = name.removesuffix(_WEIGHT)
        return {suffix: self._tensors[module + suffix] for suffix in self._schemes[name][2]}


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Says in a CheckpointError which weight it is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
