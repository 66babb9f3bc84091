"""Starting an engine: programs come from disk, and none is compiled after READY."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.core.errors import CompileAfterReady, ConfigError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.engine.harness import build, greedy, run, tokens

pytestmark = pytest.mark.usefixtures("compile_watches", "quick_compiles")

LIMITS = dict(max_num_batched_tokens=4, max_num_seqs=2, token_buckets="1,4")
NUM_BACKBONES = 2
# And a sampler, what late steps take, and what copies pages for the prefix cache.
NUM_PROGRAMS = NUM_BACKBONES + 1 + 4 + 1


def start(directory: Path, cache: Path, **options):
    return build(directory, compilation_cache_dir=str(cache), **LIMITS | options)


def test_a_second_start_compiles_nothing(tiny_model: Callable[..., Path], tmp_path: Path):
    directory = tiny_model()
    requests = [([5, 6, 7], greedy(5)), ([9], SamplingParams(seed=3, max_tokens=5))]
    cold = start(directory, tmp_path)
    assert cold.load().compiles_before_ready >= NUM_PROGRAMS
    files = list(tmp_path.glob("*.xla"))
    assert len(files) == NUM_PROGRAMS
    answers = tokens(run(cold, requests))

    warm = start(directory, tmp_path)
    assert warm.load().compiles_before_ready == 0
    assert tokens(run(warm, requests)) == answers
    assert warm.load().compiles_after_ready == 0

    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:1000])
    mended = start(directory, tmp_path)
    assert mended.load().compiles_before_ready == 2
    assert tokens(run(mended, requests)) == answers


def test_changed_options_compile_what_they_change(tiny_model: Callable[..., Path], tmp_path: Path):
    start(tiny_model(), tmp_path)
    pool = NUM_BACKBONES + 1  # the programs that are given the KV pool
    for options, changed in (
        ({"num_pages": 128}, pool),
        ({"page_size": 8}, pool),
        ({"kv_cache_dtype": "bfloat16"}, pool),
        ({"attention_implementation": "reference"}, NUM_BACKBONES),
        ({"token_buckets": "1,3,4"}, 1),
        ({"row_buckets": "1,2"}, 1),
        ({"max_num_seqs": 3}, NUM_PROGRAMS - 1),  # all but copying pages
    ):
        other = start(tiny_model(), tmp_path, **options)
        assert other.load().compiles_before_ready == changed, options
    # What does not shape programs does not cost any.
    for options in ({"seed": 5}, {"overlap": False}, {"max_waiting": 3}):
        assert start(tiny_model(), tmp_path, **options).load().compiles_before_ready == 0, options


def test_other_weights_share_the_programs(tiny_model: Callable[..., Path], tmp_path: Path):
    """Weights are arguments, not constants: a fine-tuned model starts warm, and differs."""
    first = write_tiny_checkpoint(tmp_path / "a" / "model", seed=1)
    second = write_tiny_checkpoint(tmp_path / "b" / "model", seed=2)
    one, other = (start(path, tmp_path / "cache") for path in (first, second))
    assert other.load().compiles_before_ready == 0
    requests = [([1, 2, 3], greedy(12))]
    assert tokens(run(one, requests)) != tokens(run(other, requests))


def test_serving_compiles_nothing(tiny_model: Callable[..., Path], tmp_path: Path):
    """Every mix of settings and batch sizes, with an engine that would raise."""
    engine = start(
        tiny_model(), tmp_path, strict_compile=True, num_pages=16, token_buckets=None,
        row_buckets=None,
    )  # fmt: skip
    random = np.random.default_rng(0)
    requests = [
        (
            random.integers(0, 256, n).tolist(),
            SamplingParams(
                temperature=float(random.choice([0, 0.5, 1])), top_k=int(random.integers(0, 9)),
                top_p=float(random.choice([1, 0.7])), min_p=float(random.choice([0, 0.2])),
                max_tokens=int(random.integers(1, 9)), ignore_eos=True,
            ),
        )
        for n in random.integers(1, 30, 12)
    ]  # fmt: skip
    run(engine, requests)
    assert engine.load().compiles_after_ready == 0


def test_a_surprise_raises_when_strict_and_counts_otherwise(
    tiny_model: Callable[..., Path], tmp_path: Path
):
    def surprise(number: int) -> None:
        jax.jit(lambda x: x + number)(np.float32(1))

    lax = start(tiny_model(), tmp_path)
    before = lax.load().compiles_before_ready
    surprise(1)
    assert lax.load().compiles_after_ready == 1
    assert lax.load().compiles_before_ready == before
    strict = start(tiny_model(), tmp_path, strict_compile=True)
    with pytest.raises(CompileAfterReady):
        surprise(2)
    assert strict.load().compiles_after_ready == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "tensor=16"}, "needs 16 devices"),
        ({"mesh": "rows=2"}, "--mesh must look like"),
        ({"mesh": "data=2", "num_pages": 255}, "num_pages 255 must divide by the mesh's data=2"),
        ({"mesh": "data=2", "max_num_seqs": 3}, "max_num_seqs 3 must divide"),
        ({"mesh": "data=2", "max_num_batched_tokens": 7}, "max_num_batched_tokens 7 must divide"),
        ({"max_model_len": 10_000}, "max_model_len 10000 is more than the 512"),
        ({"num_pages": None, "kv_cache_memory": 1e-9}, "room for none"),
    ],
)
def test_impossible_options(
    options: dict, message: str, tiny_model: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        start(tiny_model(), tmp_path, **options)
    assert not list(tmp_path.iterdir()), "compiled before it noticed"
