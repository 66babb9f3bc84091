"""Each of llama.cpp's pre-tokenizers cuts a text as its regular expressions say."""

from pathlib import Path

import pytest
import regex

from jaxserve.tokenizers import load_tokenizer
from jaxserve.tokenizers.gguf_words import WORD_RULES
from jaxserve.tokenizers.huggingface import byte_level_alphabet
from tests.tokenizers.test_gguf_tokenizer import write_gguf

# The names that llama.cpp knows, but for jina-v1-en, jina-v2-code, roberta-bpe and whitespace,
# which are encoders' and put a separator behind a text or have other tokens.
NAMES = [
    name
    for line in (
        "default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        "jina-v5-nano deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder",
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert",
        "jais-2 gemma4 granite-embed-multi-311m sarvam-moe refact command-r qwen2",
        "deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat glm4",
        "chatglm-bpe viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4",
        "exaone-moe chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie",
        "granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling bailingmoe",
        "bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka",
        "grok-2 afmoe laguna minimax-m2 solar-open mellum2",
    )
    for name in line.split()
]

HARD = (
    "Hello, World's best 'LL can't WE'RE getUserName iPhone HTTPServer 1 22 333 4444 55555 1234567"
    "  two   spaces\t\ttabs \n\n  lines\r\n \r\nend.\n   \u3000wide  x=y<=z|`$^~ #$%&/path/to "
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8\u3001\u6f22\u5b57\u3002 \ud55c\uad6d\uc5b4 "
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0420\u0443\u0441\u0441\u043a\u0438\u0439 "
    "na\u00efve e\u0301t\u00e9 \u0661\u0662\u0663\u0664 \u00bd\u00b2 \U0001f600\U0001f468\u200d"
    "\U0001f469 <sentinel:12> IMGIMGABZ \u3105\u2014\u201cq\u201d \u1f7d\u1fd3 \u212a"
    + " " * 37 + "a" + "\n" * 5 + " " * 9
)  # fmt: skip


def words(name: str, text: str) -> list[str]:
    """The words that a rule's pre-tokenizer makes."""
    rule = WORD_RULES[name]
    pieces = [piece for piece, _ in rule.pre_tokenizer().pre_tokenize_str(text)]
    if not rule.is_byte_level:
        return pieces
    alphabet = byte_level_alphabet()
    return [bytes(alphabet[c] for c in piece).decode() for piece in pieces]


def cut(patterns: tuple[str, ...], text: str) -> list[str]:
    """The words by the `regex` package: of each piece its matches, and what is between them."""
    pieces = [text]
    for pattern in patterns:
        compiled = regex.compile(pattern, regex.VERSION1)
        finer: list[str] = []
        for piece in pieces:
            end = 0
            for match in compiled.finditer(piece):
                finer += [piece[end : match.start()], match[0]]
                end = match.end()
            finer.append(piece[end:])
        pieces = [piece for piece in finer if piece]
    return pieces


def test_all_names_are_known():
    assert set(NAMES) <= set(WORD_RULES)


@pytest.mark.parametrize("name", sorted(WORD_RULES))
def test_words_are_those_of_the_expressions(name: str):
    made = words(name, HARD)
    assert "".join(made) == HARD
    assert made == cut(WORD_RULES[name].patterns, HARD)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'll 1234  x", ["I", "'ll", " 1234", " ", " x"]),
        ("starcoder", "a 12", ["a", " ", "1", "2"]),
        ("default", "a1234 b.c", ["a", "123", "4", " b", ".", "c"]),
        ("falcon", "x`12345", ["x", "`", "123", "45"]),
        ("llama-bpe", "It'S 12345\n\n x", ["It", "'S", " ", "123", "45", "\n\n", " x"]),
        ("qwen2", "12 ab", ["1", "2", " ab"]),
        ("qwen35", "\u0939\u093f 1", ["\u0939\u093f", " ", "1"]),
        ("tekken", "HelloWorld 123/\n", ["Hello", "World", " ", "1", "2", "3", "/\n"]),
        ("gpt-4o", "HelloWORLD's 1234", ["Hello", "WORLD's", " ", "123", "4"]),
        ("kimi-k2", "getUserName \u6f22a", ["get", "User", "Name", " ", "\u6f22", "a"]),
        ("deepseek-v3", "x 12345 \u6f22\u5b57.foo", ["x", " ", "123", "45", " ", "\u6f22\u5b57",
                                                     ".foo"]),
        ("deepseek-llm", " Ab1 2\n", [" Ab", "1", " ", "2", "\n"]),
        ("deepseek-coder", "a_b 12", ["a", "_", "b", " ", "1", "2"]),
        ("superbpe", "1234567 x", ["1", "234", "567", " x"]),
        ("tiny_aya", "1234567 x", ["1", "234", "567", " x"]),
        ("afmoe", "12345", ["12", "345"]),
        ("bloom", "Hi, you. 12", ["Hi", ",", " you", ".", " 12"]),
        ("viking", "a 12", ["a", " ", "1", "2"]),
        ("chameleon", "a.b 1    c", ["a", ".", "b", " ", "1", "    ", "c"]),
        ("jais-2", "a" + " " * 7 + "b", ["a", " " * 4, "  ", " b"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
        ("command-r", "x 10", ["x", " ", "1", "0"]),
        ("seed-coder", "a!\nb", ["a", "!", "\n", "b"]),
        ("exaone-moe", "two words 1", ["two words", " ", "1"]),
        ("ufakzeka", "Ali'ye", ["Ali", "'ye"]),
        ("laguna", "a \nb", ["a", " ", "\n", "b"]),
    ],
)  # fmt: skip
def test_words_that_were_worked_out_by_hand(name: str, text: str, expected: list[str]):
    assert words(name, text) == expected


def test_what_goes_with_the_words():
    bos = {"llama3", "llama-bpe", "falcon3", "tekken", "chameleon", "gemma4", "lfm2", "pixtral"}
    assert bos <= {name for name, rule in WORD_RULES.items() if rule.adds_bos}
    assert not any(WORD_RULES[n].adds_bos for n in ("qwen2", "gpt-4o", "deepseek-v3", "smollm"))
    whole = {name for name, rule in WORD_RULES.items() if rule.ignores_merges}
    assert {"llama3", "tekken", "youtu", "minicpm5", "granite-embed-multi-97m"} <= whole
    assert not {"gpt-2", "qwen2", "gpt-4o", "gemma4"} & whole


def test_gemma4_merges_characters(tmp_path: Path):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581", "a", "b", "\n", "\u2581a", "\u2581ab", "\n\n"]
    tokens = ["<bos>", *letters, *bytes_]
    path = write_gguf(
        tmp_path / "a.gguf",
        model="gemma4",
        tokens=tokens,
        token_type=[3, *[1] * len(letters), *[6] * 256],
        merges=["\u2581 a", "\u2581a b", "\n \n"],
        bos_token_id=0,
    )
    tokenizer = load_tokenizer(path)
    text = " ab a\n\n\n\u00e9"
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids] == [
        "<bos>", "\u2581ab", "\u2581a", "\n\n", "\n", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(text) == ids
