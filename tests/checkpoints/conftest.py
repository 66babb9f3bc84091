"""Tiny random checkpoints in every layout, and what they must load as."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Odd sizes, so that a wrong axis cannot pass; those of EVEN fit quantisation blocks."""

    vocab: int = 37
    hidden: int = 22
    ffn: int = 29
    layers: int = 3
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 10


EVEN = Sizes(vocab=41, hidden=64, ffn=96, layers=2, kv_heads=2, group=2, head_dim=16)


def hf_config(family: str, sizes: Sizes, **changes) -> dict:
    """A config.json of one family."""
    config = {
        "model_type": family,
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.kv_heads * sizes.group,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": family == "gemma3_text",
        "sliding_window": 16 if family == "gemma3_text" else None,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    return config | changes


def hf_tensors(family: str, sizes: Sizes, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names."""
    random = np.random.default_rng(7)
    e, f, d = sizes.hidden, sizes.ffn, sizes.head_dim
    heads, kv_heads = sizes.kv_heads * sizes.group, sizes.kv_heads
    shapes = {"model.embed_tokens.weight": (sizes.vocab, e), "model.norm.weight": (e,)}
    if family != "gemma3_text":
        shapes["lm_head.weight"] = (sizes.vocab, e)
    for n in range(sizes.layers):
        layer = {
            "input_layernorm.weight": (e,),
            "post_attention_layernorm.weight": (e,),
            "self_attn.q_proj.weight": (heads * d, e),
            "self_attn.k_proj.weight": (kv_heads * d, e),
            "self_attn.v_proj.weight": (kv_heads * d, e),
            "self_attn.o_proj.weight": (e, heads * d),
            "mlp.gate_proj.weight": (f, e),
            "mlp.up_proj.weight": (f, e),
            "mlp.down_proj.weight": (e, f),
        }
        if family == "qwen2":
            layer |= {"self_attn.q_proj.bias": (heads * d,)}
            layer |= {f"self_attn.{x}_proj.bias": (kv_heads * d,) for x in "kv"}
        if family == "gemma3_text":
            layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
            layer |= {f"{x}_feedforward_layernorm.weight": (e,) for x in ("pre", "post")}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {k: random.standard_normal(s, np.float32).astype(dtype) for k, s in shapes.items()}


def expected_params(family: str, sizes: Sizes, tensors: dict) -> dict[str, np.ndarray]:
    """The parameters those tensors stand for, written down head by head."""
    d, g = sizes.head_dim, sizes.group
    gemma = family == "gemma3_text"

    def norm(name: str) -> np.ndarray:
        return tensors[name].astype(np.float32) + 1 if gemma else tensors[name]

    def heads(at: str, what: str) -> np.ndarray:
        q, k, v = (tensors[f"{at}self_attn.{x}_proj.{what}"] for x in "qkv")
        rows = []
        for kv_head in range(sizes.kv_heads):
            own = [q[(kv_head * g + i) * d :][:d] for i in range(g)]
            rows.append([*own, k[kv_head * d :][:d], v[kv_head * d :][:d]])
        return np.array(rows)

    params = {
        "embed": tensors["model.embed_tokens.weight"],
        "final_norm": norm("model.norm.weight"),
    }
    if not gemma:
        params["lm_head"] = tensors["lm_head.weight"]
    for n in range(sizes.layers):
        at, to = f"model.layers.{n}.", f"layers.{n}."
        params |= {
            f"{to}attention_norm": norm(f"{at}input_layernorm.weight"),
            f"{to}qkv": heads(at, "weight"),
            f"{to}o": tensors[f"{at}self_attn.o_proj.weight"],
            f"{to}gate_up": np.array([tensors[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")]),
            f"{to}down": tensors[f"{at}mlp.down_proj.weight"],
        }
        mlp_norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        params[f"{to}mlp_norm"] = norm(f"{at}{mlp_norm}.weight")
        if family == "qwen2":
            params[f"{to}qkv_bias"] = heads(at, "bias")
        if gemma:
            params |= {
                f"{to}q_norm": norm(f"{at}self_attn.q_norm.weight"),
                f"{to}k_norm": norm(f"{at}self_attn.k_norm.weight"),
                f"{to}post_attention_norm": norm(f"{at}post_attention_layernorm.weight"),
                f"{to}post_mlp_norm": norm(f"{at}post_feedforward_layernorm.weight"),
            }
    return params


def write_hf(path: Path, config: dict, tensors: dict, *, shards: int = 1) -> Path:
    """A Hugging Face directory with a small tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
    else:
        names, weight_map = sorted(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({n: tensors[n] for n in names[i::shards]}, path / file)
            weight_map |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """make_hf(family, shards=1, dtype=...) -> (directory, the parameters it must load as)."""

    def make(family: str, *, shards: int = 1, dtype=np.float32, even: bool = False):
        sizes = EVEN if even else Sizes()
        tensors = hf_tensors(family, sizes, dtype)
        path = write_hf(tmp_path / f"{family}-{shards}", hf_config(family, sizes), tensors,
                        shards=shards)  # fmt: skip
        return path, expected_params(family, sizes, tensors)

    return make


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_GGUF_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, family: str) -> str:
    """What llama.cpp's converter calls a Hugging Face tensor."""
    names = GGUF_NAMES | (GEMMA_GGUF_NAMES if family == "gemma3_text" else {})
    if name in names:
        return names[name]
    _, _, layer, part = name.split(".", 3)
    stem, _, kind = part.rpartition(".")
    return f"blk.{layer}.{names[stem]}.{kind}"


def to_gguf_values(name: str, x: np.ndarray, family: str, sizes: Sizes) -> np.ndarray:
    """What llama.cpp's converter does to a tensor's values."""
    x = x.astype(np.float32)
    if family == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = sizes.kv_heads * (sizes.group if "q_proj" in name else 1)
        halves = x.reshape(heads, 2, sizes.head_dim // 2, *x.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))
    return x + 1 if family == "gemma3_text" and "norm" in name else x


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """make_gguf(family, kind) -> (file, the parameters it must load as).

    `kinds` has the types of tensors of other names than most, by a part of the name.
    """

    def make(family: str, kind: gguf.GGMLQuantizationType, *, extra=(), kinds=()):
        sizes = EVEN
        arch = {"gemma3_text": "gemma3"}.get(family, family)
        tensors = hf_tensors(family, sizes)
        path = tmp_path / f"{family}-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_context_length(128)
        writer.add_embedding_length(sizes.hidden)
        writer.add_feed_forward_length(sizes.ffn)
        writer.add_block_count(sizes.layers)
        writer.add_head_count(sizes.kv_heads * sizes.group)
        writer.add_head_count_kv(sizes.kv_heads)
        writer.add_key_length(sizes.head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_eos_token_id(2)
        for name, x in extra:
            writer.add_tensor(name, x)
        for name, x in list(tensors.items()):
            stored = to_gguf_values(name, x, family, sizes)
            target = gguf_name(name, family)
            if x.ndim == 1:
                writer.add_tensor(target, stored)
                continue
            own = next((k for part, k in dict(kinds).items() if part in target), kind)
            writer.add_tensor(target, quantize(stored, own), raw_dtype=own)
            # What is lost is lost row by row, so the order of rows does not matter to it.
            tensors[name] = dequantize(quantize(x, own), own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, expected_params(family, sizes, tensors)

    return make


@pytest.fixture
def bfloat16() -> np.dtype:
    """numpy's bfloat16."""
    return np.dtype(ml_dtypes.bfloat16)
