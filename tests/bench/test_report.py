"""The report's arithmetic against timelines worked out by hand and a naive oracle."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench.load import LoadResult, RequestRecord
from jaxserve.bench.report import (
    detailed,
    format_report,
    inter_token_latencies,
    latencies,
    save_result,
    summarize,
)
from jaxserve.core.errors import ConfigError

# Sent at 1 s; tokens at 1.5, 1.7 (three at once), 2.1. And one token only; and a failure.
STREAM = RequestRecord(
    prompt_len=10, start=1.0, delta_times=[1.5, 1.7, 2.1], delta_tokens=[1, 3, 1], text="abcde"
)
SINGLE = RequestRecord(prompt_len=4, start=0.0, delta_times=[0.25], delta_tokens=[1])
FAILED = RequestRecord(prompt_len=99, start=0.0, delta_times=[9.0], delta_tokens=[7], error="x")
RESULT = LoadResult((STREAM, SINGLE, FAILED), duration=4.0)


def test_latencies_of_a_hand_made_timeline() -> None:
    times = latencies(RESULT.records)
    assert times.ttft == pytest.approx([0.5, 0.25])
    assert times.e2el == pytest.approx([1.1, 0.25])
    assert times.tpot == pytest.approx([0.6 / 4])
    assert times.itl == pytest.approx([0.2 / 3] * 3 + [0.4])


def test_summary_of_a_hand_made_timeline() -> None:
    summary = summarize(RESULT, percentiles=(90, 99.9))
    assert summary["completed"] == 2 and summary["failed"] == 1
    assert summary["total_input_tokens"] == 14 and summary["total_output_tokens"] == 6
    assert summary["request_throughput"] == 0.5
    assert summary["output_throughput"] == 1.5
    assert summary["total_token_throughput"] == 5.0
    assert summary["max_output_tokens_per_s"] == 4  # those at 1.5 and 1.7
    assert summary["max_concurrent_requests"] == 1
    assert summary["mean_ttft_ms"] == pytest.approx(375)
    assert summary["median_e2el_ms"] == pytest.approx(675)
    assert summary["std_ttft_ms"] == pytest.approx(125)
    assert summary["p90_ttft_ms"] == pytest.approx(np.percentile([500, 250], 90))
    assert summary["p99.9_itl_ms"] == pytest.approx(np.percentile([200 / 3] * 3 + [400], 99.9))


records = st.builds(
    lambda start, steps: RequestRecord(
        prompt_len=1,
        start=start,
        delta_times=(start + np.cumsum([gap for gap, _ in steps])).tolist(),
        delta_tokens=[count for _, count in steps],
    ),
    st.floats(0, 10),
    st.lists(st.tuples(st.floats(0.001, 2), st.integers(1, 5)), min_size=1, max_size=8),
)


@given(records)
def test_gaps_of_tokens_add_up_to_the_time_after_the_first(record: RequestRecord) -> None:
    gaps = inter_token_latencies(record)
    assert len(gaps) == record.output_len - 1
    assert gaps.sum() == pytest.approx(record.delta_times[-1] - record.delta_times[0])
    assert (gaps >= 0).all()


@given(st.lists(records, min_size=1, max_size=6))
def test_peaks_match_a_naive_count(made: list[RequestRecord]) -> None:
    summary = summarize(LoadResult(tuple(made), 1.0))
    first = min(r.start for r in made)
    seconds: dict[int, int] = {}
    for r in made:
        for at, count in zip(r.delta_times, r.delta_tokens, strict=True):
            seconds[int(at - first)] = seconds.get(int(at - first), 0) + count
    assert summary["max_output_tokens_per_s"] == max(seconds.values())
    at_starts = [sum(o.start <= r.start < o.delta_times[-1] for o in made) for r in made]
    assert summary["max_concurrent_requests"] == max(at_starts)


def test_a_run_in_which_everything_failed() -> None:
    summary = summarize(LoadResult((FAILED,), 2.0))
    assert summary["completed"] == 0 and summary["failed"] == 1
    assert summary["output_throughput"] == summary["mean_ttft_ms"] == 0
    assert "Failed requests:                         1" in format_report(summary)


def test_the_printed_table_is_vllms() -> None:
    text = format_report(
        summarize(RESULT, metrics=("ttft", "itl"), percentiles=(99,)),
        metrics=("ttft", "itl"), percentiles=(99,), request_rate=2.5, max_concurrency=8,
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    for line in (
        "Successful requests:                     2",
        "Maximum request concurrency:             8",
        "Request rate configured (RPS):           2.50",
        "Benchmark duration (s):                  4.00",
        "Total input tokens:                      14",
        "Total generated tokens:                  6",
        "Request throughput (req/s):              0.50",
        "Output token throughput (tok/s):         1.50",
        "Total token throughput (tok/s):          5.00",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          375.00",
        "---------------Inter-token Latency----------------",
    ):
        assert line in lines
    assert "TPOT" not in text and "P90" not in text and "P99 ITL (ms):" in text


def test_unknown_metrics_and_percentiles_are_refused() -> None:
    with pytest.raises(ConfigError, match="nope"):
        summarize(RESULT, metrics=("nope",))
    with pytest.raises(ConfigError, match="101"):
        summarize(RESULT, percentiles=(101,))


def test_saved_files(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    fields = {"model_id": "a/b", "request_rate": "inf", "max_concurrency": 4, **detailed(RESULT)}
    path = save_result(fields, directory=tmp_path / "new", filename=None, now=now)
    assert path == tmp_path / "new" / "jaxserve-infqps-concurrency4-a_b-20260102-030405.json"
    saved = json.loads(path.read_text())
    assert saved["date"] == "20260102-030405"
    assert saved["errors"] == ["", "", "x"]
    assert saved["output_lens"] == [5, 1, 7]
    assert saved["itls"][0] == pytest.approx([0.2 / 3] * 3 + [0.4])
    assert saved["generated_texts"][0] == "abcde"


def test_a_request_without_tokens_can_be_saved() -> None:
    fields = detailed(LoadResult((RequestRecord(prompt_len=3, error="refused"),), 1.0))
    assert fields["ttfts"] == [0.0] and fields["itls"] == [[]]
