"""Small GGUF files, written by the gguf package, with vocabularies of every known kind."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers

from jaxserve.core.errors import CheckpointError
from jaxserve.tokenizers import Tokenizer, load_tokenizer
from jaxserve.tokenizers.huggingface import byte_level_alphabet


def write_gguf(path: Path, **entries: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        folder = "tokenizer" if name.startswith("chat_template") else "tokenizer.ggml"
        key = f"{folder}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path: Path, pre: str, **more: Any) -> Tokenizer:
    """A byte-level BPE that merges digits as far as the word cutter lets it."""
    alphabet = sorted(byte_level_alphabet(), key=byte_level_alphabet().__getitem__)
    merges = ["1 1", "11 11", "a b", "b c", "ab c", "\u0120 ab"]
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges), "<s>", "<|eot_id|>", "</s>"]
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 3) + [3, 3, 3],
        "merges": merges,
        "bos_token_id": len(tokens) - 3,
        "eos_token_id": len(tokens) - 1,
    }
    return load_tokenizer(write_gguf(path, **(entries | more)))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.token_bytes(i).decode() for i in ids]


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("default", ["11", "1", "11"]),  # of three digits each
        ("gpt-2", ["1111", "1"]),
        ("smollm", ["1"] * 5),
        ("qwen2", ["1"] * 5),
        ("llama-bpe", ["11", "1", "11"]),  # words of up to three digits
    ],
)
def test_word_cutters(pre: str, digits: list[str], tmp_path: Path):
    tokenizer = byte_level(tmp_path / "a.gguf", pre)
    assert pieces(tokenizer, "11111") == digits
    text = "abc ab  1\u00e9\n\n ab<s>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_llama3_keeps_whole_words(tmp_path: Path):
    # By the merges "xyz" never comes to be; Llama 3 takes it as it is a token.
    alphabet = sorted(byte_level_alphabet(), key=byte_level_alphabet().__getitem__)
    tokens = [*alphabet, "xy", "xyz"]
    more = {"tokens": tokens, "token_type": [1] * 258, "merges": ["x y"], "bos_token_id": 0}
    assert pieces(byte_level(tmp_path / "a.gguf", "llama-bpe", **more), "xyz") == ["xyz"]
    assert pieces(byte_level(tmp_path / "b.gguf", "gpt-2", **more), "xyz") == ["xy", "z"]


def test_bos_of_byte_level(tmp_path: Path):
    bos = 262
    assert byte_level(tmp_path / "a.gguf", "gpt-2").encode("a") == [97]
    assert byte_level(tmp_path / "b.gguf", "llama-bpe").encode("a") == [bos, 97]
    tokenizer = byte_level(tmp_path / "c.gguf", "gpt-2", add_bos_token=True, add_eos_token=True)
    assert tokenizer.encode("a") == [bos, 97, 264]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("a") == [bos, 97, 264]
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert saved.encode("a").ids == [bos, 97, 264]


def test_eos_of_chat_models(tmp_path: Path):
    assert byte_level(tmp_path / "a.gguf", "gpt-2").eos_token_ids == (264,)
    chat = byte_level(tmp_path / "b.gguf", "gpt-2", chat_template="{{ bos_token }}x")
    assert chat.eos_token_ids == (264, 263)  # and <|eot_id|>
    assert chat.apply_chat_template([]) == [262, ord("x")]
    marked = byte_level(tmp_path / "c.gguf", "gpt-2", eot_token_id=5)
    assert marked.eos_token_ids == (264, 5)


def test_unknown_kinds(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre = 'mystery'"):
        byte_level(tmp_path / "a.gguf", "mystery")
    with pytest.raises(CheckpointError, match="'rwkv'"):
        load_tokenizer(write_gguf(tmp_path / "b.gguf", model="rwkv", tokens=["a"]))
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        load_tokenizer(write_gguf(tmp_path / "c.gguf"))
    with pytest.raises(CheckpointError, match="merges do not fit"):
        byte_level(tmp_path / "d.gguf", "gpt-2", merges=["q q"])


def test_sentencepiece_from_gguf_is_the_model_it_came_from(
    llama_like: Tokenizer, llama_like_model: bytes, tmp_path: Path
):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(llama_like_model)
    size = processor.piece_size()
    kinds = [1] * size
    for i in range(size):
        if processor.is_unknown(i):
            kinds[i] = 2
        elif processor.is_control(i):
            kinds[i] = 3
        elif processor.id_to_piece(i) == "<|user|>":
            kinds[i] = 4
        elif processor.is_byte(i):
            kinds[i] = 6
    path = write_gguf(
        tmp_path / "a.gguf",
        model="llama",
        tokens=[processor.id_to_piece(i) for i in range(size)],
        scores=[processor.get_score(i) for i in range(size)],
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
    )
    rebuilt = load_tokenizer(path)
    assert rebuilt.settings == llama_like.settings
    for text in ("hello world", "  the  lazy dog ", "z\u00fcrich \u65e5\n", "<s>hello</s> 12", ""):
        assert rebuilt.encode(text) == llama_like.encode(text)
        assert rebuilt.decode(rebuilt.encode(text)) == llama_like.decode(llama_like.encode(text))
    # In GGUF files as in llama.cpp there is no space before a user's own token.
    ids = rebuilt.encode("<|user|>the", add_special_tokens=False)
    assert ids[0] == processor.piece_to_id("<|user|>")
    rebuilt.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("<|user|>the") == rebuilt.encode("<|user|>the")
