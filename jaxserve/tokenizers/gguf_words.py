"""How byte-level BPE tokenizers cut a text into words, by the names that GGUF files have for it.

Each model has its own regular expressions, from the tokenizer.json that it was trained with. GGUF
files name them in `tokenizer.ggml.pre`; the names are those of llama.cpp's converter.
"""

import dataclasses
from collections.abc import Iterator

from tokenizers import Regex, decoders, normalizers, pre_tokenizers

# Parts of the expressions.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _cased(after: str = "", without: str = "") -> str:
    """Words of one case or with a capital; `after` may end them, `without` is taken out."""
    upper, lower = f"[{_UPPER}{without}]", f"[{_LOWER}{without}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{after}|{before}{upper}+{lower}*{after}"


def _llama3(digits: str = r"\p{N}{1,3}", word: str = _WORD, spaces: str = _SPACES) -> str:
    return f"{_CONTRACTIONS}|{word}|{digits}|{_SIGNS}|{spaces}"


def _deepseek(signs: str = r" ?[\p{P}\p{S}]+[\r\n]*", spaces: str = _SPACES) -> str:
    words = rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    return f"{words}|{signs}|{spaces}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = _llama3(r"\p{N}")
_GPT4O_END = rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = f"{_cased(f'{_CONTRACTIONS}?')}|{_GPT4O_END}"


def _chars(ranges: str) -> str:
    """The inside of a character class, from code points and ranges of them in hexadecimal."""
    return "".join("-".join(chr(int(end, 16)) for end in r.split("-")) for r in ranges.split())


_BLOOM = rf" ?[^(\s|.,!?{_chars('2026 3002 ff0c 3001 0964 06d4 060c')})]+"
_HAN_KANA = f"[{_chars('4e00-9fa5 3040-309f 30a0-30ff')}]+"
_HAN_HANGUL = f"[{_chars('4e00-9fa5 0800-4e00 ac00-d7ff')}]+"
_ASIAN_SCRIPTS = _chars(
    "4e00-9fff 3400-4dbf f900-faff 3040-309f 30a0-30ff ff65-ff9f 2f00-2fdf 0e40-0e7f 0e80-0eff "
    "1780-17ff 1000-109f aa60-aa7f a9e0-a9ff ac00-d7af 1100-11ff"
)
_YOUTU_SCRIPTS = "|".join(
    f"[{_chars(ranges)}]+"
    for ranges in (
        "ac00-d7a3 3131-318e",
        "ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f",
        "3105-312f",
    )
)
# The letters with cases that DeepSeek LLM's tokenizer lists, as of its version of Unicode.
_CASED_LETTERS = _chars(
    "0041-005a 0061-007a 00b5 00c0-00d6 00d8-00f6 00f8-01ba 01bc-01bf 01c4-0293 0295-02af "
    "0370-0373 0376 0377 037b-037d 037f 0386 0388-038a 038c 038e-03a1 03a3-03f5 03f7-0481 "
    "048a-052f 0531-0556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 "
    "1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d "
    "1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 "
    "1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 "
    "213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d "
    "a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a "
    "10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_WIDE_SIGNS = _chars("0021-002f 003a-007e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_HALVED_SPACES = "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1))


@dataclasses.dataclass(frozen=True)
class WordRule:
    """One way to cut a text into words.

    Attributes:
        patterns: regular expressions, each for what the ones before have left apart: its matches
            are words, and so is what is between them.
        adds_bos: a text begins with BOS, unless the file says otherwise.
        ignores_merges: a word that is a token is one, whatever the merges say.
        composes: the text is brought into Unicode's composed form first.
        is_byte_level: words are merged from bytes; else from characters, with U+2581 for spaces.
    """

    patterns: tuple[str, ...]
    adds_bos: bool = False
    ignores_merges: bool = False
    composes: bool = False
    is_byte_level: bool = True

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """What does it, in the `tokenizers` library."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        if self.is_byte_level:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """What a text goes through before, if anything."""
        if not self.is_byte_level:
            return normalizers.Replace(" ", "\u2581")
        return normalizers.NFC() if self.composes else None

    def decoder(self) -> decoders.Decoder:
        """What makes text of tokens again."""
        if self.is_byte_level:
            return decoders.ByteLevel()
        return decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def _rules() -> Iterator[tuple[str, WordRule]]:
    """Names, several in one string where they mean the same, and their rules."""
    yield (
        "gpt-2 gpt2 phi-2 mpt olmo jais trillion granite-docling jina-es jina-de jina-v2-es "
        "jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4",
        WordRule((_GPT2,)),
    )
    yield (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        WordRule((r"\p{N}", _GPT2)),
    )
    signs = r"[\p{P}\$\+<=>\^~\|]+"
    yield "default", WordRule((signs, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
    yield "falcon", WordRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))
    yield (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        WordRule((_llama3(),), adds_bos=True, ignores_merges=True),
    )
    yield "dbrx smaug-bpe glm4 chatglm-bpe", WordRule((_llama3(),))
    short_spaces = rf"\s*[\r\n]+|{_HALVED_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}"
    yield "jais-2", WordRule((_llama3(spaces=short_spaces),))
    yield "qwen2 deepseek-r1-qwen f2llmv2 megrez", WordRule((_QWEN2,), composes=True)
    yield "kormo stablelm2 hunyuan solar-open grok-2", WordRule((_QWEN2,))
    marks = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    words = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+"
    yield "qwen35", WordRule((rf"{words}|\p{{N}}|{marks}|{_SPACES}",), composes=True)
    yield "ufakzeka", WordRule((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}",))
    yield "laguna", WordRule((r"[^\n]+|[\n]+", _QWEN2))
    yield "minicpm5", WordRule((r"\p{N}{1,3}", _llama3(r"\p{N}+")), ignores_merges=True)
    lines = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
    yield "seed-coder", WordRule((lines,))
    single = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+"
    yield "bailingmoe bailingmoe2 llada-moe", WordRule((single,))
    phrases = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
    ends = r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    yield "exaone-moe", WordRule((rf"{_CONTRACTIONS}|{phrases}|\p{{N}}|{ends}",))
    tekken = rf"{_cased()}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    yield "tekken", WordRule((tekken,), adds_bos=True, ignores_merges=True)
    yield "gpt-4o llama4 kanana2 talkie minimax-m2", WordRule((_GPT4O,))
    yield "granite-embed-multi-97m", WordRule((_GPT4O,), ignores_merges=True)
    yield "tiny_aya cohere2moe", WordRule((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))
    youtu = rf"{_cased(f'{_CONTRACTIONS}?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    yield "youtu", WordRule((f"{_YOUTU_SCRIPTS}|{_HAN_KANA}", youtu), ignores_merges=True)
    kimi = _cased(f"{_CONTRACTIONS}?", r"&&[^\p{Han}]")
    yield "kimi-k2", WordRule((rf"[\p{{Han}}]+|{kimi}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",))
    three = r"\p{N}{1,3}"
    yield (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        WordRule((three, _HAN_KANA, _deepseek())),
    )
    spark = _deepseek(r" ?[\p{P}\p{S}]+", r"[\r\n]|\s+(?!\S)|\s+")
    yield "spark2_5", WordRule((three, _HAN_KANA, spark, r"\p{N}"))
    grouped = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
    yield "afmoe", WordRule((grouped, f"[{_ASIAN_SCRIPTS}]+", _deepseek()))
    letters = rf"\s?[{_CASED_LETTERS}]+"
    wide = rf"\s?[{_WIDE_SIGNS}]+"
    yield (
        "deepseek-llm",
        WordRule((r"[\r\n]", letters, wide, r"\s+$", _HAN_HANGUL, r"\p{N}")),
    )
    yield (
        "deepseek-coder",
        WordRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    )
    yield "bloom poro-chat gpt3-finnish", WordRule((_BLOOM,))
    yield "viking", WordRule((_BLOOM, r"\p{N}"))
    yield "superbpe", WordRule((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))
    images = "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"
    signs = r"[\p{P}!-/:-@\[-`{-~]"
    yield (
        "chameleon",
        WordRule(
            ("<sentinel:[0-9]+>", images, r"([\t\n]|    |  )", r"\p{N}", signs, _GPT2),
            adds_bos=True,
        ),
    )
    lines = r"[^\n]+|[\n]+"
    yield (
        "gemma4 granite-embed-multi-311m",
        WordRule((lines,), adds_bos=True, is_byte_level=False),
    )
    yield "sarvam-moe", WordRule((lines,), is_byte_level=False)


WORD_RULES = {name: rule for names, rule in _rules() for name in names.split()}
