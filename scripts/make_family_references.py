"""Make references of tiny models of every family by Hugging Face transformers.

The test-suite compares what jaxserve computes with the file made here. Checkpoints are drawn anew
from their seeds wherever they are needed (`jaxserve.testing.write_tiny_checkpoint`); the file holds
the configuration as transformers saves it, greedy tokens and some logits. transformers must find
every tensor under the name that jaxserve gives it, and no other. With `pip install -e ".[peers]"`:

    python scripts/make_family_references.py tests/references/families.json [NAME ...]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

from jaxserve.testing.tiny_model import write_tiny_checkpoint

PROMPT, ANSWER = 19, 32  # tokens
MARGIN = 5e-3  # by which each greedy token leads: what rounds differently must not decide
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4, 6],
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "llama-dynamic": {
        "family": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "head_dim": 12,
    },
    "mistral-nemo": {"family": "mistral", "head_dim": 16},
    "qwen2": {"family": "qwen2", "head_dim": 12},
    "qwen3-yarn": {"family": "qwen3", "head_dim": 16, "rope_scaling": YARN},
    "smollm3": {"family": "smollm3", "num_hidden_layers": 5, "no_rope_layer_interval": 2},
    "granite": {"family": "granite"},
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "sliding_window": 9, "rope_scaling": YARN},
    "gemma2": {"family": "gemma2", "head_dim": 16, "sliding_window": 9},
    "gemma3": {"family": "gemma3", "head_dim": 16, "sliding_window": 9},
    "phi3": {"family": "phi3", "sliding_window": 11},
    "phi4-mini-longrope": {
        "family": "phi3", "rope_scaling": LONGROPE, "partial_rotary_factor": 0.67, "head_dim": 12,
        "original_max_position_embeddings": 16, "tie_word_embeddings": True,
    },
    "glm4": {"family": "glm4", "head_dim": 16},
    "cohere": {"family": "cohere"},
    "cohere2": {"family": "cohere2", "sliding_window": 9},
    "starcoder2": {"family": "starcoder2", "sliding_window": 13},
}  # fmt: skip


def reference(case: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """What transformers makes of a case; None where two tokens are about as likely."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_checkpoint(Path(folder) / "model", seed=seed, **{**SIZES, **case})
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(loading.values()), loading
        model.save_pretrained(Path(folder) / "saved")
        config = json.loads((Path(folder) / "saved" / "config.json").read_text())
    tokens = np.random.default_rng(seed).integers(3, SIZES["vocab_size"], PROMPT).tolist()
    with torch.no_grad():
        for _ in range(ANSWER):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
            second, first = np.sort(logits[-1])[-2:]
            if first - second < MARGIN:
                return None
            tokens.append(int(logits[-1].argmax()))
    assert logits.std() > 0.1, "logits too flat to tell a wrong model"
    shown = [0, PROMPT - 1, PROMPT + ANSWER // 2, PROMPT + ANSWER - 2]
    return {
        "family": case["family"],
        "seed": seed,
        "config": config,
        "prompt": tokens[:PROMPT],
        "answer": tokens[PROMPT:],
        "logits": {str(n): [round(float(x), 5) for x in logits[n]] for n in shown},
    }


def main() -> None:
    """Make the cases named, or all, and keep the others of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*", choices=[*CASES, []])
    args = parser.parse_args()
    found = json.loads(args.file.read_text()) if args.file.exists() else {}
    for name in args.names or CASES:
        made = (reference(CASES[name], seed) for seed in range(20))
        found[name] = next(one for one in made if one is not None)
        print(name, "seed", found[name]["seed"])
    lines = [f'"{name}": {json.dumps(found[name])}' for name in CASES if name in found]
    args.file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
