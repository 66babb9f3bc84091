"""Every kind of tokenizer can spell an answer in a grammar, and its text is what was allowed."""

import json

import numpy as np
import pytest

from jaxserve.core.errors import RequestFailed
from jaxserve.core.grammar import Grammar
from jaxserve.engine.grammars import GrammarCompiler, MaskFiller
from jaxserve.tokenizers import Tokenizer
from jaxserve.tokenizers.detokenizer import IncrementalDetokenizer

SCHEMA = {
    "type": "object",
    "properties": {"naïve": {"enum": ["quick brown", "1", "日本語 \U0001f600"]}},
    "required": ["naïve"],
    "additionalProperties": False,
}
KINDS = ["byte_tokenizer", "llama_like", "smollm2", "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_walks_through_a_grammar_spell_its_texts(kind: str, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    vocab_size = tokenizer.vocab_size + 40  # padded, as models pad theirs
    compiler, masks = GrammarCompiler(tokenizer, vocab_size), MaskFiller(vocab_size)
    random = np.random.default_rng(0)
    texts = set()
    for _ in range(12):
        matcher = compiler.compile(Grammar("json_schema", json.dumps(SCHEMA)))
        detokenizer = IncrementalDetokenizer(tokenizer, continues_text=True)
        text = ""
        while True:
            [state] = masks.fill([matcher])
            assert not isinstance(state, RequestFailed)
            bits = np.unpackbits(state.mask.view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            if not len(allowed):
                assert state.is_complete
                break
            assert allowed[-1] < tokenizer.vocab_size
            assert not tokenizer.special_ids & set(allowed.tolist())
            # Blanks are dull: they are taken only where there is nothing else.
            printed = [t for t in allowed.tolist() if tokenizer.token_bytes(t).strip()]
            token = int(random.choice(printed or allowed))
            matcher.push(token)
            text += detokenizer.push(token)
        texts.add(json.loads(text + detokenizer.flush())["naïve"])
    assert texts <= set(SCHEMA["properties"]["naïve"]["enum"]) and len(texts) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_tokenizer_encodes_fits(kind: str, request: pytest.FixtureRequest):
    """A model may spell a text as it was taught: the usual tokens are all allowed."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    text = "the quick brown fox, 1 2 3 日本語"
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Where the encoder puts a space before a text, the first token has it.
    matcher = compiler.compile(Grammar("regex", " ?the .*"))
    for token in ids:
        matcher.push(token)
    [state] = MaskFiller(tokenizer.vocab_size).fill([matcher])
    assert not isinstance(state, RequestFailed) and state.is_complete
