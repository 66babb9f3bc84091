"""Files that hold anything: each loads, or is refused by an error of this project's own."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.core.errors import JaxserveError
from jaxserve.core.sampling_defaults import from_generation_config, from_gguf_metadata
from jaxserve.models.config_gguf import from_gguf
from jaxserve.models.config_hf import from_hf_config
from jaxserve.models.config_readers import config_from_dict, config_to_dict
from jaxserve.models.registry import parameter_shapes
from jaxserve.tokenizers import load_tokenizer

# `rounds` is scripts/fuzz.sh's, with a seed per round.
NUM_EXAMPLES = {"fuzz": 20_000, "rounds": 100}.get(settings.get_current_profile_name(), 25)
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

SMALL = st.sampled_from([0, 1, -1, 2, 3, 5, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308])
TEXT = st.text("a<s>\u00e9 0", max_size=4)  # of all Unicode, hypothesis would build tables first
JUNK = st.recursive(
    st.none() | st.booleans() | SMALL | st.floats() | TEXT
    | st.sampled_from(["linear", "llama3", "<s>", "sliding_attention", "model"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to everything inside a JSON value, but for the insides of long lists."""
    inner: list = []
    if isinstance(value, dict):
        inner = list(value)[:40]
    elif isinstance(value, list):
        inner = list(range(min(len(value), 4)))
    return [path] * bool(path) + [p for key in inner for p in places(value[key], (*path, key))]


@st.composite
def damaged(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value with a few places in it changed or missing."""
    value = copy.deepcopy(valid)
    for path in draw(st.lists(st.sampled_from(places(valid)), min_size=1, max_size=3)):
        at = value
        try:
            for key in path[:-1]:
                at = at[key]
            if draw(st.booleans()) and isinstance(at, dict):
                del at[path[-1]]
            else:
                at[path[-1]] = draw(JUNK)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change took the place away
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes, end: int) -> bytes:
    """A file with some of its first bytes changed, or cut off."""
    data = bytearray(valid)
    for at in draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
        size = draw(st.sampled_from([1, 1, 4, 8]))
        data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
    if draw(st.integers(0, 3)) == 0:
        del data[draw(st.integers(0, end)) :]
    return bytes(data)


def served_or_refused(load: Callable[[], object]) -> None:
    try:
        load()
    except JaxserveError as error:
        assert len(str(error)) < 2000


ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
        "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 8, "intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": True, "eos_token_id": [1, 2], "bos_token_id": 1, "is_causal": True,
    "architectures": ["LlamaForCausalLM"], "rope_scaling": ROPE, "hidden_act": "silu",
}  # fmt: skip
QWEN = LLAMA | {
    "model_type": "qwen2", "rope_scaling": None, "use_sliding_window": True, "sliding_window": 4,
    "max_window_layers": 0, "layer_types": ["full_attention"], "architectures": None,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3", "eos_token_id": [1], "vision_config": {},
    "text_config": {k: v for k, v in QWEN.items() if k not in (
        "rope_theta", "hidden_act", "use_sliding_window", "max_window_layers")} | {
        "query_pre_attn_scalar": 4, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip
GENERATION = {"eos_token_id": [1, 2], "bos_token_id": 1, "temperature": 0.5, "top_k": 4,
              "top_p": 0.5, "min_p": 0.1, "max_new_tokens": 9, "num_beams": 1}  # fmt: skip


@pytest.mark.parametrize("valid", [LLAMA, QWEN, GEMMA], ids=["llama", "qwen2", "gemma3"])
def test_config_json(valid: dict) -> None:
    @FUZZ
    @given(data=damaged(valid), generation=damaged(GENERATION), allowed=st.booleans())
    def load(data: dict, generation: dict, allowed: bool) -> None:
        def read() -> None:
            config = from_hf_config(data, generation_config=generation, allow_unknown=allowed)
            parameter_shapes(config)
            from_generation_config(generation, "x")

        served_or_refused(read)

    parameter_shapes(from_hf_config(valid))
    load()


def test_configurations_of_our_own() -> None:
    valid = json.loads(json.dumps(config_to_dict(from_hf_config(LLAMA))))

    @FUZZ
    @given(data=damaged(valid))
    def load(data: dict) -> None:
        served_or_refused(lambda: parameter_shapes(config_from_dict(data)))

    load()


# ---------------------------------------------------------------- GGUF


def gguf_value(value: Any) -> tuple[int, bytes]:
    """A value's type by GGUF's number, and its bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int) and 0 <= value < 2**64:
        return 10, struct.pack("<Q", value)
    if isinstance(value, int | float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        raw = value.encode(errors="replace")
        return 8, struct.pack("<Q", len(raw)) + raw
    items = [gguf_value(item) for item in value or ["none"]]
    kind = items[0][0]
    items = [item for item in items if item[0] == kind]
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(raw for _, raw in items)


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """A GGUF file of float32 tensors; null and objects in the metadata become lists."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, raw = gguf_value(list(value) if isinstance(value, dict) else value)
        out += [gguf_value(key)[1], struct.pack("<I", kind), raw]
    offset = 0
    for name, x in tensors.items():
        shape = struct.pack(f"<{x.ndim}Q", *x.shape[::-1])
        out += [
            gguf_value(name)[1],
            struct.pack("<I", x.ndim),
            shape,
            struct.pack("<IQ", 0, offset),
        ]
        offset += -(-x.nbytes // 32) * 32
    header = b"".join(out)
    body = b"".join(x.tobytes().ljust(-(-x.nbytes // 32) * 32, b"\0") for x in tensors.values())
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + body


ALPHABET = [*(chr(i) for i in range(33, 127)), "\u0120", "\u010a"]
BPE = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "<unk>", *ALPHABET, "th", "the"],
    "tokenizer.ggml.token_type": [3, 3, 2, *[1] * (len(ALPHABET) + 2)],
    "tokenizer.ggml.merges": ["t h", "th e"],
}  # fmt: skip
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *ALPHABET, "th", "the"],
    "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (len(ALPHABET) + 2)],
    "tokenizer.ggml.scores": [-float(i) for i in range(len(ALPHABET) + 5)],
    "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_space_prefix": True,
}  # fmt: skip
GGUF = {
    "general.architecture": "llama", "general.type": "model", "general.alignment": 32,
    "general.sampling.temp": 0.5, "llama.context_length": 64, "llama.embedding_length": 8,
    "llama.feed_forward_length": 6, "llama.block_count": 1, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.attention.key_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
    "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0,
    "llama.rope.dimension_count": 4, "split.count": 0, "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 1,
    "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True,
    "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}  # fmt: skip
LAYER = {
    "attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8),
    "attn_output": (8, 8), "ffn_norm": (8,), "ffn_gate": (6, 8), "ffn_up": (6, 8),
    "ffn_down": (8, 6),
}  # fmt: skip


def gguf_tensors() -> dict[str, np.ndarray]:
    shapes = {"token_embd": (len(ALPHABET) + 5, 8), "output_norm": (8,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in LAYER.items()}
    return {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("the cat")
    tokenizer.decode(ids)
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "the"}])


def use_gguf(path: Path) -> None:
    served_or_refused(lambda: open_checkpoint(path).read("layers.0.qkv"))
    served_or_refused(lambda: use_tokenizer(path))


@pytest.mark.parametrize("vocabulary", [BPE, PIECES], ids=["bpe", "sentencepiece"])
def test_gguf_metadata(tmp_path: Path, vocabulary: dict) -> None:
    path, tensors, valid = tmp_path / "x.gguf", gguf_tensors(), {**GGUF, **vocabulary}
    path.write_bytes(gguf_bytes(valid, tensors))
    open_checkpoint(path).read("layers.0.qkv")
    use_tokenizer(path)

    @FUZZ
    @given(metadata=damaged(valid))
    def load(metadata: dict) -> None:
        served_or_refused(lambda: from_gguf(metadata, allow_unknown=True))
        served_or_refused(lambda: from_gguf_metadata(metadata, "x"))
        path.write_bytes(gguf_bytes(metadata, tensors))
        use_gguf(path)

    load()


def test_gguf_bytes(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.gguf", gguf_tensors()
    valid = gguf_bytes({**GGUF, **BPE}, tensors)
    end = len(valid) - sum(-(-x.nbytes // 32) * 32 for x in tensors.values())

    @FUZZ
    @given(data=damaged_bytes(valid, end))
    def load(data: bytes) -> None:
        path.write_bytes(data)
        use_gguf(path)

    load()


# ---------------------------------------------------------------- directories of Hugging Face


def hf_tensors() -> dict[str, np.ndarray]:
    shapes = {"embed_tokens": (300, 8), "norm": (8,)}
    shapes |= {f"layers.0.self_attn.{x}_proj": (8, 8) for x in "qo"}
    shapes |= {f"layers.0.self_attn.{x}_proj": (4, 8) for x in "kv"}
    shapes |= {f"layers.0.mlp.{x}_proj": (6, 8) for x in ("gate", "up")}
    shapes["layers.0.mlp.down_proj"] = (8, 6)
    shapes |= {f"layers.0.{x}_layernorm": (8,) for x in ("input", "post_attention")}
    return {f"model.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_safetensors_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    file, valid = tmp_path / "model.safetensors", save(hf_tensors())
    file.write_bytes(valid)
    open_checkpoint(tmp_path).read("layers.0.qkv")
    end = 8 + int.from_bytes(valid[:8], "little")

    @FUZZ
    @given(data=damaged_bytes(valid, end))
    def load(data: bytes) -> None:
        file.write_bytes(data)
        served_or_refused(lambda: open_checkpoint(tmp_path).read("layers.0.qkv"))

    load()


def tokenizer_json() -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(BPE["tokenizer.ggml.tokens"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 0)]
    )
    return json.loads(backend.to_str())


FILES: dict[str, dict] = {
    "tokenizer.json": tokenizer_json(),
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True,
        "add_eos_token": True, "chat_template": [
            {"name": "default", "template": "{{ messages[0].content }}"}],
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
        "extra_special_tokens": {"image_token": "<i>"}, "pad_token": None,
    },
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "unk_token": "<unk>"},
    "generation_config.json": GENERATION,
    "config.json": LLAMA,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_tokenizer_files(tmp_path: Path, name: str) -> None:
    for file, content in FILES.items():
        (tmp_path / file).write_text(json.dumps(content))
    use_tokenizer(tmp_path)

    @FUZZ
    @given(content=damaged(FILES[name]))
    def load(content: Any) -> None:
        (tmp_path / name).write_text(json.dumps(content))
        served_or_refused(lambda: use_tokenizer(tmp_path))

    load()


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"{}", b"3", b'{"a": ' + b"9" * 5000])
@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json"])
def test_files_that_are_no_json_object(tmp_path: Path, name: str, content: bytes) -> None:
    for file, given_content in FILES.items():
        (tmp_path / file).write_text(json.dumps(given_content))
    (tmp_path / name).write_bytes(content)
    served_or_refused(lambda: use_tokenizer(tmp_path))
    served_or_refused(lambda: open_checkpoint(tmp_path))
