"""Make a JSON reference of greedy generation by Hugging Face transformers in float32.

The test-suite compares jaxserve's tokens and logits with the files made here. Nothing of
jaxserve is imported, so the reference is independent. Run it in an environment with `torch`,
`transformers` and `gguf`:

    python scripts/make_references.py --model MODEL.gguf --out tests/references/NAME.json

Prompts are cut from the texts below to exact lengths and are the same on every run. A prompt
whose best and second-best logits come closer than `--min-gap` in any step is replaced by a
variant, so that equality of tokens is a fair test of another float32 implementation.
"""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

NUM_NEW_TOKENS = 64
NUM_TOP = 8
NUM_PROBES = 16
MAX_ATTEMPTS = 24

# (kind of text, prompt tokens)
PROMPTS = (
    ("prose", 10),
    ("code", 13),
    ("numbers", 17),
    ("list", 29),
    ("chat", 47),
    ("multilingual", 64),
    ("prose", 97),
    ("chat", 128),
    ("code", 129),
    ("list", 200),
    ("numbers", 257),
    ("chat", 311),
    ("multilingual", 400),
    ("prose", 512),
    ("code", 600),
    ("list", 701),
    ("chat", 850),
    ("prose", 900),
)

# Only texts of different kinds in sequence make the long prompts, so none repeats itself.
TEXTS: dict[str, tuple[str, ...]] = {
    "prose": (
        "The lighthouse keeper counted the ships every evening, and on the last day of October "
        "one was missing. He went down the stairs with a lantern, though he knew that nobody "
        "on the rocks could see it through the rain. At midnight the wind turned north, the "
        "clouds opened, and far out on the water a single green light was blinking slowly.",
        "Bread is older than writing. The first bakers crushed wild grain between stones, mixed "
        "it with water and left the paste on a hot rock. Much later somebody forgot a bowl of "
        "dough in a warm corner; yeast from the air settled in it, the dough rose, and the loaf "
        "that came out of the fire was soft. Since then a piece of old dough is kept for the "
        "next day.",
        "When a river enters a lake it slows down and drops the sand that it carried. Grain by "
        "grain the sand builds a fan, the river divides into channels that wander over it, and "
        "after some thousand years there is a delta with reeds, birds and people who build "
        "their houses on poles. A dam upstream stops the sand, and the delta begins to sink.",
        "My grandmother repaired clocks. Her table was covered with brass wheels, springs and "
        "tiny screws, and each lay in its own saucer. She said that a clock never lies but "
        "often mumbles, and that one should listen to it for an hour before opening the case. "
        "On Sundays she wound every clock in the house, and at noon all of them struck at once.",
    ),
    "code": (
        "def binary_search(items, target):\n    low, high = 0, len(items)\n"
        "    while low < high:\n        middle = (low + high) // 2\n"
        "        if items[middle] < target:\n            low = middle + 1\n"
        "        else:\n            high = middle\n"
        "    return low if low < len(items) and items[low] == target else None\n\n\n"
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
        "    def push(self, item):\n        self.items.append(item)\n",
        "SELECT customer.name, COUNT(*) AS orders, SUM(item.price * item.quantity) AS total\n"
        "FROM customer\nJOIN purchase ON purchase.customer_id = customer.id\n"
        "JOIN item ON item.purchase_id = purchase.id\nWHERE purchase.day >= '2021-03-01'\n"
        "GROUP BY customer.name\nHAVING COUNT(*) > 3\nORDER BY total DESC\nLIMIT 20;\n",
        "#include <stdio.h>\n\nint main(void) {\n    int count = 0;\n"
        "    for (int n = 2; count < 25; n++) {\n        int prime = 1;\n"
        "        for (int d = 2; d * d <= n; d++) {\n"
        "            if (n % d == 0) { prime = 0; break; }\n        }\n"
        '        if (prime) { printf("%d\\n", n); count++; }\n    }\n    return 0;\n}\n',
        'async function loadUsers(url) {\n  const response = await fetch(url, {method: "GET"});\n'
        "  if (!response.ok) {\n    throw new Error(`status ${response.status}`);\n  }\n"
        "  const users = await response.json();\n"
        "  return users.filter((user) => user.active).map((user) => user.name);\n}\n",
    ),
    "list": (
        "Shopping list for the week:\n1. Two bags of flour\n2. A dozen eggs\n3. Olive oil\n"
        "4. Carrots, onions and celery\n5. Black pepper\n6. Coffee beans\n7. Three lemons\n"
        "8. A wedge of hard cheese\n9. Rice\n10.",
        "Steps to change a bicycle tyre:\n- Open the brake and take the wheel out.\n"
        "- Lift one side of the tyre over the rim with two levers.\n- Pull the tube out and "
        "look for the hole under water.\n- Roughen the rubber, glue a patch on and wait.\n"
        "- Feel along the inside of the tyre for glass or thorns.\n-",
        "Planets in order from the Sun: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, "
        "Neptune.\nColours of the rainbow: red, orange, yellow, green, blue, indigo, violet.\n"
        "Months with thirty days: April, June, September, November.\nStrings of a violin:",
        "# Release notes\n\n## 2.4.0\n\n* The importer reads compressed files.\n* Dates are "
        "shown in the local time zone.\n* A crash with empty folders was fixed.\n\n## 2.3.1\n\n"
        "* Searching for accented letters works again.\n* The window remembers its size.\n\n",
    ),
    "numbers": (
        "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610. "
        "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024. 1, 4, 9, 16, 25, 36, 49, 64, 81, 100.",
        "date,station,temperature,rain\n2020-01-01,North,-3.5,0.0\n2020-01-02,North,-1.2,4.8\n"
        "2020-01-03,North,0.7,12.1\n2020-01-01,Harbour,2.9,0.3\n2020-01-02,Harbour,4.4,6.0\n"
        "2020-01-03,Harbour,5.1,9.7\n",
        "A train leaves at 8:15 and travels 240 kilometres at 80 kilometres per hour; it waits "
        "12 minutes and then travels 90 kilometres at 60 kilometres per hour. The first part "
        "takes 240 / 80 = 3 hours, the second part takes 90 / 60 = 1.5 hours, so the train "
        "arrives at",
        "7 x 6 = 42\n7 x 7 = 49\n7 x 8 = 56\n12 + 30 = 42\n100 - 37 = 63\n81 / 9 = 9\n"
        "15 % of 200 = 30\n3.14159 * 2 = 6.28318\n",
    ),
    "multilingual": (
        "Le matin, la boulangère ouvre ses volets avant que le soleil ne touche les toits. "
        "L'odeur du pain chaud descend la rue jusqu'à la rivière, et les enfants qui vont à "
        "l'école s'arrêtent un instant devant la vitrine.",
        "Im Winter gefriert der See hinter dem Dorf, und die Kinder laufen nach der Schule "
        "Schlittschuh, bis es dunkel wird. Über dem Eis hängt dann ein feiner Nebel, und man "
        "hört nur noch die Kufen.",
        "El mercado abre los martes y los viernes. Hay naranjas, aceitunas, pescado fresco y "
        "flores; una señora vende miel de montaña y siempre pregunta: «¿Cuántos tarros quiere "
        "usted hoy?»",
        "春天来了，河边的柳树发芽了。孩子们在草地上放风筝，老人坐在长椅上下棋。",  # noqa: RUF001
        "Зимой в деревне тихо: снег лежит до самых окон, из труб поднимается дым, "
        "а по вечерам все собираются у печки.",  # noqa: RUF001
        "昔々、山の中の小さな村に、おじいさんとおばあさんが住んでいました。",
    ),
    "chat": (
        "I have a small balcony that faces north and gets about two hours of sun. Which herbs "
        "and vegetables can I grow there, and how often do I have to water them in summer?",
        "Please explain to a ten-year-old why the sky is blue in the day and red in the "
        "evening. Use an example from the kitchen, and finish with a question.",
        "Write a short and friendly letter to my neighbour: his dog barks every morning at "
        "five, I work at night, and I would like to find a solution together with him.",
        "What is the difference between a process and a thread? When would you choose one over "
        "the other in a web server, and what does it mean for memory?",
    ),
}
CHAT_MARKS = {
    "llama": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "gemma3_text": ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation: `gaps` is how far each token's logit is above the best other one.

    `first_logits` is [vocab] float32: the logits after the prompt.
    """

    prompt: list[int]
    token_ids: list[int]
    gaps: list[float]
    first_logits: torch.Tensor


def load(path: Path) -> tuple[Any, Any]:
    """Return (tokenizer, model in eval mode) of a GGUF file, dequantised to float32.

    Raises:
        ValueError: transformers read the file into another precision or another architecture
            than the file's model is known to have.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    check_config(model)
    model.generation_config.eos_token_id = None
    return tokenizer, model


def check_config(model: Any) -> None:
    """Check what transformers has to add by itself, because GGUF metadata does not have it.

    Raises:
        ValueError: a property of the model is not what its publisher's config says.
    """
    config = model.config
    facts: dict[str, bool] = {
        "every tensor in float32": {p.dtype for p in model.parameters()} == {torch.float32},
        "a chat format": config.model_type in CHAT_MARKS,
    }
    if config.model_type == "gemma3_text":
        rope = config.rope_parameters
        pattern = ["full" if i % 6 == 5 else "sliding" for i in range(config.num_hidden_layers)]
        facts |= {
            "five sliding layers, then a full one": config.layer_types
            == [f"{kind}_attention" for kind in pattern],
            "a sliding window of 512": config.sliding_window == 512,
            "rope base 10,000 in sliding layers": (
                rope["sliding_attention"]["rope_theta"] == 10_000
            ),
            "rope base 1,000,000 in full layers": rope["full_attention"]["rope_theta"] == 1e6,
            "query_pre_attn_scalar 256": config.query_pre_attn_scalar == 256,
            # The model multiplies by 1 + weight and GGUF stores the sum. The sums are positive
            # and, in this norm, mostly below 1, so weights below 0 show the subtraction.
            "norm weights without the 1": bool(
                (model.model.layers[0].post_attention_layernorm.weight < 0).any()
            ),
        }
    wrong = [fact for fact, holds in facts.items() if not holds]
    if wrong:
        raise ValueError(f"transformers read the GGUF without: {', '.join(wrong)}")


def make_prompt(tokenizer: Any, model_type: str, kind: str, length: int, variant: int) -> list[int]:
    """Return exactly `length` token ids of text that begins with `kind`.

    Different variants begin with different texts, or in the middle of one.
    """
    kinds = list(TEXTS)
    first = kinds.index(kind)
    texts: list[str] = []
    for name in kinds[first:] + kinds[:first]:
        start = variant % len(TEXTS[name])
        texts += TEXTS[name][start:] + TEXTS[name][:start]
    skipped_words = 3 * (variant // len(TEXTS[kind]))
    text = "\n\n".join(texts).split(" ", skipped_words)[-1]

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False).input_ids

    starts_with_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    head = [tokenizer.bos_token_id] if starts_with_bos else []
    tail: list[int] = []
    if kind == "chat":
        before, after = CHAT_MARKS[model_type]
        head, tail = head + encode(before), encode(after)
    body = encode(text)[: length - len(head) - len(tail)]
    prompt = head + body + tail
    assert len(prompt) == length, f"the texts are too short for {length} tokens: {len(prompt)}"
    return prompt


@torch.inference_mode()
def draft(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return NUM_NEW_TOKENS greedy tokens for each prompt, ending at no end-of-text token.

    The prompts share a left-padded batch, which reads the weights once for all of them.
    """
    width = max(map(len, prompts))
    inputs = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        inputs, attention_mask=mask, max_new_tokens=NUM_NEW_TOKENS, do_sample=False
    )
    assert output.shape[1] == width + NUM_NEW_TOKENS
    return output[:, width:].tolist()


@torch.inference_mode()
def verify(model: Any, prompt: list[int], tokens: list[int]) -> Generation:
    """Run the prompt with its drafted tokens once, alone, with no padding and no KV cache.

    If each token is the best one of this run, then by induction it is what greedy generation
    without a cache would have picked. Where it is not, the gap is negative.
    """
    inputs = torch.tensor([prompt + tokens[:-1]])
    logits = model(inputs, use_cache=False, logits_to_keep=NUM_NEW_TOKENS).logits[0]
    chosen = torch.tensor(tokens)[:, None]
    others = logits.scatter(1, chosen, -torch.inf).max(1).values
    gaps = (logits.gather(1, chosen)[:, 0] - others).tolist()
    return Generation(prompt, tokens, gaps, logits[0])


def make_references(
    tokenizer: Any, model: Any, min_gap: float, batch_size: int
) -> list[dict[str, Any]]:
    """Return the JSON entry of every prompt: of its first variant without a near-tie.

    Raises:
        ValueError: a prompt has no variant that keeps `min_gap`.
    """
    entries: dict[int, dict[str, Any]] = {}
    for attempt in range(MAX_ATTEMPTS):
        left = [i for i in range(len(PROMPTS)) if i not in entries]
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            model_type = model.config.model_type
            prompts = [make_prompt(tokenizer, model_type, *PROMPTS[i], i + attempt) for i in batch]
            drafts = draft(model, prompts)
            for i, prompt, tokens in zip(batch, prompts, drafts, strict=True):
                generation = verify(model, prompt, tokens)
                report(tokenizer, i, attempt, generation)
                if min(generation.gaps) >= min_gap:
                    entries[i] = entry(i, generation)
        if len(entries) == len(PROMPTS):
            return [entries[i] for i in range(len(PROMPTS))]
    raise ValueError(f"not every prompt has a variant without a gap below {min_gap}")


def report(tokenizer: Any, index: int, attempt: int, generation: Generation) -> None:
    """Print one line, for a human to see whether the text is sensible."""
    end = tokenizer.decode(generation.prompt[-12:])
    text = tokenizer.decode(generation.token_ids)
    gap = min(generation.gaps)
    print(
        f"{name(index)}, attempt {attempt}: smallest gap {gap:.4f}, {end!r} -> {text!r}", flush=True
    )


def name(index: int) -> str:
    """Return the name of a prompt."""
    return "{}-{}".format(*PROMPTS[index])


def entry(index: int, generation: Generation) -> dict[str, Any]:
    """Return the JSON entry of one prompt."""
    logits = generation.first_logits
    top = torch.topk(logits, NUM_TOP)
    return {
        "name": name(index),
        "prompt_token_ids": generation.prompt,
        "output_token_ids": generation.token_ids,
        "top_logit_ids": top.indices.tolist(),
        "top_logits": [round(value, 5) for value in top.values.tolist()],
        "probe_logits": [round(float(logits[i]), 5) for i in probe_ids(len(logits))],
        "gaps": [round(gap, 4) for gap in generation.gaps],
    }


def probe_ids(vocab_size: int) -> list[int]:
    """Return NUM_PROBES token ids spread over the vocabulary."""
    return [(2 * i + 1) * vocab_size // (2 * NUM_PROBES) for i in range(NUM_PROBES)]


def main() -> None:
    """Write the reference file of one GGUF model."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--min-gap", type=float, default=0.01, help="least distance of the two best logits"
    )
    parser.add_argument("--batch-size", type=int, default=6, help="prompts drafted together")
    args = parser.parse_args()
    tokenizer, model = load(args.model)
    entries = make_references(tokenizer, model, args.min_gap, args.batch_size)
    head = {
        "model_file": args.model.name,
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
        "min_gap": args.min_gap,
        "probe_ids": probe_ids(model.config.vocab_size),
    }
    # One line per prompt: compact, and a change shows as one line in a diff.
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in entries)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(f'{json.dumps(head)[:-1]}, "prompts": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
