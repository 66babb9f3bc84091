"""The most output tokens per second that a machine's memory and arithmetic allow a model.

The roofline of a dense transformer (Williams et al., "Roofline", 2009), kept simple: a step
reads every weight once, as it is held, and does two FLOPs per weight and token, and takes as long
as the slower of the two. Attention's own reads and FLOPs, activations and the host are left out,
so the bound is never too low.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measured limits: memory read in bytes/s, float32 matmul in FLOP/s."""

    bandwidth: float
    matmul: float

    def better(self, other: "Machine") -> "Machine":
        """The higher of both measurements: a bound is what the machine does undisturbed."""
        return Machine(max(self.bandwidth, other.bandwidth), max(self.matmul, other.matmul))


def layer_params(config: "ModelConfig") -> int:
    """Matmul weights of all layers together (norm scales and biases are too few to matter)."""
    from jaxserve.models.registry import parameters_of  # it imports JAX

    return sum(
        parameter.size
        for name, parameter in parameters_of(config).items()
        if name.startswith("layers.") and parameter.kind == "weight"
    )


def head_params(config: "ModelConfig") -> int:
    """Weights of the output head.

    A tied embedding is the head; an untied one is a look-up of a few rows and counts for nothing.
    """
    return config.vocab_size * config.hidden_size


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What a model's weights ask of a machine.

    Attributes:
        layers, head: weights, which a token is multiplied with.
        layer_bytes, head_bytes: as which they are read.
    """

    layers: int
    head: int
    layer_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, config: "ModelConfig", layer_bytes: int, head_bytes: int) -> "ModelCost":
        """The cost of a model whose weights are held in so many bytes."""
        return cls(layer_params(config), head_params(config), layer_bytes, head_bytes)

    def step_seconds(self, machine: Machine, tokens: int, sampled: int) -> float:
        """The least time of a step over `tokens` rows, `sampled` of which go through the head."""
        read = (self.layer_bytes + (self.head_bytes if sampled else 0)) / machine.bandwidth
        compute = 2 * (tokens * self.layers + sampled * self.head) / machine.matmul
        return max(read, compute)


def output_throughput_bound(
    model: ModelCost, machine: Machine, *, concurrency: int, input_len: int, output_len: int
) -> float:
    """Output tokens/s, prefill included, when `concurrency` equal requests start together.

    One prefill step brings every first token, then `output_len - 1` decode steps the others.
    """
    prefill = model.step_seconds(machine, concurrency * input_len, concurrency)
    decode = model.step_seconds(machine, concurrency, concurrency)
    return concurrency * output_len / (prefill + (output_len - 1) * decode)
