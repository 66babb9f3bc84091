"""The layers cut into spans: the same tokens, with all that moves KV pages at work."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.engine.engine import Engine
from tests.engine.harness import build, greedy, maker, prompts, run, tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

REFERENCES = Path(__file__).parents[1] / "references"
LAYERS = 5
MODELS = {
    "llama": {"num_hidden_layers": LAYERS},  # all spans of one layer are alike
    "gemma3": {  # none of them: in two spans of unequal lengths, in five of two kinds
        "num_hidden_layers": LAYERS, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
}  # fmt: skip
Make = Callable[..., Engine]


@pytest.fixture(scope="module", params=MODELS)
def make(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], program_cache_dir: Path
) -> Iterator[Make]:
    model = tiny_model(request.param, **MODELS[request.param])
    # In one of them a page is of two arrays.
    kv_cache_dtype = "int8" if request.param == "llama" else "auto"
    with maker(
        model, page_size=4, num_pages=20, max_num_batched_tokens=16, host_cache_memory=0.01,
        preemption="swap", kv_cache_dtype=kv_cache_dtype,
        compilation_cache_dir=str(program_cache_dir),
    ) as make:  # fmt: skip
        yield make


def test_any_number_of_spans_gives_the_same_tokens(make: Make) -> None:
    """With pages shared, copied, swapped out and in, and kept in host memory between turns."""
    system = list(range(100, 113))  # ends within a page, which is copied
    requests = [(system + p, greedy(24)) for p in prompts(8, 12, seed=5)]
    answers = []
    for num_spans in (1, 2, LAYERS):
        engine = make(num_spans=num_spans)
        answers += [tokens(run(engine, requests)), tokens(run(engine, requests))]
        load = engine.load()
        assert load.num_preemptions and load.num_restored_tokens, "nothing was swapped"
        assert load.num_device_hit_tokens and load.num_store_hit_tokens, "nothing was shared"
        assert load.compiles_after_ready == 0
    assert all(answer == answers[0] for answer in answers)
    assert len({token for answer in answers[0] for token in answer}) > 12, "too plain to tell"


@pytest.mark.parametrize("make", ["gemma3"], indirect=True)
def test_a_step_of_spans_on_a_mesh(make: Make) -> None:
    requests = [(p, greedy(8)) for p in prompts(4, 12, seed=6)]
    split = make(mesh="data=2,tensor=2", num_spans=2, host_cache_memory=0.0, preemption="auto")
    assert tokens(run(split, requests)) == tokens(run(make(), requests))


@pytest.mark.parametrize("make", ["llama"], indirect=True)
def test_there_is_a_layer_for_every_span(make: Make) -> None:
    with pytest.raises(ConfigError, match="num_spans 6 is more than the 5 layers"):
        make(num_spans=LAYERS + 1)


@pytest.mark.parametrize("num_spans", [2, 5])
def test_smollm2(num_spans: int, smollm2_gguf: Path, program_cache_dir: Path) -> None:
    """All 30 layers, in spans that share one program, against the tokens of transformers."""
    reference = json.loads((REFERENCES / "smollm2-135m.json").read_text())["prompts"][:4]
    engine = build(
        smollm2_gguf, num_spans=num_spans, page_size=16, num_pages=64, max_num_batched_tokens=16,
        max_model_len=128, compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip
    requests = [(one["prompt_token_ids"], greedy(12)) for one in reference]
    answers = tokens(run(engine, requests, check=False))
    engine.close()
    assert answers == [one["output_token_ids"][:12] for one in reference]
