"""The policy benchmark in virtual time, where every figure can be foretold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.bench.policies import PoliciesResult, PolicyBench
from jaxserve.bench.settings import PoliciesSpec
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Request
from jaxserve.engine.engine import Engine
from jaxserve.prediction.base import NoPredictor
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from tests.bench.virtual import PromptKnowsLength, VirtualTime, virtual_engine

MODEL = PromptKnowsLength(vocab_size=258, eos_token_id=ByteTokenizer.EOS)


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Most answers are short and a few are very long."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < 0.75, rng.integers(1, 4, count),
                       rng.integers(12, 30, count))  # fmt: skip
    return [[6, int(length), i // 250, i % 250, 7, 7] for i, length in enumerate(lengths)]


class Notebook(NoPredictor):
    """Learns lengths by heart, by prompt, and keeps them for the next one of its directory."""

    kept: dict[str, dict[tuple[int, ...], int]]

    def __init__(self, name: str, directory: str) -> None:
        self.name, self._place = name, directory
        self.known = dict(self.kept.get(directory, {}))
        self.seen: list[Request] = []

    def predict(self, request: Request) -> float:
        self.seen.append(request)
        return float(4 * request.prompt_token_ids[1] if self.known else request.max_tokens)

    def finished(self, request: Request) -> None:
        self.known[tuple(request.prompt_token_ids)] = len(request.output_token_ids)

    def close(self) -> None:
        self.kept[self._place] = self.known


class Bench:
    """A `PolicyBench` in virtual time, and all that it built."""

    def __init__(self, spec: PoliciesSpec, tmp_path: Path, count: int = 60, **options: Any) -> None:
        self.time = VirtualTime()
        self.built: list[tuple[EngineConfig, Notebook | None]] = []
        Notebook.kept = {}
        limits: dict[str, Any] = dict(
            max_num_seqs=4,
            max_num_batched_tokens=64,
            page_size=4,
            overlap=False,
            prefix_cache=False,
            starvation_timeout=1e4,
        )
        self.bench = PolicyBench(
            EngineConfig(**(limits | options)), spec, make_prompts(count),
            make_prompts(20, seed=9), tmp_path, self.time.sides(self.build),
        )  # fmt: skip

    def build(self, config: EngineConfig) -> Engine:
        notebook = None
        if config.length_predictor in ("exact", "rank"):
            notebook = Notebook(config.length_predictor, str(config.predictor_dir))
        self.built.append((config, notebook))
        return virtual_engine(self.time, config, model=MODEL, predictor=notebook)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, PoliciesResult, PoliciesSpec]:
    spec = PoliciesSpec(
        max_output_len=130, seed=3, burstiness=0.1, ttft_target=25.0, tpot_target=8.0
    )
    bench = Bench(spec, tmp_path_factory.mktemp("predictors"), count=70)
    return bench, bench.bench.run(), spec


def test_every_side_serves_the_same_trace_with_the_same_answers(whole: Any) -> None:
    _, result, spec = whole
    assert tuple(result.sides) == spec.sides
    for side in result.sides.values():
        assert side.differing_answers == 0 and side.num_answers == 70
        assert len(side.latencies) == len(side.ttfts) == 70 and side.shed == 0
        assert side.mean_latency == pytest.approx(np.mean(side.latencies))
        assert side.p99_ttft == pytest.approx(np.percentile(side.ttfts, 99))
    assert result.rate == pytest.approx(0.9 * result.capacity)
    assert result.repeated_first_pass == pytest.approx(1.0)


def test_knowing_lengths_helps(whole: Any) -> None:
    _, result, _ = whole
    of_fcfs = {name: side.of_first_side for name, side in result.sides.items()}
    assert of_fcfs["fcfs"] == 1
    assert of_fcfs["srtf:oracle"] < 0.7
    assert of_fcfs["srtf:exact"] == pytest.approx(of_fcfs["srtf:oracle"])  # learned by heart
    assert result.sides["srtf:oracle"].prediction_kendall_tau == pytest.approx(1)
    assert result.sides["mlfq"].prediction_kendall_tau is None
    attained = {name: side.slo_attainment for name, side in result.sides.items()}
    assert attained["fcfs"] < attained["srtf:oracle"] < attained["deadline"]


def test_the_table_shows_every_side(whole: Any) -> None:
    _, result, spec = whole
    text = str(result)
    assert all(f"\n{side} " in text for side in spec.sides)
    assert f"all {8 * 70} answers identical" in text


def test_the_first_pass_knows_lengths_and_capacity(tmp_path: Path) -> None:
    bench = Bench(PoliciesSpec(max_output_len=130), tmp_path)
    first = bench.bench.first_pass()
    prompts = make_prompts(60)
    assert [r.output_len for r in first.records] == [4 * prompt[1] for prompt in prompts]
    # Four decodes take 1.04 s, and prompts a bit more; 60 answers in a batch of four.
    tokens_per_second = first.capacity * np.mean([r.output_len for r in first.records])
    assert 0.9 * 4 / 1.04 < tokens_per_second <= 4 / 1.04
    assert first.capacity > 60 / first.duration  # the end of the pass has no full batch


def test_a_batch_that_holds_all_has_the_capacity_of_the_whole_pass(tmp_path: Path) -> None:
    first = Bench(PoliciesSpec(), tmp_path, count=3, max_num_seqs=4).bench.first_pass()
    assert first.capacity == pytest.approx(3 / first.duration)


def test_only_the_oracle_sees_lengths_in_max_tokens(tmp_path: Path) -> None:
    sides = ("fcfs", "srtf:oracle", "ltr:rank", "srtf:exact")
    bench = Bench(PoliciesSpec(sides=sides, max_output_len=130), tmp_path, count=20)
    bench.bench.run()
    configs = [config for config, _ in bench.built]
    assert [(c.policy, c.length_predictor) for c in configs] == [
        ("fcfs", "none"), ("fcfs", "exact"), ("fcfs", "rank"), ("fcfs", "none"),
        ("srtf", "oracle"), ("ltr", "rank"), ("srtf", "exact"), ("fcfs", "none"),
    ]  # fmt: skip
    notebooks = [notebook for _, notebook in bench.built if notebook]
    lessons = {tuple(prompt) for prompt in make_prompts(20, seed=9)}
    for notebook in notebooks[:2]:
        assert {tuple(r.prompt_token_ids) for r in notebook.seen} == lessons
    for notebook in notebooks[2:]:
        assert lessons <= set(notebook.known) and len(notebook.seen) == 20
        assert {request.max_tokens for request in notebook.seen} == {130}
    assert configs[1].predictor_dir != configs[2].predictor_dir
    assert configs[2].predictor_dir == configs[5].predictor_dir


def test_impossible_targets_are_missed_and_generous_ones_met(tmp_path: Path) -> None:
    for target, attained in ((1e-6, 0.0), (1e6, 1.0)):
        spec = PoliciesSpec(sides=("fcfs",), max_output_len=130, ttft_target=target,
                            tpot_target=target)  # fmt: skip
        side = Bench(spec, tmp_path, count=20).bench.run().sides["fcfs"]
        assert side.slo_attainment == side.interactive_slo_attainment == attained


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sides=()), "sides must not be empty"),
        (dict(sides=("fcfs", "fcfs")), "no side twice"),
        (dict(sides=("best",)), "best"),
        (dict(sides=("srtf:magic",)), "magic"),
        (dict(load=0), "load"),
        (dict(ttft_target=-1), "ttft_target"),
    ],
)
def test_bad_specifications_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoliciesSpec(**fields)
