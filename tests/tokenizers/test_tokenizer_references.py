"""The demo models' tokenizers against ids from transformers and llama.cpp.

references.json comes from scripts/make_tokenizer_references.py. The two agreed on every string
when it was made; were they not to, its entry would have no "ids" and this test would say so.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers import Tokenizer

REFERENCES = json.loads((Path(__file__).parent / "references.json").read_text())
MODELS = sorted(REFERENCES)
CASES = [(model, row) for model in MODELS for row in REFERENCES[model]["strings"]]


@pytest.mark.parametrize(("model", "row"), CASES)
def test_ids_and_round_trip(model: str, row: dict[str, Any], request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(model)
    ids = tokenizer.encode(row["text"], add_special_tokens=False)
    assert ids == row["ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == row["text"]


@pytest.mark.parametrize("model", MODELS)
def test_added_tokens(model: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(model)
    assert tokenizer.encode("Hi") == REFERENCES[model]["hi_with_added_tokens"]


@pytest.mark.parametrize("chat", REFERENCES["smollm2"]["chats"])
def test_chat_template(chat: dict[str, Any], smollm2: Tokenizer):
    arguments = {"add_generation_prompt": chat["add_generation_prompt"]}
    assert smollm2.render_chat(chat["messages"], **arguments).text == chat["text"]
    ids = smollm2.apply_chat_template(chat["messages"], **arguments)
    assert smollm2.decode(ids, skip_special_tokens=False) == chat["text"]
    assert ids[0] == smollm2.token_to_id("<|im_start|>")


def test_special_tokens(smollm2: Tokenizer, gemma3: Tokenizer):
    assert (smollm2.vocab_size, gemma3.vocab_size) == (49152, 262144)
    assert (smollm2.bos_token_id, gemma3.bos_token_id) == (1, 2)
    assert smollm2.eos_token_ids == (2,)
    assert gemma3.eos_token_ids == (1,)  # a base model: turns do not end its text
    assert gemma3.chat_template is None
    with pytest.raises(InvalidRequest, match="no chat template"):
        gemma3.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("model", MODELS)
def test_token_bytes(model: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(model)
    text = "na\u00efve \U0001fae8 \u65e5\u672c \t x"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.token_bytes(tokenizer.bos_token_id or 0) == b""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""


@pytest.mark.parametrize("model", MODELS)
def test_lone_surrogate_is_refused(model: str, request: pytest.FixtureRequest):
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        request.getfixturevalue(model).encode("a\ud800")
