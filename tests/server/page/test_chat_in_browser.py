"""The chat, in a headless Chromium."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from jaxserve.server.security.keys import ApiKeys
from jaxserve.testing.browser import find_chromium, launched
from jaxserve.testing.fake_executor import FakeModel
from tests.server.page.browser import PHONE, opened
from tests.waiting import PATIENCE

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: see scripts/install_chromium.sh"
)
expect.set_options(timeout=PATIENCE * 1000)


class Letters(FakeModel):
    """Answers with small letters."""

    def next_token(self, history: Sequence[int] | np.ndarray, seed: int) -> int:
        """The token after `history`."""
        data = np.ascontiguousarray(history, dtype=np.int32).tobytes()
        return ord("a") + hashlib.blake2b(data, digest_size=1).digest()[0] % 26


KEY = "open-sesame-please"
LETTERS = {"model": Letters(vocab_size=256), "step_seconds": 0.005}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def server(page_server: Callable):
    return page_server(LETTERS)


def say(page: Page, text: str = "hello", max_tokens: int = 20) -> None:
    """Send a message, as a reader would."""
    if page.viewport_size != PHONE:
        page.fill("#max_tokens", str(max_tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Page, n: int = 1) -> None:
    """Wait for the end of the n-th answer."""
    expect(page.locator(".message.model:not(.streaming)")).to_have_count(n)


def scripted(page: Page, chunks: Sequence[Any]) -> list[dict[str, Any]]:
    """Let chat requests be answered with these chunks; gives the requests' bodies as they come."""
    bodies: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        bodies.append(route.request.post_data_json or {})
        events = [f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks]
        body = "".join([": a comment\n\n", *events, "data: [DONE]\n\n"])
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    return bodies


def chunk(delta: dict[str, Any], logprobs: Sequence[Any] = (), end: str | None = None) -> Any:
    tokens = {"content": list(logprobs)} if logprobs else None
    choice = {"index": 0, "delta": delta, "logprobs": tokens, "finish_reason": end}
    return {"choices": [choice], "usage": None}


def token(text: str, logprob: float, *others: tuple[str, float]) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    top = [entry(text, logprob), *(entry(*other) for other in others)]
    return {**entry(text, logprob), "top_logprobs": top}


def test_an_answer_streams_and_is_counted(browser: Browser, page_server: Callable):
    server = page_server({**LETTERS, "step_seconds": 0.03})
    with opened(browser, server.url) as (page, _):
        say(page, max_tokens=30)
        streaming = page.locator(".message.model.streaming .body")
        expect(streaming).to_have_text(re.compile("^[a-z]{3,29}$"))  # before it is complete
        expect(page.locator("#send")).to_be_hidden()
        answered(page)
        expect(page.locator(".message.model .body")).to_have_text(re.compile("^[a-z]{30}$"))
        meta = page.locator(".message.model .meta")
        expect(meta).to_contain_text(re.compile(r"cut at max tokens · first token [\d.]+ m?s"))
        expect(meta).to_contain_text(re.compile(r"[\d.]+ tokens/s · \d+ in, 30 out"))
        answer = page.locator(".message.model .body").inner_text()
        expect(page.locator("#announcer")).to_contain_text(answer)
        expect(page.locator("#prompt")).to_be_focused()


def test_turns_regenerate_and_a_new_chat(browser: Browser, server):
    with opened(browser, server.url) as (page, _):
        page.fill("#system", "Be brief.")
        bodies: list[Any] = []
        page.on("request", lambda r: bodies.append(r.post_data_json) if r.post_data else None)
        say(page, "first")
        answered(page)
        first = page.locator(".message.model .body").inner_text()
        say(page, "second")
        answered(page, 2)
        wanted = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "second"},
        ]
        assert bodies[1]["messages"] == wanted
        # Only the last answer is for regenerating.
        expect(page.locator(".regenerate:visible")).to_have_count(1)
        page.locator(".regenerate").last.click()
        expect(page.locator(".message.model")).to_have_count(2)
        answered(page, 2)
        assert bodies[2]["messages"] == wanted
        page.click("#new-chat")
        expect(page.locator(".message")).to_have_count(0)
        say(page, "third")
        answered(page)
        assert [m["content"] for m in bodies[3]["messages"]] == ["Be brief.", "third"]


@pytest.mark.parametrize("how", ["key", "button", "new chat"])
def test_stop_ends_the_request(browser: Browser, page_server: Callable, how: str):
    server = page_server({**LETTERS, "step_seconds": 0.03})
    with opened(browser, server.url) as (page, _):
        say(page, max_tokens=400)
        expect(page.locator(".token").nth(2)).to_be_visible()
        if how == "key":
            page.keyboard.press("Escape")
        else:
            page.click("#stop-button" if how == "button" else "#new-chat")
        if how == "new chat":
            expect(page.locator(".message")).to_have_count(0)
        else:
            expect(page.locator(".message.model .meta")).to_contain_text("stopped")
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#totals")).to_contain_text("Aborted, shed1, 0")
    load = server.engine.load()
    assert (load.num_running, load.num_aborted) == (0, 1) and load.num_used_pages == 0


def test_refusals_are_told_and_can_be_tried_again(browser: Browser, server):
    with opened(browser, server.url) as (page, complaints):
        complaints.allowed.append("status of 400")
        say(page, "long " * 200)
        failure = page.locator(".failure")
        expect(failure).to_have_role("alert")
        expect(failure).to_contain_text("The server refused (400, invalid_request_error)")
        expect(failure).to_contain_text(re.compile("tokens"))
        page.click("#new-chat")

        page.fill("#temperature", "-1")
        say(page)
        expect(failure).to_contain_text("temperature")
        page.fill("#temperature", "1")
        failure.get_by_role("button", name="Try again").click()
        answered(page)
        expect(failure).to_have_count(0)

        page.fill("#schema", "{")
        expect(page.locator("#schema-error")).to_contain_text("Not JSON yet")
        say(page)
        expect(failure).to_contain_text("JSON schema")


def test_streams_that_break(browser: Browser, server):
    with opened(browser, server.url) as (page, complaints):
        broken = [chunk({"content": "half an "}), {"error": {"message": "the engine stopped"}}]
        scripted(page, broken)
        say(page)
        expect(page.locator(".failure")).to_contain_text("the engine stopped")
        expect(page.locator(".message.model .body")).to_have_text("half an")
        expect(page.locator(".message.model .meta")).to_contain_text("failed")

        complaints.allowed.append("ERR_FAILED")
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.abort())
        say(page)
        expect(page.locator(".failure").last).to_contain_text("The server does not answer")


def test_probabilities_on_hover_focus_and_tap(browser: Browser, server):
    tokens = [
        token("Hello", -0.05, ("Hi", -3.2)),
        token(" wörld", -2.5, (" there", -0.2), ("\n", -4)),
        token("!", -0.9),
    ]
    text = "Hello wörld!"
    with opened(browser, server.url, has_touch=True) as (page, _):
        scripted(page, [chunk({"content": text}, tokens), chunk({}, end="stop")])
        say(page)
        spans, tip = page.locator(".token"), page.locator("#tip")
        expect(spans).to_have_text(["Hello", " wörld", "!"])
        expect(tip).to_be_hidden()

        spans.nth(1).hover()
        expect(tip).to_contain_text("␣wörld 8.2 %")
        expect(tip.locator("li")).to_have_text(
            [re.compile("␣there.*81.9 %"), re.compile("␣wörld.*8.2 %"), re.compile("↵.*1.8 %")]
        )
        expect(tip.locator("li.chosen")).to_contain_text("wörld")
        expect(spans.nth(1)).to_have_attribute("aria-describedby", "tip")
        page.mouse.move(5, 5)
        expect(tip).to_be_hidden()

        # One stop of the Tab key for the whole answer, arrows within.
        page.focus("#log")
        page.keyboard.press("Tab")
        expect(spans.nth(0)).to_be_focused()
        expect(tip).to_contain_text("Hello 95.1 %")
        page.keyboard.press("ArrowRight")
        expect(tip).to_contain_text("wörld 8.2 %")
        page.keyboard.press("End")
        expect(tip).to_contain_text("! 40.7 %")
        page.keyboard.press("Escape")
        expect(tip).to_be_hidden()
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Regenerate")).to_be_focused()

        spans.nth(0).tap()
        expect(tip).to_contain_text("Hello 95.1 %")


def test_tints_say_how_unlikely_a_token_was(browser: Browser, server):
    with opened(browser, server.url) as (page, _):
        tokens = [token("a", -0.01), token("b", -1.0), token(" c", -6.0)]
        scripted(page, [chunk({"content": "ab c"}, tokens, "stop")])
        say(page)
        script = "e => getComputedStyle(e).backgroundColor"
        colours = [page.locator(".token .ink").nth(i).evaluate(script) for i in range(3)]
        assert colours[0] == "rgba(0, 0, 0, 0)" and len(set(colours)) == 3
        assert page.locator(".token").nth(2).evaluate(script) == colours[0]  # not the space
        page.uncheck("#tint")
        assert page.locator(".token .ink").nth(2).evaluate(script) == colours[0]


def test_text_that_does_not_keep_step_with_its_tokens(browser: Browser, server):
    def part(*values: int) -> dict[str, Any]:
        return {"token": "\ufffd", "logprob": -1.0, "bytes": list(values), "top_logprobs": []}

    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "Hm."}, [token("<think>", -0.1), token("Hm.", -0.1)]),
        chunk({"content": ""}, [part(0xE2), part(0x82)]),  # two thirds of a euro
        chunk({"content": "€"}, [part(0xAC)]),
        chunk({"content": ""}, [token(" 5", -0.1)]),  # held back: might begin a stop string
        chunk({"content": " 5 and "}, [token(" and", -0.1), token(" ", -0.1)]),
        chunk({"content": "<b>&amp;"}, [token("<b>", -0.1), token("&amp;", -0.1)]),
        chunk({"content": " untold"}, [token("<eos>", -0.1)], "stop"),
    ]
    with opened(browser, server.url) as (page, _):
        scripted(page, chunks)
        say(page)
        answered(page)
        body = page.locator(".message.model > .body")
        assert body.inner_text() == "€ 5 and <b>&amp; untold"
        tokens = body.locator(".token")
        assert tokens.all_text_contents() == ["€", " 5", " and", " ", "<b>", "&amp;"]
        assert body.locator("b").count() == 0
        tokens.first.hover()
        expect(page.locator("#tip .tip-head")).to_have_count(3)
        expect(page.locator("#tip")).to_contain_text("<82>")
        expect(page.locator(".thinking .body")).to_have_text("Hm.")
        assert "Hm." not in page.locator("#announcer").inner_text()


def test_model_and_reader_cannot_inject_html(browser: Browser, server):
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    with opened(browser, server.url) as (page, _):
        scripted(page, [chunk({"content": attack}, [token(attack, -3.0, ("<i>", -1.0))], "stop")])
        say(page, attack)
        answered(page)
        assert page.locator(".message.model > .body").inner_text() == attack
        assert page.locator(".message.user .body").inner_text() == attack
        page.locator(".token").hover()
        expect(page.locator("#tip")).to_contain_text("<i>")
        assert page.locator("main img, main script, #tip img, #tip i:not(.bar)").count() == 0


def test_settings_reach_the_request_and_outlive_a_reload(browser: Browser, server):
    with opened(browser, server.url) as (page, _):
        bodies = scripted(page, [chunk({"content": "x"}, end="stop")])
        say(page)
        expect(page.locator(".message.model .meta")).to_contain_text("complete")
        assert bodies[0] | {"messages": []} == {
            "model": "fake", "messages": [], "stream": True,
            "stream_options": {"include_usage": True}, "max_tokens": 20, "logprobs": True,
            "top_logprobs": 5,
        }  # fmt: skip
        values = {
            "temperature": 0.2, "top_p": 0.5, "min_p": 0.1, "top_k": 40, "seed": 7,
            "repetition_penalty": 1, "presence_penalty": -0.5, "frequency_penalty": 0.3,
        }  # fmt: skip
        for name, value in values.items():
            page.fill(f"#{name}", str(value))
        page.fill("#stop", "END\n###")
        page.fill("#schema", '{"type": "object"}')
        page.uncheck("#logprobs")
        page.reload()
        say(page)
        answered(page)
        schema = {"name": "answer", "schema": {"type": "object"}}
        wanted = {**values, "stop": ["END", "###"], "max_tokens": 20} | {
            "response_format": {"type": "json_schema", "json_schema": schema}
        }
        got = bodies[1]
        for name in ("model", "messages", "stream", "stream_options"):
            got.pop(name)
        assert got == wanted
        page.get_by_role("button", name="Reset").click()
        expect(page.locator("#temperature")).to_have_value("")
        expect(page.locator("#schema")).to_have_value("")


def test_the_models_defaults_are_shown_and_left_to_the_server(browser: Browser, page_server):
    advised = {"temperature": 0.25, "top_k": 7}
    server = page_server({**LETTERS, "default_sampling_params": advised})
    with opened(browser, server.url) as (page, _):
        for name, shown in (("temperature", "0.25"), ("top_k", "7"), ("top_p", "1")):
            expect(page.locator(f"#{name}")).to_have_attribute("placeholder", shown)
            expect(page.locator(f"#{name}")).to_have_value("")
        expect(page.locator("#temperature-range")).to_have_value("0.25")
        bodies = scripted(page, [chunk({"content": "x"}, end="stop")])
        say(page)
        answered(page)
        assert not {"temperature", "top_k", "top_p"} & bodies[0].keys()


def test_api_keys(browser: Browser, page_server: Callable, tmp_path: Path):
    (tmp_path / "keys.toml").write_text(f'[tenants.reader]\nkeys = ["{KEY}"]\n')
    (tmp_path / "keys.toml").chmod(0o600)
    server = page_server(LETTERS, keys=ApiKeys(tmp_path / "keys.toml"))
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, server.url, permissions=permissions) as (page, complaints):
        complaints.allowed.append("status of 401")
        expect(page.locator("#state")).to_have_text("needs an API key")
        say(page)
        expect(page.locator(".failure")).to_contain_text("The server asks for an API key")
        expect(page.locator("#api-key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Tab")
        expect(page.locator("#state")).to_have_text("ready")
        page.get_by_role("button", name="Try again").click()
        answered(page)

        page.get_by_role("button", name="Copy as curl").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        command = page.evaluate("navigator.clipboard.readText()")
        assert command.startswith(f"curl -N '{server.url}v1/chat/completions'")
        assert '"Authorization: Bearer $JAXSERVE_API_KEY"' in command and KEY not in command
        stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert KEY not in stored[0] and KEY in stored[1]
