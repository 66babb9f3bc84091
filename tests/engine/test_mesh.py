"""The tokens of the dense model on every mesh, with weights and KV pool really split."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.engine.engine import Engine
from pallas_kernels.weights import Quantised
from tests.engine.harness import build, greedy, run, tokens
from tests.models.numpy_reference import NumpyModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

REFERENCES = Path(__file__).parents[1] / "references"

# Family, config, and the meshes on which the model shows what the others do not. Untied: with tied
# embeddings a tiny random model says its last token again and again.
MODELS = {
    "kv-heads-divide": (
        "llama", {"num_attention_heads": 8, "num_key_value_heads": 4},
        ("tensor=4", "data=2,tensor=2"),
    ),
    "kv-heads-repeated": (
        "gemma3", {"num_key_value_heads": 2, "tie_word_embeddings": False}, ("data=2,tensor=4",)
    ),
    "heads-do-not-divide": (
        "qwen2",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False},
        ("tensor=2",),
    ),
    "nothing-divides": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 53,
         "vocab_size": 277},
        ("data=2,tensor=2",),
    ),
}  # fmt: skip


def prompts(vocab: int, lengths: Sequence[int]) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab, n).tolist() for n in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_on_every_mesh(
    name: str, tiny_model: Callable[..., Path], program_cache_dir: Path
):
    family, config, meshes = MODELS[name]
    directory = tiny_model(family, **config)
    requests = [(prompt, greedy(14)) for prompt in prompts(272, [13, 1, 29, 5, 2])]
    reference = NumpyModel(directory)
    expected = [reference.greedy(prompt, 14) for prompt, _ in requests]
    assert len({t for answer in expected for t in answer}) > 12, "too plain to tell a fault"
    for mesh in meshes:
        engine = build(
            directory, mesh=mesh, max_num_batched_tokens=4, max_num_seqs=2, num_pages=64,
            compilation_cache_dir=str(program_cache_dir),
        )  # fmt: skip
        assert tokens(run(engine, requests)) == expected, mesh


def shard_shapes(engine: Engine) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Shapes of one device's part of every weight and of the pool; all devices have equal ones."""
    runner = engine.executor

    def shape(weight: jax.Array | Quantised) -> tuple[int, ...]:
        array = weight.values if isinstance(weight, Quantised) else weight
        (one,) = {shard.data.shape for shard in array.addressable_shards}
        return one

    return {k: shape(v) for k, v in runner._backbone._params.items()}, shape(runner._kv_pages)  # type: ignore


def test_weights_and_pool_are_split(tiny_model: Callable[..., Path], program_cache_dir: Path):
    family, config, _ = MODELS["kv-heads-divide"]
    engine = build(
        tiny_model(family, **config), mesh="data=2,tensor=4", num_pages=64, max_num_seqs=2,
        max_num_batched_tokens=4, compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip
    weights, pool = shard_shapes(engine)
    assert pool == (2, 32, 2, 1, 4, 8)  # a quarter of the heads, half of the pages
    assert weights["embed"] == weights["lm_head"] == (68, 32)
    assert weights["layers.0.qkv"] == (1, 4, 8, 32)
    assert weights["layers.0.o"] == (32, 16)
    assert weights["layers.1.gate_up"] == (2, 16, 32)
    assert weights["layers.1.down"] == (32, 16)
    assert weights["final_norm"] == (32,)


def test_repeated_heads_are_split(tiny_model: Callable[..., Path], program_cache_dir: Path):
    family, config, _ = MODELS["kv-heads-repeated"]
    engine = build(
        tiny_model(family, **config), mesh="tensor=4", num_pages=64, max_num_batched_tokens=4,
        max_num_seqs=2,
        compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip
    weights, pool = shard_shapes(engine)
    assert pool == (4, 64, 2, 1, 4, 8)
    assert weights["layers.0.qkv"] == (1, 3, 8, 32)


def test_data_shards_share_the_work(tiny_model: Callable[..., Path], program_cache_dir: Path):
    """Pages of both shards get used, and a full batch on two shards preempts correctly."""
    family, config, _ = MODELS["kv-heads-divide"]
    directory = tiny_model(family, **config)
    requests = [(prompt, greedy(20)) for prompt in prompts(272, [9, 3, 11, 7, 1, 8])]
    reference = NumpyModel(directory)
    engine = build(
        directory, mesh="data=2,tensor=2", num_pages=20, max_num_batched_tokens=8,
        compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip
    used: set[int] = set()

    def watch(_: int) -> None:
        used.update(s.index for s in engine._scheduler._shards if s.pool.num_used)

    answers = tokens(run(engine, requests, on_step=watch))
    assert answers == [reference.greedy(prompt, 20) for prompt, _ in requests]
    assert used == {0, 1}
    assert engine.load().num_preemptions > 0


@pytest.mark.parametrize("mesh", ["tensor=4", "data=2,tensor=2"])
def test_smollm2(mesh: str, smollm2_gguf: Path, program_cache_dir: Path):
    """Nine query heads on three KV heads: attention is replicated, MLP and vocabulary split."""
    reference = json.loads((REFERENCES / "smollm2-135m.json").read_text())["prompts"][:4]
    engine = build(
        smollm2_gguf, mesh=mesh, page_size=16, num_pages=64, max_num_batched_tokens=4,
        max_model_len=128, compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip
    weights, _ = shard_shapes(engine)
    tensor = engine.executor._lowering.rules.tensor  # type: ignore
    assert weights["embed"] == (49152 // tensor, 576)  # a byte for each
    answers = run(engine, [(p["prompt_token_ids"], greedy(12)) for p in reference], check=False)
    assert tokens(answers) == [p["output_token_ids"][:12] for p in reference]
