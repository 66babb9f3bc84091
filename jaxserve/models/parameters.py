"""Declarations of parameters: shape, place on a mesh, and what checkpoints make each one of.

A family's file lists its parameters with the functions below; shapes, sharding, loading,
converting, random weights and bytes all derive from that list. V vocabulary, E hidden size, F
intermediate size, D head dim, H query heads, KVH KV heads, G query heads per KV head.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
        arrange: from the tensor to the part. Of a weight it leaves the last axis alone and takes
            and moves nothing but rows, so that it can be applied to each array of a quantised one.
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
        kind: "weight" multiplies activations along its last axis, "bias" is added,
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


def bias(size: int, hf: str, gguf: str) -> Parameter:
    """What is added to a product or a norm that no axis of a mesh splits: [size].

    Args:
        size: how many numbers.
        hf, gguf: the tensors' names, without `.bias`.
    """
    sources: dict[Format, tuple[Piece, ...]] = {
        "hf": (Piece(f"{hf}.bias", (size,)),),
        "gguf": (Piece(f"{gguf}.bias", (size,)),),
    }
    return Parameter(shape=(size,), axes=(None,), kind="bias", sources=sources)


def attention(
    config: ModelConfig,
    place: Place,
    *,
    interleaved: Collection[Format] = (),
    fused: Collection[Format] = (),
    plus_one: bool = False,
) -> dict[str, Parameter]:
    """The projections of attention.

    Args:
        config: the model; it says whether there are biases and norms of queries and keys.
        place: of the layer.
        interleaved: formats that hold the rows of Q and K in the order of interleaved rotary
            embeddings (2i and 2i + 1 of a head rotate together); they are put in halves.
        fused: formats that hold Q, K and V one after the other in one tensor.
        plus_one: as of `norm`.

    Returns:
        `qkv` [KVH, G+2, D, E] (for each KV head its query heads, its K, its V: splitting the KV
        heads splits all that belongs to them), `o` [E, H*D], and where the config has them
        `qkv_bias` [KVH, G+2, D], `o_bias` [E], `q_norm` and `k_norm` [D].
    """
    e, d, kvh, g = config.hidden_size, config.head_dim, config.num_kv_heads, config.group_size
    hf, gguf = place.hf + "self_attn.{}_proj", place.gguf + "attn_{}"
    heads = {"q": kvh * g, "k": kvh, "v": kvh}

    def by_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(kvh, -1, d, *x.shape[1:])

    def unpermuted(x: np.ndarray) -> np.ndarray:
        return by_head(interleaved_to_halves(x, d, config.rotated))

    def pieces(form: Format, name: str, kind: str, inputs: Shape) -> tuple[Piece, ...]:
        rows = {x: n * d for x, n in heads.items()}
        arrange = {x: unpermuted if form in interleaved and x != "v" else by_head for x in heads}
        if form in fused:
            return rows_of(f"{name.format('qkv')}.{kind}", rows.values(), inputs, arrange.values())
        return tuple(
            Piece(f"{name.format(x)}.{kind}", (rows[x], *inputs), arrange[x]) for x in heads
        )

    def joined(kind: Literal["weight", "bias"], *inputs: int) -> Parameter:
        shape = (kvh, g + 2, d, *inputs)
        return Parameter(
            shape=shape, axes=("kv_heads", *(None,) * (len(shape) - 1)), kind=kind,
            sources={"hf": pieces("hf", hf, kind, inputs),
                     "gguf": pieces("gguf", gguf, kind, inputs)},
            joined=1, part_sizes=(g, 1, 1), repeats=(_deal_queries, _repeat_heads, _repeat_heads),
        )  # fmt: skip

    found = {
        "qkv": joined("weight", e),
        "o": Parameter(
            shape=(e, heads["q"] * d), axes=(None, "kv_heads"), kind="weight",
            sources={
                "hf": (Piece(f"{hf.format('o')}.weight", (e, heads["q"] * d)),),
                "gguf": (Piece(f"{gguf.format('output')}.weight", (e, heads["q"] * d)),),
            },
        ),
    }  # fmt: skip
    if config.qkv_bias:
        found["qkv_bias"] = joined("bias")
    if config.o_bias:
        found["o_bias"] = bias(e, hf.format("o"), gguf.format("output"))
    if config.qk_norm:
        for x in "qk":
            names = f"{place.hf}self_attn.{x}_norm", f"{place.gguf}attn_{x}_norm"
            found[f"{x}_norm"] = norm(d, *names, plus_one=plus_one)
    return found


def norms_of_all_heads(config: ModelConfig, place: Place) -> dict[str, Parameter]:
    """Factors of norms that go over all heads: `q_norm` [KVH, G, D] and `k_norm` [KVH, 1, D]."""
    kvh, d = config.num_kv_heads, config.head_dim
    found = {}
    for x, group, repeat in (("q", config.group_size, _deal_queries), ("k", 1, _repeat_heads)):
        shape = (kvh, group, d)

        def by_head(value: np.ndarray, shape: Shape = shape) -> np.ndarray:
            return value.reshape(shape)

        names: dict[Format, str] = {
            "hf": f"{place.hf}self_attn.{x}_norm.weight",
            "gguf": f"{place.gguf}attn_{x}_norm.weight",
        }
        found[f"{x}_norm"] = Parameter(
            shape=shape, axes=("kv_heads", None, None), kind="factor",
            sources={form: (Piece(name, (kvh * group * d,), by_head),)
                     for form, name in names.items()},
            repeats=(repeat,),
        )  # fmt: skip
    return found


def gated_mlp(
    config: ModelConfig, place: Place, *, fused: Collection[Format] = ()
) -> dict[str, Parameter]:
    """The gated MLP.

    Args:
        config: the model; it says whether there are biases.
        place: of the layer.
        fused: formats that hold the gate and then what it gates in one tensor.

    Returns:
        `gate_up` [2, F, E] and `down` [E, F], and where the config has them `gate_up_bias` [2, F]
        and `down_bias` [E].
    """
    e, f = config.hidden_size, config.intermediate_size
    hf, gguf = place.hf + "mlp.{}_proj", place.gguf + "ffn_{}"

    def pieces(form: Format, name: str, kind: str, inputs: Shape) -> tuple[Piece, ...]:
        if form in fused:
            whole = name.format("gate_up" if form == "hf" else "up")
            return rows_of(f"{whole}.{kind}", (f, f), inputs, (_one_of, _one_of))
        return tuple(
            Piece(f"{name.format(x)}.{kind}", (f, *inputs), _one_of) for x in ("gate", "up")
        )

    def gate_up(kind: Literal["weight", "bias"], *inputs: int) -> Parameter:
        return Parameter(
            shape=(2, f, *inputs), axes=(None, "mlp", *(None for _ in inputs)), kind=kind,
            sources={"hf": pieces("hf", hf, kind, inputs),
                     "gguf": pieces("gguf", gguf, kind, inputs)},
            part_sizes=(1, 1),
        )  # fmt: skip

    found = {"gate_up": gate_up("weight", e), "down": _down(config, hf.format("down"), gguf)}
    if config.mlp_bias:
        found["gate_up_bias"] = gate_up("bias")
        found["down_bias"] = bias(e, hf.format("down"), gguf.format("down"))
    return found


def plain_mlp(config: ModelConfig, place: Place) -> dict[str, Parameter]:
    """An MLP without a gate: `up` [F, E], `down` [E, F], with biases `up_bias` and `down_bias`.

    Hugging Face's names are those of GPT-2 and StarCoder 2: `c_fc` and `c_proj`.
    """
    e, f = config.hidden_size, config.intermediate_size
    hf, gguf = place.hf + "mlp.c_{}", place.gguf + "ffn_{}"

    def up(kind: Literal["weight", "bias"], *inputs: int) -> Parameter:
        shape = (f, *inputs)
        return Parameter(
            shape=shape, axes=("mlp", *(None for _ in inputs)), kind=kind,
            sources={"hf": (Piece(f"{hf.format('fc')}.{kind}", shape),),
                     "gguf": (Piece(f"{gguf.format('up')}.{kind}", shape),)},
        )  # fmt: skip

    found = {"up": up("weight", e), "down": _down(config, hf.format("proj"), gguf)}
    if config.mlp_bias:
        found["up_bias"] = up("bias")
        found["down_bias"] = bias(e, hf.format("proj"), gguf.format("down"))
    return found


def _down(config: ModelConfig, hf: str, gguf: str) -> Parameter:
    shape = (config.hidden_size, config.intermediate_size)
    return Parameter(
        shape=shape, axes=(None, "mlp"), kind="weight",
        sources={"hf": (Piece(f"{hf}.weight", shape),),
                 "gguf": (Piece(f"{gguf.format('down')}.weight", shape),)},
    )  # fmt: skip


def rows_of(
    tensor: str, rows: Iterable[int], inputs: Shape, arrange: Iterable[Arrange]
) -> tuple[Piece, ...]:
    """Pieces that lie one after the other in one tensor.

    Args:
        tensor: its name.
        rows: how many of its rows each piece takes.
        inputs: the tensor's other axes.
        arrange: of each piece, from its rows to the part.
    """
    ends = list(itertools.accumulate(rows))
    starts = [0, *ends[:-1]]

    def taken(start: int, end: int, arrange: Arrange) -> Arrange:
        return lambda x: arrange(x[start:end])

    return tuple(
        Piece(tensor, (ends[-1], *inputs), taken(*each))
        for each in zip(starts, ends, arrange, strict=True)
    )


def interleaved_to_halves(x: np.ndarray, head_dim: int, rotated: int | None = None) -> np.ndarray:
    """Reorder the rows of every head from (pair, half) order to (half, pair) order.

    x: [heads * head_dim, ...], rows 2i and 2i+1 of a head rotating together; in the result rows
    i and i + rotated / 2 do. Those after the first `rotated` (None: all) stay where they are.
    For one, this undoes what llama.cpp's converter does to Llama's Q and K.
    """
    rotated = head_dim if rotated is None else rotated
    heads = x.reshape(-1, head_dim, *x.shape[1:])
    pairs = heads[:, :rotated].reshape(-1, rotated // 2, 2, *x.shape[1:])
    halves = pairs.swapaxes(1, 2).reshape(-1, rotated, *x.shape[1:])
    return np.concatenate([halves, heads[:, rotated:]], axis=1).reshape(x.shape)


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
