"""Which tensors of a checkpoint make up each parameter, and how.

Parameters are a flat dict of arrays in one layout for every family (`parameter_shapes`); a
checkpoint format has one name map that says, for each of them, which source tensors it is
made of and how they are combined. V vocabulary, E hidden size, F intermediate size, D head
dim, KVH KV heads, G query heads per KV head.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import numpy as np

from jaxserve.core.errors import CheckpointError
from jaxserve.models.config import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter of a model.

    `embed` [V, E], `final_norm` [E], `lm_head` [V, E] (absent when tied), and for layer N
    under `layers.N.`: `attention_norm` [E], `qkv` [KVH, G+2, D, E] (for each KV head its query
    heads, its K, its V), `qkv_bias` [KVH, G+2, D], `q_norm`, `k_norm` [D], `o` [E, KVH, G, D],
    `post_attention_norm` [E], `mlp_norm` [E], `gate_up` [2, F, E], `down` [E, F],
    `post_mlp_norm` [E]. Norm scales are the factors that multiply.
    """
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    kvh, g = config.num_kv_heads, config.group_size
    layer: dict[str, Shape] = {
        "attention_norm": (e,),
        "qkv": (kvh, g + 2, d, e),
        "o": (e, kvh, g, d),
        "mlp_norm": (e,),
        "gate_up": (2, f, e),
        "down": (e, f),
    }
    if config.qkv_bias:
        layer["qkv_bias"] = (kvh, g + 2, d)
    if config.qk_norm:
        layer |= {"q_norm": (d,), "k_norm": (d,)}
    if config.post_norms:
        layer |= {"post_attention_norm": (e,), "post_mlp_norm": (e,)}
    shapes: dict[str, Shape] = {"embed": (config.vocab_size, e), "final_norm": (e,)}
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, e)
    for n in range(config.num_layers):
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """How many numbers the model's weights hold, a tied embedding counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter comes from.

    Attributes:
        tensors: source tensor name -> the shape it must have, in the order `combine` takes.
        combine: from those tensors to the parameter.
    """

    tensors: Mapping[str, Shape]
    combine: Callable[..., np.ndarray]


def hf_sources(config: ModelConfig, prefix: str, lm_head: str) -> dict[str, Source]:
    """Map the names of Hugging Face checkpoints (all families name their tensors alike).

    Args:
        config: the model.
        prefix: what stands before `embed_tokens.weight`, for example `model.`.
        lm_head: name of the output projection, used unless the embeddings are tied.
    """
    names = {
        "embed": f"{prefix}embed_tokens.weight",
        "final_norm": f"{prefix}norm.weight",
        "lm_head": lm_head,
        "layer": f"{prefix}layers.{{n}}.",
        "attention_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }
    if config.post_norms:
        names |= {
            "post_attention_norm": "post_attention_layernorm.weight",
            "mlp_norm": "pre_feedforward_layernorm.weight",
            "post_mlp_norm": "post_feedforward_layernorm.weight",
        }
    norm = _one_plus if config.family == "gemma3" else _same
    return _sources(config, names, norm=norm, unpermute=False)


def gguf_sources(config: ModelConfig, architecture: str) -> dict[str, Source]:
    """Map the names of GGUF files, whose norms are factors already for every family.

    Files of architecture `llama` hold the rows of Q and K in the order of interleaved rotary
    embeddings; their sources put them back into Hugging Face's half-and-half order.
    """
    names = {
        "embed": "token_embd.weight",
        "final_norm": "output_norm.weight",
        "lm_head": "output.weight",
        "layer": "blk.{n}.",
        "attention_norm": "attn_norm.weight",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output.weight",
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
        "post_attention_norm": "post_attention_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
        "post_mlp_norm": "post_ffw_norm.weight",
    }
    return _sources(config, names, norm=_same, unpermute=architecture == "llama")


def _sources(
    config: ModelConfig,
    names: Mapping[str, str],
    *,
    norm: Callable[[np.ndarray], np.ndarray],
    unpermute: bool,
) -> dict[str, Source]:
    """One source per parameter; `names` gives the format's name of every part."""
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    kvh, g = config.num_kv_heads, config.group_size
    q_rows, kv_rows = kvh * g * d, kvh * d

    def join_qkv(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (a.reshape(kvh, -1, d, *a.shape[1:]) for a in (q, k, v))
        if unpermute:
            q, k = interleaved_to_halves(q), interleaved_to_halves(k)
        return np.concatenate([q, k, v], axis=1)

    def split_o(o: np.ndarray) -> np.ndarray:
        return o.reshape(e, kvh, g, d)

    sources: dict[str, Source] = {}
    for name, shape in parameter_shapes(config).items():
        prefix, _, part = name.rpartition(".")
        at = names["layer"].format(n=prefix.removeprefix("layers.")) if prefix else ""
        q, k, v = (at + names[x] for x in "qkv")
        match part:
            case "qkv":
                tensors = {f"{q}.weight": (q_rows, e), f"{k}.weight": (kv_rows, e),
                           f"{v}.weight": (kv_rows, e)}  # fmt: skip
                source = Source(tensors, join_qkv)
            case "qkv_bias":
                tensors = {f"{q}.bias": (q_rows,), f"{k}.bias": (kv_rows,), f"{v}.bias": (kv_rows,)}
                source = Source(tensors, join_qkv)
            case "o":
                source = Source({at + names["o"]: (e, q_rows)}, split_o)
            case "gate_up":
                source = Source({at + names["gate"]: (f, e), at + names["up"]: (f, e)}, _stack)
            case _:
                combine = norm if part.endswith("_norm") else _same
                source = Source({at + names[part]: shape}, combine)
        sources[name] = source
    return sources


def interleaved_to_halves(x: np.ndarray) -> np.ndarray:
    """Reorder axis 2, the head dimension, from (pair, half) order to (half, pair) order.

    x: [KVH, heads, D, ...], rows 2i and 2i+1 rotating together; in the result rows i and
    i + D/2 do. This undoes what llama.cpp's converter does to Llama's Q and K.
    """
    pairs = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, *x.shape[3:])
    return pairs.swapaxes(2, 3).reshape(x.shape)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _one_plus(x: np.ndarray) -> np.ndarray:
    # In float32, as Gemma computes it: 1 + w has more digits than bfloat16 can keep.
    return x.astype(np.float32) + 1.0


def _stack(*parts: np.ndarray) -> np.ndarray:
    return np.stack(parts)


def check_tensors(
    sources: Mapping[str, Source],
    found: Mapping[str, Shape],
    ignored: Callable[[str], bool],
    where: object,
) -> None:
    """Check that a file holds exactly the tensors wanted, in the shapes wanted.

    Args:
        sources: the name map of the model.
        found: tensor name -> shape, of the file.
        ignored: whether a tensor that no parameter needs may be left unread.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or would go unused.
    """
    wanted = {name: shape for s in sources.values() for name, shape in s.tensors.items()}
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(found[name])}, expected {shape}"
            )
    check_no_extra(found, wanted, ignored, where)


def check_no_extra(
    found: Collection[str],
    wanted: Collection[str],
    ignored: Callable[[str], bool],
    where: object,
) -> None:
    """Raise CheckpointError for a tensor that the model would silently do without."""
    extra = sorted(name for name in found if name not in wanted and not ignored(name))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{where}: tensor {extra[0]}{more} has no place in this model")
