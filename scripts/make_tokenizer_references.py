# ruff: noqa: RUF001
"""Write tests/tokenizers/references.json: token ids from tokenizers that are not jaxserve's.

Needs `transformers`, `gguf`, `torch` and `llama-cpp-python`, in an environment of their own.
Every string is tokenized by both; where they disagree, both answers are kept, so that a test
has to say which of the two it follows and why.

    python scripts/make_tokenizer_references.py --smollm2 A.gguf --gemma3 B.gguf --out FILE
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

STRINGS = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    " leading space",
    "trailing space ",
    "two  spaces,   three,    four",
    "\ttab\tand\n\nnewlines\r\nand\n   indentation\n",
    "\n\n\n\n",
    "     ",
    "",
    "def f(x: int) -> int:\n    if x < 2:\n        return 1\n    return x * f(x - 1)\n",
    "1234567890 3.14159 1,000,000 2024-01-31 0x7fff",
    "Price: $12.50 (50% off!) #1 @home & more; a/b\\c_d-e=f",
    "I'm, you're, he'll, we'VE, DON'T, o'clock",
    "naïve café, Übergröße, mañana, œuvre, e\u0301 (combining)",
    "日本語のテキストと、中文文本。한국어도 있습니다",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "Привет, мир! Ελληνικά",
    "😀😃 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "नमस्ते दुनिया ไทย",
    "∑ᵢ xᵢ² ≤ ∫ f(x) dx ⊂ ℝ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0001fae8 \U000e0001",
    "control \x00 \x01 \x7f bytes \ufffd \u200b zero width \ufeff",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<start_of_turn>user\nHi<end_of_turn>\n<bos><eos><unk>",
    "<|im_start <|im_start|> <|endoftext|>x<|im_end|><|im_end|>",
    "<div><b>html</b></div><table>",
    "https://example.com/path?query=1&b=%20#frag",
    "a" * 50 + "!" * 20 + "-" * 33,
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
]

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "  Hi there \n"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "日本 <b>&amp;</b>"},
    ],
]


def tokenize(gguf_file: str) -> dict[str, Any]:
    """Token ids of STRINGS, and of CHATS where the model has a template, for one model."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    folder, name = os.path.split(os.path.abspath(gguf_file))
    hf = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    cpp = llama_cpp.Llama(gguf_file, vocab_only=True, verbose=False)
    rows = []
    for text in STRINGS:
        ids_hf = hf.encode(text, add_special_tokens=False)
        ids_cpp = cpp.tokenize(text.encode(), add_bos=False, special=True)
        row: dict[str, Any] = {"text": text}
        if ids_hf == ids_cpp:
            row["ids"] = ids_hf
        else:
            print(f"{name}: the two differ for {text!r}\n  {ids_hf}\n  {ids_cpp}")
            row |= {"transformers": ids_hf, "llama_cpp": ids_cpp}
        rows.append(row)
    chats = []
    if hf.chat_template:
        for messages in CHATS:
            for prompt in (True, False):
                text = hf.apply_chat_template(
                    messages, add_generation_prompt=prompt, tokenize=False
                )
                chats.append({"messages": messages, "add_generation_prompt": prompt, "text": text})
    with_bos = cpp.tokenize(b"Hi", add_bos=True, special=True)
    return {"strings": rows, "chats": chats, "hi_with_added_tokens": with_bos}


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--gemma3", required=True, help="Gemma 3 270M as a GGUF file")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    args = parser.parse_args()
    models = {"smollm2": tokenize(args.smollm2), "gemma3": tokenize(args.gemma3)}
    args.out.write_text(json.dumps(models, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
