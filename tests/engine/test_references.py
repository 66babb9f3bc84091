"""Greedy tokens and first logits of both demo models, as Hugging Face transformers has them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints.load import load_params, open_checkpoint
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.models.backend import KernelBackend
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from pallas_kernels.paged_batch import PagedBatch
from tests.engine.harness import build, greedy, run

pytestmark = pytest.mark.slow

REFERENCES = Path(__file__).parents[1] / "references"
# By name: the fixture of its file, and the programs that its tests need.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("smollm2_gguf", {"token_buckets": "1,32,512", "row_buckets": "1,18"}),
    "gemma3-270m": ("gemma3_gguf", {"token_buckets": "32,512", "row_buckets": "18"}),
}
# What an engine does with requests one by one, and in chunks, is the same for all families. Tiny
# models of each, compared with a dense one, show it in `tests/models` and in `test_behaviour.py`.
ONE_MODEL = pytest.mark.parametrize("model", ["smollm2-135m"], indirect=True)
NEW_TOKENS = 64
PAGE_SIZE = 16
# One set of programs for all engines: most of their time would go into compiling. The pool has
# pages for all prompts, and not for all that follows them.
SIZES: dict[str, Any] = {
    "max_num_seqs": 18, "max_model_len": 1024, "page_size": PAGE_SIZE, "num_pages": 368,
}  # fmt: skip
CLOSE = 1e-3  # nats


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[Path, list[dict[str, Any]]]:
    """A demo model's file and its reference prompts."""
    data = json.loads((REFERENCES / f"{request.param}.json").read_text())
    return request.getfixturevalue(MODELS[request.param][0]), data["prompts"]


@pytest.fixture(scope="module")
def engine(model: tuple[Path, list], program_cache_dir: Path) -> Iterator[Engine]:
    """An engine that takes large steps."""
    yield build(
        model[0], max_num_batched_tokens=512, compilation_cache_dir=str(program_cache_dir),
        **MODELS[_reference_name(model[0])][1], **SIZES,
    )  # fmt: skip


def check(engine: Engine, prompts: list[dict[str, Any]]) -> None:
    """Serve the prompts together and compare every token."""
    requests = [(p["prompt_token_ids"], greedy(NEW_TOKENS)) for p in prompts]
    for prompt, answer in zip(prompts, run(engine, requests, check=False), strict=True):
        expected = prompt["output_token_ids"]
        assert len(expected) == NEW_TOKENS
        assert answer.token_ids == expected, prompt["name"]


def test_references_are_varied(model: tuple[Path, list]):
    lengths = sorted(len(p["prompt_token_ids"]) for p in model[1])
    assert len(lengths) >= 16 and lengths[0] <= 10 and lengths[-1] >= 900


@ONE_MODEL
def test_alone(engine: Engine, model: tuple[Path, list]):
    for prompt in model[1][::9]:  # a short and a long one: alone, each token costs a step
        check(engine, [prompt])
    assert engine.load().num_preemptions == 0


def test_all_at_once_and_some_preempted(engine: Engine, model: tuple[Path, list]):
    before = engine.load().num_preemptions
    check(engine, model[1][::-1])  # the longest first: the short ones decode where pages run out
    assert engine.load().num_preemptions >= before + 4


@ONE_MODEL
def test_chunks_of_32_tokens(model: tuple[Path, list], program_cache_dir: Path):
    """Every other prompt, for which there are pages enough."""
    engine = build(
        model[0], max_num_batched_tokens=32, token_buckets="1,32", row_buckets="1,18",
        compilation_cache_dir=str(program_cache_dir), **SIZES,
    )  # fmt: skip
    check(engine, model[1][::2])
    assert engine.load().num_preemptions == 0


def deltas_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[TokenDelta]:
    """Serve one request."""
    engine.add("request", prompt, params)
    deltas: list[TokenDelta] = []
    while engine.has_work:
        deltas += engine.step(0.0)
    return deltas


def check_logprobs(got: Sequence[TokenLogprobs], expected: list[dict[str, Any]]) -> None:
    """Every number within `CLOSE`; ranks and the order of the most likely as far as that goes."""
    assert [one.token_id for one in got] == [one["token_id"] for one in expected]
    for one, reference in zip(got, expected, strict=True):
        assert abs(one.logprob - reference["logprob"]) < CLOSE
        assert reference["ranks"][0] <= one.rank <= reference["ranks"][1]
        np.testing.assert_allclose(one.top_logprobs, reference["top_logprobs"], rtol=0, atol=CLOSE)
        known = dict(zip(reference["top_ids"], reference["top_logprobs"], strict=True))
        least = reference["top_logprobs"][-1]
        for token, logprob in zip(one.top_ids, one.top_logprobs, strict=True):
            assert abs(logprob - known.get(token, least)) < CLOSE


def test_logprobs(engine: Engine, model: tuple[Path, list]):
    """Of answers, all served at once, and of a prompt."""
    prompts = {p["name"]: p["prompt_token_ids"] for p in model[1]}
    data = json.loads((REFERENCES / f"{_reference_name(model[0])}-logprobs.json").read_text())
    answers = [entry for entry in data["prompts"] if "logprobs" in entry]
    assert len(answers) >= 4
    for entry in answers:
        expected = entry["logprobs"]
        params = greedy(len(expected), logprobs=len(expected[0]["top_ids"]))
        engine.add(entry["name"], prompts[entry["name"]], params)
    got: dict[str, list[TokenLogprobs]] = {entry["name"]: [] for entry in answers}
    while engine.has_work:
        for delta in engine.step(0.0):
            got[delta.request_id] += delta.logprobs
    for entry in answers:
        check_logprobs(got[entry["name"]], entry["logprobs"])

    (entry,) = (entry for entry in data["prompts"] if "prompt_logprobs" in entry)
    expected = entry["prompt_logprobs"]
    params = greedy(2, prompt_logprobs=len(expected[0]["top_ids"]))
    first, *_ = deltas_of(engine, prompts[entry["name"]], params)
    assert first.prompt_logprobs is not None
    check_logprobs(first.prompt_logprobs, expected)


def test_first_logits(model: tuple[Path, list]):
    """Prompts as the rows of one ragged call; logits after the last token of each."""
    path, prompts = model[0], model[1][::2]
    checkpoint = open_checkpoint(path)
    config, rules = shard_model(checkpoint.config, make_mesh(""))
    graph = ModelGraph(config)
    targets = {
        name: jax.ShapeDtypeStruct(one.shape, jnp.float32) for name, one in graph.parameters.items()
    }
    params = load_params(checkpoint, targets, progress=False)
    token_ids = np.concatenate([p["prompt_token_ids"] for p in prompts]).astype(np.int32)
    lens = np.array([len(p["prompt_token_ids"]) for p in prompts], np.int32)
    pages = np.random.default_rng(0).permutation(len(prompts) * 64).reshape(len(prompts), 64)
    batch = PagedBatch(*map(jnp.int32, (np.cumsum(lens) - lens, lens, lens, pages)))

    backend = KernelBackend(rules, "xla", loop_layers=True)  # compiles in a fraction of the time

    @jax.jit
    def logits(params: dict, token_ids: jax.Array, batch: PagedBatch) -> jax.Array:
        shape = (config.num_layers, pages.size, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        positions = batch.positions(len(token_ids))[0]
        last = batch.query_start + batch.query_len - 1
        forward = graph.model(params)
        hidden = forward.embedded(token_ids, np.float32)
        hidden, _ = forward.run_layers(hidden, jnp.zeros(shape), batch, positions, backend)
        return forward.logits(hidden[last], backend.linear)

    got = np.asarray(logits(params, jnp.asarray(token_ids), batch))
    data = json.loads((REFERENCES / f"{_reference_name(path)}.json").read_text())
    for prompt, row in zip(prompts, got, strict=True):
        top = row[prompt["top_logit_ids"]]
        np.testing.assert_allclose(top, prompt["top_logits"], rtol=0, atol=2e-3)
        probes = row[data["probe_ids"]]
        np.testing.assert_allclose(probes, prompt["probe_logits"], rtol=0, atol=2e-3)
        assert row.argmax() == prompt["output_token_ids"][0]


def _reference_name(path: Path) -> str:
    return "smollm2-135m" if "SmolLM2" in path.name else "gemma3-270m"
