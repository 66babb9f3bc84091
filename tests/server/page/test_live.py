import math
import re
from collections.abc import Callable
from importlib import resources

import pytest

from jaxserve.server.page.live import MAX_BINS


@pytest.fixture
def server(page_server: Callable):
    return page_server({"num_pages": 80})


def test_before_there_is_an_engine(page_server: Callable):
    live = page_server(None).live()
    assert (live["state"], live["model"], live["load"], live["pages"]) == (
        "warming up", None, None, None,
    )  # fmt: skip
    assert live["from_start"] and not live["steps"] and not live["requests"]


def test_what_is_remembered_and_then_only_what_is_new(server):
    server.chat()
    first = server.live()
    assert first["state"] == "ready" and first["from_start"]
    assert first["model"]["name"] == "fake"
    assert first["load"]["num_generated_tokens"] == 8
    assert len(first["steps"]) == first["load"]["num_steps"]
    [(finished, ttft, itl, output_tokens)] = first["requests"]
    assert output_tokens == 8 and 0 < finished <= first["time"] and ttft > 0 and itl > 0

    again = server.live(first["cursor"])
    assert not again["from_start"] and not again["steps"] and not again["requests"]

    server.chat("something else")
    later = server.live(again["cursor"])
    assert not later["from_start"] and len(later["requests"]) == 1
    assert len(first["steps"]) + len(later["steps"]) == later["load"]["num_steps"]
    assert later["steps"][0][0] > first["steps"][-1][0]


def test_steps_add_up(server):
    server.chat("hello " * 30)
    live = server.live()
    load = live["load"]
    assert sum(step[1] for step in live["steps"]) >= load["num_prompt_tokens"]
    for _, tokens, token_bucket, rows, row_bucket, seconds in live["steps"]:
        assert 0 < tokens <= token_bucket and 0 <= rows <= row_bucket and seconds >= 0


@pytest.mark.parametrize("cursor", ["", "x", "0-1-2", "1-2-3-4", "-", "a" * 1000, "\u0661-1-1"])
def test_cursors_that_are_not_ours_start_anew(server, cursor: str):
    server.chat()
    assert server.live(cursor)["from_start"]
    process = server.live()["cursor"].split("-")[0]
    assert server.live(f"{process}-x-1")["from_start"]


def test_page_map_agrees_with_the_load(server):
    server.chat("hello " * 20)
    live = server.live()
    [shard] = live["pages"]["device"]
    assert shard["pages"] == 80 and shard["bin_pages"] == 1
    assert sum(shard["used"]) == live["load"]["num_used_pages"] == 0
    assert sum(shard["cached"]) == live["load"]["num_cached_pages"] > 0
    assert live["pages"]["host"] is live["pages"]["disk"] is None


def test_large_pools_come_in_bins(page_server: Callable):
    server = page_server({"num_pages": 100_003})
    server.chat()
    live = server.live()
    [shard] = live["pages"]["device"]
    assert len(shard["used"]) == math.ceil(100_003 / shard["bin_pages"]) <= MAX_BINS
    assert sum(shard["cached"]) == live["load"]["num_cached_pages"]


def test_nothing_names_a_request_or_a_prompt(server):
    server.chat("a secret recipe", user="alice")
    text = server.get("live").text
    assert "secret" not in text and "chatcmpl" not in text and "alice" not in text


def test_an_engine_that_ends(server):
    server.engine.shutdown()
    assert server.live()["state"] == "stopped"


def test_the_page_and_its_files(server):
    page = server.get("")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = set(re.findall(r'(?:href|src)="page/([^"]+)"', page.text))
    present = {file.name for file in resources.files("jaxserve.server.page.static").iterdir()}
    assert names < present
    for name in present:
        file = server.get(f"page/{name}")
        assert file.status_code == 200 and file.text
        # Whatever a script imports is there too.
        assert set(re.findall(r'from "\./([^"]+)"', file.text)) <= present
        unchanged = server.get(f"page/{name}", headers={"If-None-Match": file.headers["etag"]})
        assert unchanged.status_code == 304 and not unchanged.content
    assert server.get("page/nothing.js").status_code == 404
    assert server.get("page/..%2Frouter.py").status_code == 404


def test_the_page_may_use_nothing_but_this_server(server):
    policy = server.get("").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    for file in resources.files("jaxserve.server.page.static").iterdir():
        text = file.read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(", text), file.name
        assert not re.search(r'\sstyle="|\son[a-z]+="', text), file.name
