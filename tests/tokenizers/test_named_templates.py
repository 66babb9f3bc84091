"""Which of a checkpoint's chat templates is taken, and the special tokens that it may write."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import CheckpointError, InvalidRequest
from jaxserve.tokenizers import Tokenizer, load_tokenizer
from tests.tokenizers.test_gguf_tokenizer import byte_level

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
NAMED = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"},
    {"name": "rag", "template": "never"},
]


def loaded(source: Tokenizer, directory: Path, **files: Any) -> Tokenizer:
    """A tokenizer from a folder with these files beside its vocabulary."""
    source.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key != "chat_template"}
    files["tokenizer_config.json"] = config | files.get("tokenizer_config.json", {})
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text)
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("files", "plain", "with_tools"),
    [
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "plain", "f"),
        ({"tokenizer_config.json": {"chat_template": NAMED}, "chat_template.jinja": "x{{ tools }}"},
         "xNone", None),  # a file is all there is, as in transformers
        ({"chat_template.jinja": "plain",
          "additional_chat_templates/tool_use.jinja": "{{ tools | length }}",
          "additional_chat_templates/rag.jinja": "{"}, "plain", "1"),
        ({"chat_template.json": {"chat_template": "old"}}, "old", None),
    ],
)  # fmt: skip
def test_a_template_is_chosen(
    files: dict[str, Any], plain: str, with_tools: str | None,
    byte_tokenizer: Tokenizer, tmp_path: Path,
):  # fmt: skip
    tokenizer = loaded(byte_tokenizer, tmp_path, **files)
    assert tokenizer.render_chat(USER).text == plain
    if with_tools is not None:
        assert "tools" in tokenizer.chat_variables
        assert tokenizer.render_chat(USER, tools=TOOLS).text == with_tools
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.settings == tokenizer.settings
    again.save(tmp_path)  # over other files
    assert load_tokenizer(tmp_path).settings == tokenizer.settings


def test_only_a_template_for_tools(byte_tokenizer: Tokenizer, tmp_path: Path):
    files = {"tokenizer_config.json": {"chat_template": NAMED[1:]}}
    tokenizer = loaded(byte_tokenizer, tmp_path, **files)
    assert tokenizer.render_chat(USER, tools=TOOLS).text == "f"
    with pytest.raises(InvalidRequest, match="no chat template for conversations without tools"):
        tokenizer.render_chat(USER)


def test_broken_entries(byte_tokenizer: Tokenizer, tmp_path: Path):
    files: dict[str, Any] = {"tokenizer_config.json": {"chat_template": [{"name": 1}]}}
    with pytest.raises(CheckpointError, match="a chat template without a name"):
        loaded(byte_tokenizer, tmp_path, **files)
    with pytest.raises(CheckpointError, match="neither a text nor a list"):
        loaded(byte_tokenizer, tmp_path, **{"tokenizer_config.json": {"chat_template": 5}})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot read a chat template"):
        load_tokenizer(tmp_path)


def test_special_tokens_are_written(byte_tokenizer: Tokenizer, tmp_path: Path):
    template = (
        "{{ pad_token }}|{{ unk_token }}|{{ sep_token }}|{{ image_token }}|"
        "{{ additional_special_tokens | join(' ') }}|{{ mask_token is defined }}"
    )
    config = {
        "pad_token": {"content": "<pad>"},
        "unk_token": "<unk>",
        "mask_token": None,
        "extra_special_tokens": {"image_token": "<image>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "chat_template": template,
    }
    files = {"tokenizer_config.json": config, "special_tokens_map.json": {"sep_token": "<sep>"}}
    tokenizer = loaded(byte_tokenizer, tmp_path, **files)
    assert tokenizer.render_chat(USER).text == "<pad>|<unk>|<sep>|<image>|<a> <b>|False"
    with pytest.raises(InvalidRequest, match="pad_token is not for a request to set"):
        tokenizer.render_chat(USER, chat_template_kwargs={"pad_token": "x"})
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").render_chat(USER).text.startswith("<pad>|<unk>|<sep>")


def test_named_templates_of_gguf(tmp_path: Path):
    path = tmp_path / "a.gguf"
    templates = {
        "chat_template": "{{ unk_token }}{{ pad_token }}",
        "chat_template.tool_use": "{{ tools | length }}",
    }
    tokenizer = byte_level(path, "gpt-2", unknown_token_id=262, padding_token_id=263, **templates)
    assert tokenizer.render_chat(USER).text == "<s><|eot_id|>"
    assert tokenizer.render_chat(USER, tools=TOOLS).text == "1"
    assert tokenizer.eos_token_ids == (264, 263)
