"""What Prometheus gets to see."""

import asyncio
import socket
import urllib.request
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from jaxserve.cache.page_store import PageStore
from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.engine import Engine
from jaxserve.engine.records import EngineRecords
from jaxserve.runner.buckets import Buckets
from jaxserve.server.choices import generate_choices
from jaxserve.server.context import ServerContext
from jaxserve.server.http.server import HttpServer
from jaxserve.server.metrics.app import make_metrics_app
from jaxserve.server.metrics.endpoint import Metrics, metrics_router
from jaxserve.server.metrics.names import COMPAT_CHOICES, MetricNames, token_bounds
from jaxserve.server.metrics.totals import Totals
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel
from tests.server.exposition import check_exposition, samples

# Gateway API Inference Extension: what its endpoint picker asks a model server for.
GAIE_GAUGES = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")

# The dashboard in vLLM's own examples, in its newer and its older form.
VLLMS_BOARD = (
    "vllm:e2e_request_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total", "vllm:gpu_cache_usage_perc",
    "vllm:inter_token_latency_seconds_bucket", "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum", "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum", "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket", "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total", "vllm:time_per_output_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_bucket",
)  # fmt: skip


def fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        return response.read().decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StillEngine:
    """As much of an `AsyncEngine` as metrics need, over an engine that the test steps."""

    is_ready = True

    def __init__(self, engine: Engine, *, has_store: bool = False) -> None:
        self.has_store = has_store
        self.model_info, self.records, self.load = engine.info, engine.records, engine.load


def scripted(compat: str = "none", **options) -> tuple[Engine, Metrics]:
    """An engine without overlap whose clock a test turns, with metrics attached."""
    engine = fake_sync_engine(overlap=False, step_seconds=0.0, **options)
    engine.records = EngineRecords(Buckets((4, 16, 128), (1, 16), max_rows=16, max_pages=128))
    metrics = Metrics(compat)
    metrics.attach(StillEngine(engine))  # type: ignore[arg-type]
    return engine, metrics


def add(engine: Engine, name: str, prompt: int, output: int, *, now: float = 0.0) -> None:
    params = SamplingParams(max_tokens=output, ignore_eos=True, seed=1)
    engine.add(name, [ord(name[0])] * prompt, params, now=now)


def run(engine: Engine, *, now: float = 1.0) -> None:
    """A step per second until nothing is left."""
    while engine.has_work:
        engine.step(now)
        now += 1.0


def scrape(metrics: Metrics) -> dict[tuple[str, ...], float]:
    text = generate_latest(metrics.registry).decode()
    assert check_exposition(text) == []
    return samples(text)


def test_metrics_before_and_after_a_request(make_engine, serving, make_request) -> None:
    async def main() -> None:
        context = ServerContext()
        metrics = HttpServer(ServerOptions(http_port=0), make_metrics_app(context))
        await metrics.start()
        async with serving(None, context=context) as s:
            before = samples(await asyncio.to_thread(fetch, metrics.address))
            assert before["jaxserve:ready",] == 0
            assert ("jaxserve:steps_total",) not in before
            await s.server.attach(make_engine(num_pages=100))
            await s.ask(make_request([1, 2, 3], max_tokens=5))
            after = samples(await asyncio.to_thread(fetch, metrics.address))
        await metrics.stop(0)
        assert after["jaxserve:ready",] == 1
        assert after["jaxserve:prompt_tokens_total",] == 3
        assert after["jaxserve:generation_tokens_total",] == 5
        assert after["jaxserve:request_success_total", "length"] == 1
        assert after["jaxserve:request_success_total", "abort"] == 0
        assert after["jaxserve:num_requests_running",] == 0
        assert after["jaxserve:num_requests_waiting",] == 0
        assert after["jaxserve:kv_pages", "free"] + after["jaxserve:kv_pages", "cached"] == 100
        assert after["jaxserve:kv_pages", "used"] == 0
        assert after["jaxserve:compiles_total", "serving"] == 0
        assert ("jaxserve:compiles_total", "startup") in after
        assert after["jaxserve:steps_total",] >= 5

    asyncio.run(main())


def test_counts_of_a_scripted_run() -> None:
    engine, metrics = scripted(max_num_batched_tokens=16)
    add(engine, "a", 20, 4)  # prompts in steps of 16 and 4 tokens, then three of one
    run(engine)
    add(engine, "b", 3, 1, now=10.0)
    run(engine, now=11.0)
    seen = scrape(metrics)
    assert seen["jaxserve:prompt_tokens_total",] == 23
    assert seen["jaxserve:generation_tokens_total",] == 5
    assert seen["jaxserve:request_success_total", "length"] == 2
    assert seen["jaxserve:steps_total",] == 6
    assert seen["jaxserve:step_tokens_total",] == 26
    assert seen["jaxserve:step_padding_tokens_total",] == 0 + 0 + 3 * 3 + 1
    assert seen["jaxserve:bucket_steps_total", "tokens", "16"] == 1
    assert seen["jaxserve:bucket_steps_total", "tokens", "4"] == 5
    assert seen["jaxserve:bucket_steps_total", "tokens", "128"] == 0
    assert seen["jaxserve:bucket_steps_total", "rows", "1"] == 5  # the first one sampled nothing
    assert seen["jaxserve:padding_fraction", "tokens"] == pytest.approx(10 / 36)
    assert seen["jaxserve:padding_fraction", "rows"] == 0
    # Steps that give tokens; a prompt counts in the one that completes it, with its first token.
    assert seen["jaxserve:iteration_tokens_total_bucket", "1.0"] == 3
    assert seen["jaxserve:iteration_tokens_total_bucket", "8.0"] == 4
    assert seen["jaxserve:iteration_tokens_total_bucket", "32.0"] == 5
    assert seen["jaxserve:iteration_tokens_total_count",] == 5
    assert seen["jaxserve:iteration_tokens_total_sum",] == 23 + 5
    assert seen["jaxserve:request_prompt_tokens_sum",] == 23
    assert seen["jaxserve:request_generation_tokens_bucket", "1.0"] == 1
    assert seen["jaxserve:request_generation_tokens_bucket", "5.0"] == 2
    assert seen["jaxserve:request_params_max_tokens_sum",] == 5
    assert seen["jaxserve:request_params_n_count",] == 0  # `generate_choices` tells of prompts
    assert seen["jaxserve:prefix_cache_queries_total",] == 23
    assert seen["jaxserve:prefix_cache_hits_total",] == 0
    assert seen["jaxserve:external_prefix_cache_queries_total",] == 0  # there is no store


def test_times_of_a_scripted_run() -> None:
    engine, metrics = scripted(max_num_batched_tokens=16)
    add(engine, "a", 20, 4)  # starts at 1 s, tokens at 2, 3, 4 and 5 s and a little
    run(engine)
    seen = scrape(metrics)

    def only(name: str) -> float:
        assert seen[f"jaxserve:{name}_count",] == 1
        return seen[f"jaxserve:{name}_sum",]

    assert only("request_queue_time_seconds") == 1.0
    assert only("time_to_first_token_seconds") == pytest.approx(2, abs=0.4)
    assert only("request_prefill_time_seconds") == pytest.approx(1, abs=0.4)
    assert only("request_decode_time_seconds") == pytest.approx(3, abs=0.4)
    assert only("request_inference_time_seconds") == pytest.approx(4, abs=0.4)
    assert only("e2e_request_latency_seconds") == pytest.approx(5, abs=0.4)
    assert only("request_time_per_output_token_seconds") == pytest.approx(1, abs=0.2)
    assert seen["jaxserve:inter_token_latency_seconds_count",] == 3
    assert seen["jaxserve:inter_token_latency_seconds_bucket", "0.5"] == 0
    assert seen["jaxserve:inter_token_latency_seconds_bucket", "2.5"] == 3
    assert seen["jaxserve:time_to_first_token_seconds_bucket", "1.0"] == 0
    assert seen["jaxserve:time_to_first_token_seconds_bucket", "2.5"] == 1


def test_the_prefix_cache_is_seen() -> None:
    engine, metrics = scripted()
    for name in ("a1", "a2"):  # the same prompt twice
        add(engine, name, 17, 2)
        run(engine)
    seen = scrape(metrics)
    hits = seen["jaxserve:prefix_cache_hits_total",]
    assert hits == 16  # four pages; the last token is always computed
    assert seen["jaxserve:prefix_cache_queries_total",] == 34
    assert seen["jaxserve:prompt_tokens_cached_total",] == hits
    assert seen["jaxserve:prompt_tokens_by_source_total", "local_cache_hit"] == hits
    assert seen["jaxserve:prompt_tokens_by_source_total", "local_compute"] == 34 - hits
    assert seen["jaxserve:request_prefill_kv_computed_tokens_sum",] == 34 - hits


def test_a_preempted_request_looks_its_prompt_up_once() -> None:
    engine, metrics = scripted(num_pages=9, page_size=4, max_model_len=32)
    for name in "abcd":
        add(engine, name, 8, 20)
    run(engine)
    add(engine, "a", 8, 1)  # some of it may still be there
    run(engine, now=1000.0)
    seen = scrape(metrics)
    assert seen["jaxserve:num_preemptions_total",] > 1
    assert seen["jaxserve:prompt_tokens_total",] == 5 * 8
    assert seen["jaxserve:prefix_cache_queries_total",] == 5 * 8
    hits = seen["jaxserve:prefix_cache_hits_total",]
    assert hits == seen["jaxserve:prompt_tokens_cached_total",] <= 7
    assert seen["jaxserve:restored_tokens_total",] > 0  # what the preempted found of themselves


@pytest.mark.parametrize("kind", ["prompt_logprobs", "embedding", "no prefix cache"])
def test_what_never_looks_into_the_cache_queries_nothing(kind: str) -> None:
    engine, metrics = scripted(prefix_cache=kind != "no prefix cache")
    for name in ("a1", "a2"):
        prompt = [97] * 17
        if kind == "embedding":
            engine.add_embedding(name, prompt)
        else:
            with_scores = 0 if kind == "prompt_logprobs" else None
            params = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=with_scores)
            engine.add(name, prompt, params)
        run(engine)
    seen = scrape(metrics)
    assert seen["jaxserve:prompt_tokens_total",] == 34
    assert seen["jaxserve:prefix_cache_queries_total",] == 0
    assert seen["jaxserve:prefix_cache_hits_total",] == 0
    assert seen["jaxserve:prompt_tokens_cached_total",] == 0


def test_what_comes_from_host_memory_is_external() -> None:
    store = PageStore((4,), np.dtype(np.int32), host_bytes=4096)
    model = FakeModel(vocab_size=256)
    executor = FakeExecutor(page_size=4, model=model, store=store)
    options: dict[str, Any] = {"num_pages": 8, "max_model_len": 32}
    engine, metrics = scripted(store=store, executor=executor, model=model, **options)
    metrics.attach(StillEngine(engine, has_store=True))  # type: ignore[arg-type]
    for name in ("a1", "b", "c", "a2"):  # b and c push out what a1 has computed
        add(engine, name, 17, 2)
        run(engine)
    seen = scrape(metrics)
    assert seen["jaxserve:prefix_cache_queries_total",] == 4 * 17
    assert seen["jaxserve:prefix_cache_hits_total",] == 0
    assert seen["jaxserve:external_prefix_cache_queries_total",] == 4 * 17
    assert seen["jaxserve:external_prefix_cache_hits_total",] == 16
    assert seen["jaxserve:prompt_tokens_cached_total",] == 16
    assert seen["jaxserve:prompt_tokens_by_source_total", "local_compute"] == 4 * 17 - 16
    assert seen["jaxserve:prompt_tokens_by_source_total", "local_cache_hit"] == 0
    assert seen["jaxserve:prompt_tokens_by_source_total", "external_kv_transfer"] == 16
    assert seen["jaxserve:restored_tokens_total",] == 0


def test_an_embedding_counts_as_a_prompt_without_an_answer() -> None:
    engine, metrics = scripted(max_num_batched_tokens=16)
    engine.add_embedding("e", [1] * 20)
    run(engine)
    seen = scrape(metrics)
    count = {name for (name, *rest), value in seen.items() if name.endswith("_count") and value}
    assert count == {
        f"jaxserve:{name}_count"
        for name in (
            "e2e_request_latency_seconds", "iteration_tokens_total", "request_generation_tokens",
            "request_num_preemptions", "request_prefill_kv_computed_tokens",
            "request_prompt_tokens", "request_queue_time_seconds", "step_time_seconds",
        )
    }  # fmt: skip
    assert seen["jaxserve:prompt_tokens_total",] == 20
    assert seen["jaxserve:iteration_tokens_total_sum",] == 20
    assert seen["jaxserve:request_generation_tokens_sum",] == 0
    assert seen["jaxserve:request_success_total", "stop"] == 1


def test_answers_to_one_prompt_are_counted_once_with_the_longest(make_engine) -> None:
    async def main() -> None:
        engine = make_engine()
        metrics = Metrics()
        metrics.attach(engine)

        async def ask(prompts: list[list[int]], n: int, **fields) -> None:
            params = SamplingParams(**{"max_tokens": 12, "seed": 3, **fields})
            async for _ in generate_choices(engine, "r", prompts, params, n=n):
                pass

        def observed(name: str) -> tuple[float, float]:
            seen = scrape(metrics)
            return seen[f"jaxserve:{name}_count",], seen[f"jaxserve:{name}_sum",]

        # Answers end at the first of these tokens, after 12 of them at the latest.
        lengths = {}
        stops = tuple(range(0, 256, 5))
        for prompt in (1, 2):
            for seed in (3, 4, 5):
                alone = SamplingParams(max_tokens=12, seed=seed, stop_token_ids=stops)
                got = [delta async for delta in engine.generate(None, [prompt], alone)]
                lengths[prompt, seed] = got[-1].num_output_tokens
        assert observed("request_params_n") == (0, 0)
        generated = scrape(metrics)["jaxserve:request_generation_tokens_sum",]
        assert generated == sum(lengths.values()) and len(set(lengths.values())) > 2

        await ask([[1], [2]], 3, stop_token_ids=stops)
        longest = [max(lengths[prompt, seed] for seed in (3, 4, 5)) for prompt in (1, 2)]
        assert observed("request_params_n") == (2, 6)
        assert observed("request_max_num_generation_tokens") == (2, sum(longest))
        assert observed("request_generation_tokens") == (12, 2 * generated)
        assert observed("request_params_max_tokens") == (12, 12 * 12)

        await ask([[1]], 1, max_tokens=None)  # as many as there is room for, as in vLLM
        assert observed("request_params_n") == (3, 7)
        room = engine.model_info.max_model_len - 1
        assert observed("request_params_max_tokens") == (13, 12 * 12 + room)
        before = scrape(metrics)
        for refused in ({"grammar": Grammar("regex", "(")}, {"max_tokens": 600}):
            prompt = [1] * (600 if "max_tokens" in refused else 1)
            with pytest.raises(InvalidRequest):
                await ask([prompt], 2, **refused)
        after = scrape(metrics)
        params = [key for key in before if "request_params" in key[0]]
        assert len(params) > 10 and [before[k] for k in params] == [after[k] for k in params]

    asyncio.run(main())


def test_preemptions_and_aborts_are_seen() -> None:
    engine, metrics = scripted(num_pages=8, page_size=4, max_model_len=32)
    add(engine, "a", 8, 20)
    add(engine, "b", 8, 20)
    add(engine, "c", 8, 20)
    engine.abort("c")
    run(engine)
    seen = scrape(metrics)
    assert seen["jaxserve:num_preemptions_total",] > 0
    assert seen["jaxserve:request_num_preemptions_sum",] == seen["jaxserve:num_preemptions_total",]
    assert seen["jaxserve:request_success_total", "abort"] == 1
    assert seen["jaxserve:e2e_request_latency_seconds_count",] == 2  # not of the aborted one


def test_a_request_that_ended_before_its_first_token_had_a_prompt() -> None:
    totals = Totals(max_model_len=512)
    engine, _ = scripted()
    add(engine, "a", 9, 1)
    engine.abort("a")
    [record] = engine.records.requests()
    request = Request(
        request_id="a", prompt_token_ids=[1], params=SamplingParams(), max_tokens=1
    )  # only read
    totals.request_done(record, request)
    assert totals.counts["prompt_tokens"] == 0
    totals.request_done(record._replace(finish_reason=FinishReason.STOP), request)
    assert totals.counts["prompt_tokens"] == 9
    embedded = record._replace(finish_reason=FinishReason.STOP, is_answered=False)
    totals.request_done(embedded, request)  # whose prompt its step has counted
    assert totals.counts["prompt_tokens"] == 9


def test_gauges_while_requests_run() -> None:
    engine, metrics = scripted(max_num_seqs=1, num_pages=10, page_size=4, max_model_len=40)
    add(engine, "a", 12, 8)
    add(engine, "b", 12, 8)
    engine.step(1.0)
    seen = scrape(metrics)
    assert seen["jaxserve:num_requests_running",] == 1
    assert seen["jaxserve:num_requests_waiting",] == 1
    assert seen["jaxserve:kv_cache_usage_perc",] == seen["jaxserve:kv_pages", "used"] / 10
    assert seen["jaxserve:kv_cache_usage_perc",] > 0


def test_vllms_names_carry_the_same_values() -> None:
    texts = {}
    for compat in COMPAT_CHOICES:
        engine, metrics = scripted(compat)
        add(engine, "a", 20, 4)
        run(engine)
        texts[compat] = generate_latest(metrics.registry).decode()
        assert check_exposition(texts[compat]) == []
    ours, theirs = (_families(texts[compat]) for compat in COMPAT_CHOICES)
    shared = {name.partition(":")[2] for name in theirs if name.startswith("vllm:")}
    assert shared == set(MetricNames.shared())
    for name in shared & {name.partition(":")[2] for name in ours}:
        assert f"jaxserve:{name}" not in theirs
        one, other = ours[f"jaxserve:{name}"], theirs[f"vllm:{name}"]
        assert (one.type, one.documentation) == (other.type, other.documentation)
        if "seconds" not in name:
            assert [s.value for s in one.samples] == [s.value for s in other.samples]
    assert "jaxserve:compiles" in theirs


def _families(text: str) -> dict:
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_a_gateway_finds_what_it_asks_for() -> None:
    engine, metrics = scripted("vllm", num_pages=64, page_size=4)
    families = _families(generate_latest(metrics.registry).decode())
    for name in GAIE_GAUGES:
        [sample] = families[name].samples
        assert families[name].type == "gauge"
        assert sample.labels == {"model_name": engine.info.name, "engine": "0"}
    [info] = families["vllm:cache_config_info"].samples
    assert info.value == 1
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("4", "64")
    assert info.labels["cache_dtype"] == engine.info.kv_cache_dtype != engine.info.dtype


def test_vllms_dashboard_finds_what_it_asks_for() -> None:
    _, metrics = scripted("vllm")
    served = {name for name, *_ in scrape(metrics)}
    assert set(VLLMS_BOARD) <= served


def test_the_checker_finds_faults() -> None:
    assert check_exposition("# HELP a_total x\n# TYPE a_total counter\na_total 1\n") == []
    faulty = {
        "# HELP a x\n# TYPE a counter\na 1\n": "_total",
        "# TYPE a_total counter\na_total 1\n": "no HELP",
        "# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n": "base units",
        "# HELP b x\n# TYPE b gauge\nb 1\nb 2\n": "twice",
        "# HELP b x\n# TYPE b gauge\nb 1\nc 2\n": "no family",
        '# HELP b x\n# TYPE b gauge\nb{le="1"} 1\n': "le outside",
        '# HELP b x\n# TYPE b gauge\nb{Upper="1"} 1\n': "label Upper",
    }
    for text, message in faulty.items():
        assert message in "; ".join(check_exposition(text))


def test_token_bounds() -> None:
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_bounds(4) == (1, 2)


def test_over_the_http_app() -> None:
    _, metrics = scripted()
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    client = TestClient(app)
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert check_exposition(plain.text) == []
    newer = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert newer.headers["content-type"].startswith("application/openmetrics-text")
    assert newer.text.endswith("# EOF\n")


def test_the_metrics_port_is_named_and_a_taken_one_is_a_clear_error(make_engine) -> None:
    port, lines = free_port(), []

    async def main() -> None:
        options = ServerOptions(port=0, metrics_port=port)
        first = asyncio.create_task(serve(make_engine, options, announce=lines.append))
        while not lines:
            await asyncio.sleep(0.01)
        assert f" metrics=127.0.0.1:{port}" in lines[0] and "http=" not in lines[0]
        assert "jaxserve:ready" in await asyncio.to_thread(fetch, f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=f"HTTP on 127.0.0.1:{port}"):
            await serve(make_engine, options)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(main())
