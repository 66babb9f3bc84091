"""Anything at all as a request: refused or served, never a bug, nothing leaked.

Requests are made from the application's own OpenAPI schema by schemathesis, by it and against it;
and from requests that are served, with parts replaced. `scripts/fuzz.sh` goes on for longer.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, GenerationMode

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.limits import RequestLimits
from jaxserve.server.metrics.endpoint import metrics_router
from jaxserve.server.observability import Observability
from jaxserve.testing.fake_engine import fake_engine

# Per route. A long run is many rounds with seeds of their own: see scripts/fuzz.sh.
NUM_EXAMPLES = 100 if settings.get_current_profile_name() == "rounds" else 10
LIMITS = RequestLimits(max_n=3, max_prompts=5)
GOOD_STATUSES = {200, 304, 400, 401, 403, 404, 405, 406, 413, 415, 422, 429, 501}
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
# By path: bodies that are served, from which others are but a few steps away.
SERVED: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": MESSAGES, "max_tokens": 4},
        {"messages": MESSAGES, "max_tokens": 4, "stream": True, "logprobs": True,
         "top_logprobs": 3, "stream_options": {"include_usage": True}},
        {"messages": MESSAGES, "max_tokens": 4, "tools": [TOOL], "tool_choice": "auto"},
        {"messages": MESSAGES, "max_tokens": 8, "response_format": {"type": "json_object"}},
        {"messages": MESSAGES, "max_tokens": 4, "n": 2, "seed": 1, "logit_bias": {"65": 5}},
    ],
    "/v1/completions": [
        {"prompt": "hi", "max_tokens": 4},
        {"prompt": [[1, 2], [3]], "max_tokens": 4, "logprobs": 2, "echo": True},
        {"prompt": ["a", "b"], "max_tokens": 4, "stream": True, "stop": ["x", "\n"]},
    ],
    "/v1/responses": [{"input": "hi", "max_output_tokens": 4}],
    "/v1/responses/input_tokens": [{"input": "hi"}],
    "/v1/embeddings": [{"input": "hi"}, {"input": ["a", "b"], "encoding_format": "base64"}],
    "/tokenize": [{"prompt": "hi"}, {"messages": MESSAGES}],
    "/detokenize": [{"tokens": [104, 105]}],
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, 2**64, -(2**70), 0.5, 1e308, "", "x",
    "\x00", "\ud83d\ude00", "auto", "none", "required", "json_schema", "stop", [], {}, [[]],
    [None], [1, "a"], {"type": "json_schema"}, {"type": "regex", "pattern": "("},
]  # fmt: skip


class Target(NamedTuple):
    """A server in a thread, and a plain client of it."""

    engine: AsyncEngine
    client: httpx.Client


@pytest.fixture(scope="module")
def target(serve_in_a_thread: Callable[..., AbstractContextManager[str]]) -> Iterator[Target]:
    engine = fake_engine(max_model_len=64, num_pages=512, step_seconds=0)
    observability = Observability()
    with (
        serve_in_a_thread(
            engine,
            limits=LIMITS,
            parsers={"observability": observability},
            routers=[metrics_router(observability.metrics)],
        ) as url,
        httpx.Client(base_url=url, timeout=30, trust_env=False) as client,
    ):
        yield Target(engine, client)
    engine.shutdown()


def check(target: Target, answer: httpx.Response) -> None:
    """Neither a bug nor a leak, and an error is said in OpenAI's shape."""
    assert answer.status_code in GOOD_STATUSES, f"{answer.status_code}: {answer.text[:500]}"
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert '"code":"internal_error"' not in answer.text.replace(" ", "")
    assert target.engine.is_ready
    deadline = time.monotonic() + 10
    while (load := target.engine.load()).num_running + load.num_waiting + load.num_used_pages:
        assert time.monotonic() < deadline, f"something is left: {load}"
        time.sleep(0.001)


def operations() -> list[APIOperation]:
    schema = schemathesis.openapi.from_dict(make_app(ServerContext()).openapi())
    found = []
    for result in schema.get_all_operations():
        operation = result.ok()  # pyright: ignore[reportAttributeAccessIssue] - or it raises
        found.append(operation)
    return found


OPERATIONS = {operation.label: operation for operation in operations()}


MODES = [
    (label, mode)
    for label, operation in OPERATIONS.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.body  # any text is a good path or query
]


@pytest.mark.parametrize(("label", "mode"), MODES)
def test_requests_made_from_the_schema(target: Target, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]

    @FUZZ
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        kwargs = case.as_transport_kwargs(base_url=str(target.client.base_url))
        kwargs.pop("cookies", None)
        request = {name: kwargs[name] for name in ("json", "params", "headers") if name in kwargs}
        if "data" in kwargs:
            request["content"] = kwargs["data"]
        try:
            content = httpx.Request(kwargs["method"], kwargs["url"], **request)
        except (ValueError, TypeError, httpx.InvalidURL):
            return  # this client cannot say it
        check(target, target.client.send(content))

    ask()


@st.composite
def near_served(draw: st.DrawFn, path: str) -> bytes:
    """The JSON of a served body with a few parts replaced, dropped or added; or damaged."""
    body = copy.deepcopy(draw(st.sampled_from(SERVED[path])))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if isinstance(place, dict) and draw(st.integers(0, 5)) == 0:
                del place[key]
            else:
                place[key] = copy.deepcopy(draw(st.sampled_from(ODD) | JSON))
            break
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from(FIELDS))] = copy.deepcopy(draw(st.sampled_from(ODD) | JSON))
    data = json.dumps(body).encode()
    if draw(st.integers(0, 7)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=8,
)


def known_fields() -> list[str]:
    schemas = make_app(ServerContext()).openapi()["components"]["schemas"]
    return sorted({name for schema in schemas.values() for name in schema.get("properties", ())})


FIELDS = known_fields()


@pytest.mark.parametrize("path", SERVED)
def test_requests_near_those_that_are_served(target: Target, path: str) -> None:
    for body in SERVED[path]:
        answer = target.client.post(path, json=body)
        # The byte tokenizer's template knows of no tools.
        assert answer.status_code == (400 if "tools" in body else 200), f"{body}: {answer.text}"

    @settings(FUZZ, max_examples=4 * NUM_EXAMPLES)
    @given(data=near_served(path))
    def ask(data: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        check(target, target.client.post(path, content=data, headers=headers))

    ask()


def test_what_a_request_says_is_given_back_whatever_it_is(target: Target) -> None:
    big = 2**70
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "maxProperties": big}}
    for fields in ({"metadata": {"a": "b"}}, {"tools": [tool], "tool_choice": "none"}):
        for stream in (False, True):
            body = {"input": "hi", "max_output_tokens": 4, "stream": stream, **fields}
            answer = target.client.post("/v1/responses", content=json.dumps(body).encode(),
                                        headers={"Content-Type": "application/json"})  # fmt: skip
            check(target, answer)
            assert answer.status_code == 200, answer.text
            if "tools" in fields:
                assert str(big) in answer.text


@pytest.mark.parametrize("path", sorted(SERVED))
def test_deep_and_odd_json_is_no_bug(target: Target, path: str) -> None:
    deep = b"[" * 100_000
    deep_object = b'{"messages":' * 5_000 + b"1" + b"}" * 5_000
    schema: Any = {"type": "object"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    nested = {**SERVED[path][0], "response_format": {
        "type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}  # fmt: skip
    for data in (deep, deep_object, b"\xff\xfe", b"NaN", b'{"a":1e999}', b"",
                 json.dumps(nested).encode(), b'"\\ud800"', b'{"prompt":"\\ud800"}',
                 b'{"messages":[{"role":"user","content":"\\udfff"}]}',
                 b'{"prompt":"\\u0000","input":"\\u0000"}'):  # fmt: skip
        for kind in ("application/json", "text/plain", ""):
            check(target, target.client.post(path, content=data, headers={"Content-Type": kind}))
