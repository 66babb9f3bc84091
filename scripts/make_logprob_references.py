"""Make a JSON reference of log-probabilities by Hugging Face transformers in float32.

The test-suite compares jaxserve's log-probabilities with the files made here: of the tokens of
some answers, and of the tokens of one prompt. Prompts and answers are those of a file that
`make_references.py` made. Run it in the same environment, with `accelerate` as well:

    python scripts/make_logprob_references.py --model MODEL.gguf \
        --references tests/references/NAME.json --out tests/references/NAME-logprobs.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from make_references import load

ANSWERS = ("prose-10", "chat-47", "multilingual-64", "code-129")
PROMPT = "prose-97"
NUM_TOKENS = 32  # of each answer
NUM_TOP = 5
# Two implementations may differ by as much; ranks are given as what such a difference allows.
TOLERANCE = 1e-3


@torch.inference_mode()
def logprobs_of(model: Any, token_ids: list[int], start: int) -> list[dict[str, Any]]:
    """Run the tokens once, without a KV cache, and say how likely those from `start` on were."""
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    found = []
    for position in range(start, len(token_ids)):
        logprobs = torch.log_softmax(logits[position - 1].double(), dim=-1)
        own = logprobs[token_ids[position]]
        top = torch.topk(logprobs, NUM_TOP)
        ranks = 1 + (logprobs > own + TOLERANCE).sum(), (logprobs >= own - TOLERANCE).sum()
        found.append(
            {
                "token_id": token_ids[position],
                "logprob": round(float(own), 5),
                "ranks": [int(rank) for rank in ranks],
                "top_ids": top.indices.tolist(),
                "top_logprobs": [round(value, 5) for value in top.values.tolist()],
            }
        )
    return found


def main() -> None:
    """Write the reference file of one GGUF model."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--references", type=Path, required=True, help="of the same model")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    _, model = load(args.model)
    prompts = {p["name"]: p for p in json.loads(args.references.read_text())["prompts"]}
    entries = []
    for name in (*ANSWERS, PROMPT):
        prompt, answer = prompts[name]["prompt_token_ids"], prompts[name]["output_token_ids"]
        if name == PROMPT:
            kind, found = "prompt_logprobs", logprobs_of(model, prompt, 1)
        else:
            kind = "logprobs"
            found = logprobs_of(model, prompt + answer[:NUM_TOKENS], len(prompt))
        entries.append({"name": name, kind: found})
    head = {
        "model_file": args.model.name,
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
    }
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in entries)
    args.out.write_text(f'{json.dumps(head)[:-1]}, "prompts": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
