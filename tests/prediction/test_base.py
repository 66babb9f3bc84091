"""Predictors without learning, and the arithmetic of errors against naive oracles."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.prediction.base import (
    LengthPredictor,
    NoPredictor,
    OraclePredictor,
    PredictionErrors,
    PredictorMetrics,
    bucket_of,
    kendall_tau,
)


def make_request(request_id: str = "r", max_tokens: int = 100) -> Request:
    return Request(
        request_id=request_id, prompt_token_ids=[1], params=SamplingParams(), max_tokens=max_tokens
    )


def end(request: Request, length: int, reason: FinishReason = FinishReason.STOP) -> Request:
    request.output_token_ids = [0] * length
    request.finish_reason = reason
    return request


def test_no_predictor_has_no_idea() -> None:
    predictor: LengthPredictor = NoPredictor()
    request = make_request()
    assert predictor.predict(request) is None and predictor.probe_every == 0
    predictor.finished(end(request, 3))
    predictor.close()
    assert predictor.metrics() == PredictorMetrics()


def test_the_oracle_takes_max_tokens_for_the_truth() -> None:
    predictor: LengthPredictor = OraclePredictor()
    for length in (5, 90):
        request = make_request(max_tokens=length)
        assert predictor.predict(request) == length
        predictor.finished(end(request, length, FinishReason.LENGTH))
    assert predictor.metrics().mae == 0 and predictor.metrics().kendall_tau == 1


def test_the_oracle_goes_by_its_table() -> None:
    predictor = OraclePredictor({"a": 7, "long": 1000, "none": 0})
    assert predictor.predict(make_request("a")) == 7
    assert predictor.predict(make_request("b")) == 100
    assert predictor.predict(make_request("long")) == 100
    assert predictor.predict(make_request("none")) == 1
    predictor.finished(end(make_request("a"), 9))
    predictor.finished(end(make_request("a"), 2, FinishReason.ABORT))  # says nothing
    metrics = predictor.metrics()
    assert metrics.samples == 1 and metrics.mae == 2


@pytest.mark.parametrize("predictor", [NoPredictor(), OraclePredictor()])
def test_nothing_is_refined_that_was_not_probed(predictor: LengthPredictor) -> None:
    with pytest.raises(ValueError):
        predictor.refine([make_request()], np.zeros((1, 4), np.float32))


def test_errors_worked_out_by_hand() -> None:
    errors = PredictionErrors()
    for predicted, actual in ((10, 8), (70, 100), (20, 50), (3, 300)):
        errors.add(predicted, actual)
    metrics = errors.metrics()
    assert metrics.samples == 4
    assert metrics.mae == (2 + 30 + 30 + 297) / 4
    # The mean of those before: none (its own prediction stands in), 8, 54, 158 / 3.
    assert metrics.mean_mae == pytest.approx((2 + 92 + 4 + (300 - 158 / 3)) / 4)
    assert metrics.bucket_accuracy == 0.5  # 8..15 and 64..127
    assert metrics.kendall_tau == pytest.approx((3 - 3) / 6)


def test_only_the_last_pairs_count() -> None:
    errors = PredictionErrors(window=2)
    for predicted, actual in ((1, 1000), (5, 6), (7, 9)):
        errors.add(predicted, actual)
    assert errors.metrics().samples == 3
    assert errors.metrics().mae == 1.5
    assert errors.metrics().mean_mae == (994 + (503 - 9)) / 2


@given(st.lists(st.floats(0.1, 1e5), min_size=1))
def test_buckets_are_powers_of_two(lengths: list[float]) -> None:
    for length, bucket in zip(lengths, bucket_of(np.array(lengths)).tolist(), strict=True):
        assert 2**bucket <= max(round(length), 1) < 2 ** (bucket + 1)


small = st.integers(0, 5)


@given(st.lists(st.tuples(small, small), min_size=2, max_size=20))
def test_tau_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    agree = untied_x = untied_y = 0
    for (x1, y1), (x2, y2) in itertools.combinations(pairs, 2):
        agree += (x1 < x2) * (y1 < y2) + (x1 > x2) * (y1 > y2)
        agree -= (x1 < x2) * (y1 > y2) + (x1 > x2) * (y1 < y2)
        untied_x += x1 != x2
        untied_y += y1 != y2
    expected = agree / math.sqrt(untied_x * untied_y) if untied_x and untied_y else 0.0
    x, y = np.array(pairs, float).T
    assert kendall_tau(x, y) == pytest.approx(expected)
    assert kendall_tau(x, x) == (1.0 if untied_x else 0.0)


def test_it_needs_no_jax() -> None:
    code = (
        "import sys, jaxserve.prediction.base\n"
        "from jaxserve.prediction import make_predictor\n"
        "make_predictor('none'), make_predictor('oracle')\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
