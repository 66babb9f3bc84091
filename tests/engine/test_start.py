"""Starting an engine: programs come from disk, and none is compiled after READY."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.core.errors import CheckpointError, CompileAfterReady, ConfigError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine import build as build_module
from jaxserve.engine import pool_size
from jaxserve.engine.host_memory import MemoryLimit
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.engine.harness import build, greedy, run, tokens
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_watches", "quick_compiles")]

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


def test_other_weights_share_the_programs(tmp_path: Path, program_cache_dir: Path):
    """Weights are arguments, not constants: a fine-tuned model starts warm, and differs."""
    first = write_tiny_checkpoint(tmp_path / "a" / "model", seed=1)
    second = write_tiny_checkpoint(tmp_path / "b" / "model", seed=2)
    one, other = (start(path, program_cache_dir) for path in (first, second))
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
    tiny_model: Callable[..., Path], program_cache_dir: Path
):
    def surprise(number: int) -> None:
        jax.jit(lambda x: x + number)(np.float32(1))

    lax = start(tiny_model(), program_cache_dir)
    before = lax.load().compiles_before_ready
    surprise(1)
    assert lax.load().compiles_after_ready == 1
    assert lax.load().compiles_before_ready == before
    strict = start(tiny_model(), program_cache_dir, strict_compile=True)
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
        (
            {"num_pages": None, "kv_cache_memory": 500},
            r"--kv-cache-memory 500 does not fit: 500.00 GiB of KV cache and 0.00 GiB of weights, "
            r"with 0.5 GiB for the rest 500.50 GiB, and the machine's memory is 16.00 GiB",
        ),
        ({"num_pages": 10**8}, "--num-pages 100000000 does not fit"),
        ({"host_cache_memory": 20}, "--num-pages 256 does not fit: .* 20 GiB of --host-cache-mem"),
        ({"num_pages": 2, "max_model_len": 9}, "--max-model-len 9 .* 8 tokens .2 pages of 4"),
        ({"tokenizer": "nowhere"}, "nowhere"),
    ],
)
def test_impossible_options(
    options: dict, message: str, tiny_model: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(
        pool_size, "host_memory_limit", lambda: MemoryLimit(16 * 2**30, "the machine's memory")
    )
    monkeypatch.setattr(build_module, "load_params", pytest.fail)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        start(tiny_model(), tmp_path, **options)
    assert not list(tmp_path.iterdir()), "compiled before it noticed"


def test_a_missing_tokenizer_is_noticed_at_once(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model(), directory, ignore=shutil.ignore_patterns("*token*"))
    monkeypatch.setattr(build_module, "load_params", pytest.fail)
    with pytest.raises(CheckpointError, match="tokenizer"):
        start(directory, tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "compiled before it noticed"


def test_what_shrinks_is_said(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """The pool, to what the machine has left; the longest request, to what the pool holds."""
    limit = pool_size.HOST_RESERVE + 2**18
    monkeypatch.setattr(
        pool_size, "host_memory_limit", lambda: MemoryLimit(limit, "the cgroup's limit")
    )
    made = []

    def stop(lowering: StepLowering, **_: object) -> None:
        made.append(lowering)
        raise ConfigError("that is enough")

    monkeypatch.setattr(build_module, "step_jobs", stop)
    with pytest.raises(ConfigError, match="that is enough"):
        start(tiny_model(), tmp_path, num_pages=None)
    tokens_held = made[0].num_pages * made[0].page_size
    assert 0 < tokens_held < 512
    assert "of KV cache instead of 2: the cgroup's limit is 0.5 GiB" in caplog.text
    assert f"requests may have {tokens_held} tokens at most, instead of 512" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")])
def test_a_failed_allocation_is_a_message(
    error: Exception, tiny_model: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(build_module, "load_params", fail)
    with pytest.raises(ConfigError, match="no memory for weights and KV cache"):
        start(tiny_model(), tmp_path)


def test_the_largest_buckets_first(tiny_model: Callable[..., Path], tmp_path: Path):
    """READY with few programs; the answers are the same before and after the rest has come."""
    options = dict(max_num_seqs=4, token_buckets="1,2,4", row_buckets="1,4")
    requests = [([5, 6, 7], greedy(5)), ([9], SamplingParams(seed=3, max_tokens=5, logprobs=1))]
    late = ("backbone-1-", "backbone-2-", "sampler-1-", "logits-1-", "draw-1-", "logprobs-1-")
    go_on, held = threading.Event(), ProgramCache.get

    def get(cache: ProgramCache, name: str, lower: Callable) -> object:
        if f"{name}-".endswith(late):
            assert go_on.wait(60)
        return held(cache, name, lower)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ProgramCache, "get", get)
        engine = start(tiny_model(), tmp_path, ready="first", strict_compile=True, **options)
        load = engine.load()
        assert load.compiles_before_ready >= 1 + 1 + 4 + 1 and not load.compiles_planned
        answers = tokens(run(engine, requests))
        assert {step.token_bucket for step in engine.records.steps()} == {4}
        assert {step.row_bucket for step in engine.records.steps()} == {4}
        go_on.set()
        eventually(lambda: engine.load().compiles_planned == 2 + 1 + 4, seconds=300)
    before = engine.records.steps()[-1].number
    assert tokens(run(engine, requests)) == answers
    assert {step.token_bucket for step in engine.records.steps(before)} >= {2}
    assert engine.load().compiles_after_ready == 0
    assert engine.load().compiles_before_ready == load.compiles_before_ready
    whole = start(tiny_model(), tmp_path, **options)
    assert whole.load().compiles_before_ready == 0
    assert tokens(run(whole, requests)) == answers


def test_an_engine_may_end_while_the_rest_is_compiled(
    tiny_model: Callable[..., Path], program_cache_dir: Path
):
    engine = start(tiny_model(), program_cache_dir, ready="first")
    engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("jaxserve-programs")]
