"""Declarations of parameters: shape, place on a mesh, and what checkpoints make each one of.

A family's file lists its parameters with the functions below; shapes, sharding, loading,
converting, random weights and bytes all derive from that list. V vocabulary, E hidden size, F
intermediate size, D head dim, H query heads, KVH KV heads, G query heads per KV head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxserve.models.config import ModelConfig

Shape = tuple[int, ...]
Arrange = Callable[[np.ndarray], np.ndarray]
Format = Literal["hf", "gguf"]

# Names of tensors at which a checkpoint is recognised.
HF_PREFIX, HF_EMBEDDING, HF_HEAD = "model.", "embed_tokens.weight", "lm_head.weight"
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"


def same(x: np.ndarray) -> np.ndarray:
    """What is taken over as it is stored."""
    return x


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint, and what part of a parameter it is.

    Attributes:
        tensor: its name.
        shape: that it must have.
        arrange: from the tensor to the part. Of a weight it leaves the last axis alone and moves
            nothing but rows, so that it can be applied to each array of a quantised one.
    """

    tensor: str
    shape: Shape
    arrange: Arrange = same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        shape: of the array; of a weight [outputs..., inputs].
        axes: logical name of each dimension, None for those that are never split;
            `parallel.ShardingRules` turns them into a placement.
        kind: "weight" multiplies activations along its last axis, "bias" is added to a product,
            "factor" multiplies element by element.
        sources: the pieces that it is made of, by the format of the checkpoint. Names of Hugging
            Face tensors begin with `HF_PREFIX` here, whatever a file has in its place.
        joined: the axis along which the pieces lie one after the other.
        part_sizes: how long each part is along it.
        repeats: for each part: (the part, n) -> the part with every KV head n times; () where KV
            heads leave no mark on the parameter.
    """

    shape: Shape
    axes: tuple[str | None, ...]
    kind: Literal["weight", "bias", "factor"]
    sources: Mapping[Format, tuple[Piece, ...]]
    joined: int = 0
    part_sizes: tuple[int, ...] = ()
    repeats: tuple[Callable[[np.ndarray, int], np.ndarray], ...] = ()

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter of its parts, each arranged already."""
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.joined)

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """The parts of the parameter."""
        ends = np.cumsum(self.part_sizes)
        return np.split(value, ends[:-1], self.joined) if self.part_sizes else [value]


class Place(NamedTuple):
    """What stands before the names of one layer's tensors, by format."""

    hf: str
    gguf: str


def model_parameters(
    config: ModelConfig,
    layer: Callable[[Place], Mapping[str, Parameter]],
    final_norm: Parameter,
) -> dict[str, Parameter]:
    """Embedding, layers and head: every parameter of a model by its dotted name.

    Args:
        config: the model.
        layer: the parameters of the layer at a place, by their names within it.
        final_norm: what the last hidden states are normed by.

    Returns:
        `embed` [V, E], `final_norm`, `lm_head` [V, E] (absent when tied), and `layers.N.NAME`.
    """
    shape = (config.vocab_size, config.hidden_size)
    parameters = {
        "embed": _table(shape, HF_PREFIX + HF_EMBEDDING, GGUF_EMBEDDING),
        "final_norm": final_norm,
    }
    if not config.tie_embeddings:
        parameters["lm_head"] = _table(shape, HF_HEAD, GGUF_HEAD)
    for n in range(config.num_layers):
        place = Place(f"{HF_PREFIX}layers.{n}.", f"blk.{n}.")
        parameters |= {f"layers.{n}.{name}": one for name, one in layer(place).items()}
    return parameters


def _table(shape: Shape, hf: str, gguf: str) -> Parameter:
    sources: dict[Format, tuple[Piece, ...]] = {
        "hf": (Piece(hf, shape),),
        "gguf": (Piece(gguf, shape),),
    }
    return Parameter(shape=shape, axes=("vocab", None), kind="weight", sources=sources)


def norm(size: int, hf: str, gguf: str, *, plus_one: bool = False) -> Parameter:
    """A norm's factors [size].

    Args:
        size: how many.
        hf, gguf: the tensors' names, without `.weight`.
        plus_one: Hugging Face's file holds factors minus one, as Gemma's do; GGUF never does.
    """
    sources: dict[Format, tuple[Piece, ...]] = {
        "hf": (Piece(f"{hf}.weight", (size,), _one_plus if plus_one else same),),
        "gguf": (Piece(f"{gguf}.weight", (size,)),),
    }
    return Parameter(shape=(size,), axes=(None,), kind="factor", sources=sources)


def attention(
    config: ModelConfig, place: Place, *, interleaved: bool = False, plus_one: bool = False
) -> dict[str, Parameter]:
    """The projections of attention.

    Args:
        config: the model; it says whether there are biases and norms of queries and keys.
        place: of the layer.
        interleaved: GGUF files hold the rows of Q and K in the order of interleaved rotary
            embeddings (llama.cpp's own), and are put back into Hugging Face's order.
        plus_one: as of `norm`.

    Returns:
        `qkv` [KVH, G+2, D, E] (for each KV head its query heads, its K, its V: splitting the KV
        heads splits all that belongs to them), `o` [E, H*D], and where the config has them
        `qkv_bias` [KVH, G+2, D], `q_norm` and `k_norm` [D].
    """
    e, d, kvh, g = config.hidden_size, config.head_dim, config.num_kv_heads, config.group_size
    hf, gguf = place.hf + "self_attn.{}_proj", place.gguf + "attn_{}"
    heads = {"q": kvh * g, "k": kvh, "v": kvh}

    def by_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(kvh, -1, d, *x.shape[1:])

    def unpermuted(x: np.ndarray) -> np.ndarray:
        return by_head(interleaved_to_halves(x, d))

    def pieces(name: str, kind: str, inputs: Shape, permuted: str) -> tuple[Piece, ...]:
        return tuple(
            Piece(
                f"{name.format(x)}.{kind}",
                (n * d, *inputs),
                unpermuted if x in permuted else by_head,
            )
            for x, n in heads.items()
        )

    def fused(kind: Literal["weight", "bias"], *inputs: int) -> Parameter:
        shape = (kvh, g + 2, d, *inputs)
        return Parameter(
            shape=shape, axes=("kv_heads", *(None,) * (len(shape) - 1)), kind=kind,
            sources={"hf": pieces(hf, kind, inputs, ""),
                     "gguf": pieces(gguf, kind, inputs, "qk" if interleaved else "")},
            joined=1, part_sizes=(g, 1, 1), repeats=(_deal_queries, _repeat_heads, _repeat_heads),
        )  # fmt: skip

    found = {
        "qkv": fused("weight", e),
        "o": Parameter(
            shape=(e, heads["q"] * d), axes=(None, "kv_heads"), kind="weight",
            sources={
                "hf": (Piece(f"{hf.format('o')}.weight", (e, heads["q"] * d)),),
                "gguf": (Piece(f"{gguf.format('output')}.weight", (e, heads["q"] * d)),),
            },
        ),
    }  # fmt: skip
    if config.qkv_bias:
        found["qkv_bias"] = fused("bias")
    if config.qk_norm:
        for x in "qk":
            names = f"{place.hf}self_attn.{x}_norm", f"{place.gguf}attn_{x}_norm"
            found[f"{x}_norm"] = norm(d, *names, plus_one=plus_one)
    return found


def gated_mlp(config: ModelConfig, place: Place) -> dict[str, Parameter]:
    """The gated MLP at a place: `gate_up` [2, F, E] and `down` [E, F]."""
    e, f = config.hidden_size, config.intermediate_size
    hf, gguf = place.hf + "mlp.{}_proj.weight", place.gguf + "ffn_{}.weight"

    return {
        "gate_up": Parameter(
            shape=(2, f, e), axes=(None, "mlp", None), kind="weight",
            sources={
                "hf": tuple(Piece(hf.format(x), (f, e), _one_of) for x in ("gate", "up")),
                "gguf": tuple(Piece(gguf.format(x), (f, e), _one_of) for x in ("gate", "up")),
            },
            part_sizes=(1, 1),
        ),
        "down": Parameter(
            shape=(e, f), axes=(None, "mlp"), kind="weight",
            sources={"hf": (Piece(hf.format("down"), (e, f)),),
                     "gguf": (Piece(gguf.format("down"), (e, f)),)},
        ),
    }  # fmt: skip


def interleaved_to_halves(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of every head from (pair, half) order to (half, pair) order.

    x: [heads * head_dim, ...], rows 2i and 2i+1 of a head rotating together; in the result rows
    i and i + head_dim / 2 do. This undoes what llama.cpp's converter does to Llama's Q and K.
    """
    pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _deal_queries(value: np.ndarray, times: int) -> np.ndarray:
    """[KVH, G, ...] -> [n*KVH, G/n, ...]: queries of a KV head are dealt out to its copies."""
    kv_heads, group, *rest = value.shape
    return value.reshape(kv_heads * times, group // times, *rest)


def _repeat_heads(value: np.ndarray, times: int) -> np.ndarray:
    """[KVH, 1, ...] -> [n*KVH, 1, ...]: every copy has equal keys, or values."""
    return np.repeat(value, times, axis=0)


def _one_plus(x: np.ndarray) -> np.ndarray:
    # In float32, as Gemma computes it: 1 + w has more digits than bfloat16 can keep.
    return x.astype(np.float32) + 1.0


def _one_of(x: np.ndarray) -> np.ndarray:
    return x[None]
