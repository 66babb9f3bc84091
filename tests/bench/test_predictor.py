"""The predictors' benchmark: its arithmetic on made-up answers, and a run on a tiny engine."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxserve.bench.predictor import (
    Answer,
    Errors,
    PredictorSpec,
    compare_predictors,
    measure_predictors,
)
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason
from jaxserve.engine.build import build_sync_engine
from jaxserve.prediction.features import Features
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.prediction.made_up import HIDDEN, VOCAB, embed, hidden_state


def make_answers(count: int) -> list[Answer]:
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(count):
        token = int(rng.integers(VOCAB))
        length = 2 + 5 * token
        probes = [(k, hidden_state(length - k, rng)[0]) for k in range(1, length, 16)]
        answers.append(Answer([token] * 3, probes, length, FinishReason.STOP))
    return answers


def test_errors_by_hand() -> None:
    errors = Errors.of([10, 70, 20], [8, 100, 50])
    assert errors.tau == 1
    assert errors.bucket_accuracy == pytest.approx(2 / 3)
    assert errors.mae == pytest.approx(62 / 3)


def test_learned_predictors_beat_the_mean() -> None:
    answers = make_answers(100)
    spec = PredictorSpec(predictors=("exact",), max_output_len=400)
    report = compare_predictors(Features(embed, HIDDEN), answers, spec)
    mean, exact = report.predictors["mean"], report.predictors["exact"]
    train, test = report.train_lengths, report.test_lengths
    assert (len(train), len(test)) == (70, 30)
    assert report.num_cut == 0 and report.num_probes == sum(len(a.probes) for a in answers[70:])
    assert mean.arrival.tau == 0 and mean.refined is None
    assert mean.arrival.mae == pytest.approx(np.abs(np.mean(train) - np.array(test)).mean())
    assert exact.arrival.mae < 0.6 * mean.arrival.mae and exact.arrival.tau > 0.5
    assert exact.refined is not None and exact.refined.mae < mean.kept.mae
    rows = str(report).splitlines()
    assert rows[-2].startswith("mean ") and rows[-1].startswith("exact ")
    assert f"{exact.refined.mae:.1f}" in rows[-1]
    assert json.loads(json.dumps(report.to_dict()))["predictors"]["exact"]["predict_us"] > 0


def test_the_engine_is_asked_once_and_keeps_nothing(
    tmp_path: Path, program_cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_tiny_checkpoint(tmp_path / "tiny")
    config = EngineConfig(
        model=str(model), num_pages=64, max_num_seqs=2, max_num_batched_tokens=2,
        compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip
    prompts = [[256, *range(40 + i, 44 + 2 * i)] for i in range(6)]
    spec = PredictorSpec(predictors=("rank",), max_output_len=20, train_share=0.5)
    report = measure_predictors(config, spec, prompts, build=build_sync_engine)
    lengths = report.train_lengths + report.test_lengths
    assert len(lengths) == 6 and all(1 <= length <= 20 for length in lengths)
    assert report.num_cut == lengths.count(20)
    # The states that tokens 1, 9 and 17 came from, of answers that went on after them.
    assert report.num_probes == sum(
        sum(position < length for position in (1, 9, 17)) for length in report.test_lengths
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictors": ("oracle",)}, "oracle"),
        ({"predictors": ()}, "predictors"),
        ({"train_share": 1.0}, "below 1"),
        ({"max_output_len": 0}, "positive"),
    ],
)
def test_bad_specs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PredictorSpec(**options)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 prompts are too few"):
        measure_predictors(EngineConfig(), PredictorSpec(), [[1], [2]], build=build_sync_engine)
