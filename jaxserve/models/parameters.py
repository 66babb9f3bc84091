"""Declarations of parameters: shape, place on a mesh, and what checkpoints make each one of.

A family's file lists its parameters with the functions below; shapes, sharding, loading,
converting, random weights and bytes all derive from that list. V vocabulary, E hidden size, F
intermediate size, D head dim, H query heads, KVH KV heads, G query heads per KV head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from jaxserve.models.config import ModelConfig

Shape = tuple[int, ...]
Combine = Callable[..., np.ndarray]
Format = Literal["hf", "gguf"]

# Names of tensors at which a checkpoint is recognised.
HF_PREFIX, HF_EMBEDDING, HF_HEAD = "model.", "embed_tokens.weight", "lm_head.weight"
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"


def same(x: np.ndarray) -> np.ndarray:
    """What is taken over as it is stored."""
    return x


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter comes from.

    Attributes:
        tensors: source tensor name -> the shape it must have, in the order `combine` takes.
        combine: from those tensors to the parameter.
    """

    tensors: Mapping[str, Shape]
    combine: Combine = same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        shape: of the array; of a weight [outputs..., inputs].
        axes: logical name of each dimension, None for those that are never split;
            `parallel.ShardingRules` turns them into a placement.
        kind: "weight" multiplies activations along its last axis, "bias" is added to a product,
            "factor" multiplies element by element.
        sources: what it is made of, by the format of the checkpoint. Names of Hugging Face
            tensors begin with `HF_PREFIX` here, whatever a file has in its place.
        repeat: (array as stored, n) -> the array with every KV head n times; None where KV
            heads leave no mark on it.
    """

    shape: Shape
    axes: tuple[str | None, ...]
    kind: Literal["weight", "bias", "factor"]
    sources: Mapping[Format, Source]
    repeat: Callable[[np.ndarray, int], np.ndarray] | None = None

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


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
    sources: dict[Format, Source] = {"hf": Source({hf: shape}), "gguf": Source({gguf: shape})}
    return Parameter(shape=shape, axes=("vocab", None), kind="weight", sources=sources)


def norm(size: int, hf: str, gguf: str, *, plus_one: bool = False) -> Parameter:
    """A norm's factors [size].

    Args:
        size: how many.
        hf, gguf: the tensors' names, without `.weight`.
        plus_one: Hugging Face's file holds factors minus one, as Gemma's do; GGUF never does.
    """
    sources: dict[Format, Source] = {
        "hf": Source({f"{hf}.weight": (size,)}, _one_plus if plus_one else same),
        "gguf": Source({f"{gguf}.weight": (size,)}),
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
    heads = (kvh * g, kvh, kvh)

    def join(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        split = [a.reshape(kvh, -1, d, *a.shape[1:]) for a in (q, k, v)]
        return np.concatenate(split, axis=1)

    def unpermute(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return join(interleaved_to_halves(q, d), interleaved_to_halves(k, d), v)

    def sources(kind: str, inputs: Shape) -> dict[Format, Source]:
        def tensors(name: str) -> dict[str, Shape]:
            return {
                f"{name.format(x)}.{kind}": (n * d, *inputs)
                for x, n in zip("qkv", heads, strict=True)
            }

        from_gguf = unpermute if interleaved else join
        return {"hf": Source(tensors(hf), join), "gguf": Source(tensors(gguf), from_gguf)}

    shape = (kvh, g + 2, d)
    found = {
        "qkv": Parameter(
            shape=(*shape, e), axes=("kv_heads", None, None, None), kind="weight",
            sources=sources("weight", (e,)), repeat=_repeat_kv_heads,
        ),
        "o": Parameter(
            shape=(e, heads[0] * d), axes=(None, "kv_heads"), kind="weight",
            sources={
                "hf": Source({f"{hf.format('o')}.weight": (e, heads[0] * d)}),
                "gguf": Source({f"{gguf.format('output')}.weight": (e, heads[0] * d)}),
            },
        ),
    }  # fmt: skip
    if config.qkv_bias:
        found["qkv_bias"] = Parameter(
            shape=shape, axes=("kv_heads", None, None), kind="bias",
            sources=sources("bias", ()), repeat=_repeat_kv_heads,
        )  # fmt: skip
    if config.qk_norm:
        for x in "qk":
            names = f"{place.hf}self_attn.{x}_norm", f"{place.gguf}attn_{x}_norm"
            found[f"{x}_norm"] = norm(d, *names, plus_one=plus_one)
    return found


def gated_mlp(config: ModelConfig, place: Place) -> dict[str, Parameter]:
    """The gated MLP at a place: `gate_up` [2, F, E] and `down` [E, F]."""
    e, f = config.hidden_size, config.intermediate_size
    hf, gguf = place.hf + "mlp.{}_proj.weight", place.gguf + "ffn_{}.weight"

    def source(name: str, shape: Shape, *parts: str) -> Source:
        tensors = {name.format(part): shape for part in parts}
        return Source(tensors, _stack if len(parts) > 1 else same)

    return {
        "gate_up": Parameter(
            shape=(2, f, e), axes=(None, "mlp", None), kind="weight",
            sources={"hf": source(hf, (f, e), "gate", "up"),
                     "gguf": source(gguf, (f, e), "gate", "up")},
        ),
        "down": Parameter(
            shape=(e, f), axes=(None, "mlp"), kind="weight",
            sources={"hf": source(hf, (e, f), "down"), "gguf": source(gguf, (e, f), "down")},
        ),
    }  # fmt: skip


def interleaved_to_halves(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of every head from (pair, half) order to (half, pair) order.

    x: [heads * head_dim, ...], rows 2i and 2i+1 of a head rotating together; in the result rows
    i and i + head_dim / 2 do. This undoes what llama.cpp's converter does to Llama's Q and K.
    """
    pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _repeat_kv_heads(value: np.ndarray, times: int) -> np.ndarray:
    """Turn [KVH, G+2, ...] into [n*KVH, G/n + 2, ...].

    Every KV head becomes n copies with equal K and V, and its query heads are dealt out to them
    in order. Attention is unchanged.
    """
    heads = value.shape[0] * times
    queries, keys_values = value[:, :-2], value[:, -2:]
    queries = queries.reshape(heads, -1, *value.shape[2:])
    return np.concatenate([queries, np.repeat(keys_values, times, axis=0)], axis=1)


def _one_plus(x: np.ndarray) -> np.ndarray:
    # In float32, as Gemma computes it: 1 + w has more digits than bfloat16 can keep.
    return x.astype(np.float32) + 1.0


def _stack(*parts: np.ndarray) -> np.ndarray:
    return np.stack(parts)
