"""What is saved is what is loaded again; and what is not a tokenizer is refused."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from jaxserve.core.errors import CheckpointError
from jaxserve.tokenizers import Tokenizer, load_tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

TEXT = "Hello <|im_start|>w\u00f6rld<bos>\n\n  12345 \U0001f600 <|user|>hi <s>x"


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "llama_like", "byte_tokenizer"])
def test_round_trip(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    original: Tokenizer = request.getfixturevalue(name)
    original.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    ids = original.encode(TEXT)
    assert loaded.encode(TEXT) == ids
    assert loaded.settings == original.settings
    assert loaded.vocab_size == original.vocab_size
    assert loaded.special_ids == original.special_ids
    sample = range(0, original.vocab_size, 1 + original.vocab_size // 3000)
    for skip in (True, False):
        assert loaded.decode(ids, skip_special_tokens=skip) == original.decode(
            ids, skip_special_tokens=skip
        )
        assert all(
            loaded.token_bytes(i, skip_special_tokens=skip)
            == original.token_bytes(i, skip_special_tokens=skip)
            for i in sample
        )


def test_save_over_another_kind(byte_tokenizer: Tokenizer, llama_like: Tokenizer, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("old")
    byte_tokenizer.save(tmp_path)
    llama_like.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("hello") == llama_like.encode("hello")
    assert load_tokenizer(tmp_path).chat_template is None


def test_sentencepiece_file(llama_like: Tokenizer):
    ids = llama_like.encode("hello <|user|>w\u00f6rld")
    assert ids[0] == llama_like.bos_token_id == 1  # the default of this kind
    assert llama_like.eos_token_ids == (2,)
    assert llama_like.decode(ids) == "hello <|user|>w\u00f6rld"
    # A control token in the text is one id; each part around it gets the model's space.
    around = llama_like.encode("hello<s>world", add_special_tokens=False)
    hello = llama_like.encode("hello", add_special_tokens=False)
    world = llama_like.encode("world", add_special_tokens=False)
    assert around == [*hello, 1, *world]


def _write(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_configuration_files(byte_tokenizer: Tokenizer, tmp_path: Path):
    byte_tokenizer.save(tmp_path)
    _write(
        tmp_path,
        tokenizer_config__json={
            "bos_token": {"content": "<bos>"},
            "eos_token": "<eos>",
            "add_bos_token": False,
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": "yes"},
            ],
        },
        generation_config__json={"eos_token_id": [257, 0]},
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_token_id == 256
    assert loaded.encode("a") == [97]  # add_bos_token is explicit
    assert loaded.eos_token_ids == (257, 0)
    assert loaded.chat_template == "yes"
    _write(tmp_path, chat_template__jinja="newer")
    assert load_tokenizer(tmp_path / "tokenizer.json").chat_template == "newer"


def test_ends_of_turns_are_eos_for_chat_models(tmp_path: Path):
    directory = tmp_path
    ByteTokenizer().save(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).eos_token_ids == (257, 258)
    _write(directory, tokenizer_config__json={"eos_token": "<eos>"})
    assert load_tokenizer(directory).eos_token_ids == (257,)


def test_post_processor_adds_bos_without_configuration(smollm2: Tokenizer, tmp_path: Path):
    smollm2.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    _write(tmp_path, tokenizer__json=backend)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("Hi") == [1, *smollm2.encode("Hi")]
    assert loaded.eos_token_ids == (2,)


def test_refuses_what_is_no_tokenizer(tmp_path: Path):
    with pytest.raises(CheckpointError, match="neither tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing.gguf")
    for name in ("a.json", "a.model", "a.gguf", "a.txt"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_tokenizer(tmp_path / name)
    word_piece = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    word_piece.decoder = decoders.WordPiece()
    word_piece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="its decoder is WordPiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"bos_token_id": 9999}, "9999 is beyond the vocabulary of"),
        ({"bos_token_id": "1"}, "'1' is not a token id"),
        ({"eos_token_id": [1, None]}, "not a token id or a list"),
    ],
)
def test_token_ids_that_are_none(llama_like_model: bytes, tmp_path: Path, generation, message):
    (tmp_path / "tokenizer.model").write_bytes(llama_like_model)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_end_tokens_may_lie_beyond_the_tokenizer(llama_like_model: bytes, tmp_path: Path):
    """Models have room for more tokens than their tokenizers name; -1 stands for none."""
    (tmp_path / "tokenizer.model").write_bytes(llama_like_model)
    generation = {"eos_token_id": [9999, 2], "bos_token_id": -1}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(tmp_path).eos_token_ids == (9999, 2)
