"""The predictors' benchmark: its arithmetic on made-up answers, and a run on a fake device."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxserve import prediction
from jaxserve.bench.predictor import (
    Answer,
    Errors,
    compare_predictors,
    record_answers,
)
from jaxserve.bench.settings import LEARNED, PredictorSpec
from jaxserve.bench.sides import Sides
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason, Request
from jaxserve.engine.engine import Engine
from jaxserve.prediction.base import NoPredictor
from jaxserve.prediction.features import Features
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from tests.bench import virtual
from tests.prediction.made_up import HIDDEN, VOCAB, embed, hidden_state

EOS = ByteTokenizer.EOS


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
    assert report.num_cut == 0
    assert report.num_probes == sum(len(a.probes) for a in answers[70:])
    assert mean.arrival.tau == 0 and mean.refined is None
    assert mean.arrival.mae == pytest.approx(np.abs(np.mean(train) - np.array(test)).mean())
    assert exact.arrival.mae < 0.6 * mean.arrival.mae and exact.arrival.tau > 0.5
    assert exact.refined is not None and exact.refined.mae < mean.kept.mae
    rows = str(report).splitlines()
    assert rows[-2].startswith("mean ") and rows[-1].startswith("exact ")
    assert f"{exact.refined.mae:.1f}" in rows[-1]
    assert (
        json.loads(json.dumps(dataclasses.asdict(report)))["predictors"]["exact"]["predict_us"] > 0
    )


class Watching(NoPredictor):
    """Looks at hidden states as a predictor does that learns, and notes what it may learn from."""

    probe_every, features = 16, object()

    def __init__(self) -> None:
        self.num_finished = 0

    def refine(self, requests: Sequence[Request], hidden: np.ndarray) -> list[float]:
        return [1.0] * len(requests)

    def finished(self, request: Request) -> None:
        self.num_finished += 1


def test_the_engine_is_asked_once_and_its_predictor_learns_nothing() -> None:
    """An engine on a fake device, whose hidden states say whose they are and of which token."""
    prompt_len = 5
    wanted = [16, 4, 40, 20, 8, 80]  # the last one is cut off
    predictor = Watching()
    configs: list[EngineConfig] = []

    def build(config: EngineConfig) -> Engine:
        configs.append(config)
        return virtual.virtual_engine(
            virtual.VirtualTime(), dataclasses.replace(config, length_predictor="none"),
            model=virtual.PromptKnowsLength(eos_token_id=EOS, vocab_size=256), predictor=predictor,
        )  # fmt: skip

    config = EngineConfig(num_pages=64, max_num_seqs=4, max_num_batched_tokens=16)
    prompts = [[prompt_len, length // 4, 1, 2, 3] for length in wanted]
    spec = PredictorSpec(predictors=("rank",), max_output_len=50)
    features, answers = record_answers(config, spec, prompts, Sides(build=build))
    assert features is predictor.features
    assert [answer.prompt_token_ids for answer in answers] == prompts
    assert [answer.length for answer in answers] == [*wanted[:-1], 50]
    assert [a.finish_reason for a in answers] == 5 * [FinishReason.STOP] + [FinishReason.LENGTH]
    for answer in answers:
        positions = [position for position, _ in answer.probes]
        assert positions == [*range(1, answer.length, predictor.probe_every)]
        for position, hidden in answer.probes:  # the state that this token came from
            assert hidden[1] == prompt_len + position - 1
    (config,) = configs
    assert config.length_predictor == "rank" and config.max_model_len == prompt_len + 50
    assert config.predictor_dir is not None and not Path(config.predictor_dir).exists()
    assert predictor.num_finished == 0


def test_the_predictors_offered_are_those_there_are() -> None:
    assert LEARNED == prediction.LEARNED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictors": ("oracle",)}, "oracle"),
        ({"predictors": ()}, "predictors"),
        ({"train_share": 1.0}, "train_share must be in"),
        ({"max_output_len": 0}, "positive"),
    ],
)
def test_bad_specs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PredictorSpec(**options)


def test_too_few_prompts_are_refused() -> None:
    def build(config: EngineConfig) -> Engine:
        raise AssertionError("nothing is built")

    with pytest.raises(ConfigError, match="2 prompts are too few"):
        record_answers(EngineConfig(), PredictorSpec(), [[1], [2]], Sides(build=build))
