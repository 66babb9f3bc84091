"""The live view and the page's looks, in a headless Chromium."""

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from jaxserve.testing.browser import find_chromium, launched
from tests.server.page.browser import PHONE, opened
from tests.waiting import PATIENCE, eventually

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: see scripts/install_chromium.sh"
)
expect.set_options(timeout=PATIENCE * 1000)

# Elements whose text has less contrast than WCAG's AA asks for, with their ratio.
CONTRAST = """
() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const part = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(at).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!(own || element.value) || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [light, dark] = [luminance(channels(style.color)), luminance(background(element))].sort(
      (a, b) => b - a,
    );
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return found;
}
"""
# How many colours a canvas shows: a blank one has one.
COLOURS = """
(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def server(page_server: Callable):
    return page_server({"num_pages": 200, "step_seconds": 0.002})


def value(page: Page, section: str, term: str):
    """The value beside a term of a list."""
    row = page.locator(f"#{section} > div", has=page.locator("dt", has_text=re.compile(f"^{term}")))
    return row.locator("dd")


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_live_numbers_and_charts_follow_the_engine(browser: Browser, server):
    with opened(browser, server.url) as (page, _):
        expect(value(page, "totals", "Finished")).to_have_text("0")
        expect(page.locator("#ttft-text")).to_have_text("No answer has begun yet.")
        expect(page.locator("#model-name")).to_have_text("fake")
        expect(value(page, "facts", "Context")).to_have_text("512 tokens")
        expect(value(page, "totals", "Compiles while serving")).to_have_text("0")
        for i in range(3):
            server.chat(f"hello {i}")
        expect(value(page, "totals", "Finished")).to_have_text("3")
        expect(value(page, "totals", "Generated tokens")).to_have_text("24")
        expect(value(page, "tiles", "Running")).to_have_text("0 / 16")
        percentiles = re.compile("p50 .*s, p99 .*of the last 3")
        expect(page.locator("#ttft-text")).to_contain_text(percentiles)
        expect(page.locator("#itl-text")).to_contain_text("of the last 3")
        expect(page.locator("#steps-text")).to_contain_text(re.compile("padding .* of [1-9]"))
        cached = server.engine.load().num_cached_pages
        expect(page.locator("#pages-text")).to_contain_text(f"0 used, {cached} cached")
        for name in ("steps", "rows", "requests", "pages", "ttft", "itl"):
            assert page.locator(f"#{name}-chart").evaluate(COLOURS) > 2, name


def test_a_step_tells_of_itself_when_pointed_at(browser: Browser, server):
    server.chat()
    with opened(browser, server.url) as (page, _):
        text = page.locator("#steps-text")
        expect(text).to_contain_text("padding")
        chart = page.locator("#steps-chart")
        box = chart.bounding_box()
        assert box is not None
        chart.hover(position={"x": box["width"] - 2, "y": 40})
        expect(text).to_have_text(re.compile(r"^\d+ of \d+ tokens, \d+ of \d+ rows; .* ago$"))
        page.mouse.move(5, 5)
        expect(text).to_contain_text("padding")


def test_a_page_opened_late_shows_what_was_before(browser: Browser, server):
    for i in range(3):
        server.chat(f"hello {i}")
    with opened(browser, server.url) as (page, _):
        expect(page.locator("#ttft-text")).to_contain_text("of the last 3")


def test_a_server_that_warms_up_and_one_that_ends(browser: Browser, page_server: Callable):
    cold, warm = page_server(None), page_server({})
    with opened(browser, cold.url) as (page, complaints):
        expect(page.locator("#state")).to_have_text("warming up")
        cold.context.engine = warm.engine
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#model-name")).to_have_text("fake")
        complaints.allowed.append("ERR_FAILED")
        page.route("**/live*", lambda route: route.abort())
        expect(page.locator("#state")).to_have_text("no connection")
        page.unroute("**/live*")
        expect(page.locator("#state")).to_have_text("ready")


def test_nothing_is_asked_while_the_page_is_hidden(browser: Browser, server):
    with opened(browser, server.url) as (page, _):
        expect(page.locator("#state")).to_have_text("ready")
        hide = """(hidden) => {
          Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
        page.evaluate(hide, True)
        page.wait_for_timeout(200)  # one may be on its way
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(1500)
        assert not asked
        page.evaluate(hide, False)
        with page.expect_request("**/live?since=*"):
            pass


def test_the_keyboard_is_enough(browser: Browser, server):
    with opened(browser, server.url) as (page, _):
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#prompt")).to_be_focused()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        expect(page.locator("#prompt")).to_have_value("one\ntwo")
        page.keyboard.press("Enter")
        expect(page.locator(".message.user .body")).to_have_text("one\ntwo", use_inner_text=True)
        expect(page.locator(".message.model:not(.streaming)")).to_have_count(1)
        # Everything that can be operated is reached by Tab, has a name and shows its focus.
        seen: set[str] = set()
        for _ in range(80):
            page.keyboard.press("Tab")
            at = page.evaluate(
                """() => {
                  const at = document.activeElement;
                  if (at === document.body) return null; // past the last, before the first
                  const framed = [at, at.querySelector(".ink"), at.closest(".composer")];
                  const ring = framed.some((e) => e && getComputedStyle(e).outlineStyle !== "none");
                  return [at.id || at.textContent.trim(), ring];
                }"""
            )
            if at is None:
                continue
            if at[0] in seen:
                break
            seen.add(at[0])
            assert at[1], f"{at[0]} shows no focus"
        wanted = page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, a")]
              .filter((e) => e.checkVisibility() && e.tabIndex >= 0)
              .map((e) => e.id || e.textContent.trim())"""
        )
        assert set(wanted) <= seen
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea")]
              .filter((e) => !e.labels.length && !e.ariaLabel).map((e) => e.id)"""
        )
        assert not unnamed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser: Browser, server, scheme: str):
    options = {"viewport": PHONE, "color_scheme": scheme, "has_touch": True}
    with opened(browser, server.url, **options) as (page, _):
        page.fill("#prompt", "a_very_long_word" * 20)
        page.tap("#send")
        expect(page.locator(".message.model:not(.streaming)")).to_have_count(1)
        expect(page.locator("#pane-engine")).to_be_hidden()
        assert overflow(page) == 0 and not page.evaluate(CONTRAST)
        page.tap("#tab-engine")
        expect(page.locator("#pane-chat")).to_be_hidden()
        expect(value(page, "totals", "Finished")).to_have_text("1")
        assert overflow(page) == 0 and not page.evaluate(CONTRAST)
        assert page.locator("#pages-chart").evaluate(COLOURS) > 1
        page.tap("#tab-sampling")
        expect(page.locator("#temperature")).to_be_visible()
        assert overflow(page) == 0 and not page.evaluate(CONTRAST)
        expect(page.locator("#tab-sampling")).to_have_attribute("aria-selected", "true")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tab-chat")).to_be_focused()
        expect(page.locator(".message.user")).to_be_visible()


@pytest.mark.parametrize("width", [1440, 1100, 820])
def test_wide_screens(browser: Browser, server, width: int):
    viewport = {"width": width, "height": 800}
    with opened(browser, server.url, viewport=viewport) as (page, _):
        expect(page.locator("#pane-engine")).to_be_visible()
        expect(page.locator("#prompt")).to_be_visible()
        expect(page.locator("#pane-sampling")).to_be_visible(visible=width > 1240)
        assert overflow(page) == 0
        if width < 1240:
            page.click("#tab-sampling")
            expect(page.locator("#temperature")).to_be_visible()
            expect(page.locator("#prompt")).to_be_visible()


def test_light_and_dark(browser: Browser, server):
    background = "getComputedStyle(document.body).backgroundColor"
    options = {"color_scheme": "light", "reduced_motion": "reduce"}  # no colours in between
    # Playwright's `wait_for_function` looks again from inside the page, whose policy forbids it.
    with opened(browser, server.url, **options) as (page, _):
        expect(page.locator("#state")).to_have_text("ready")
        light = page.evaluate(background)
        assert not page.evaluate(CONTRAST)
        page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        eventually(lambda: page.evaluate(background) != light, seconds=10)
        dark = page.evaluate(background)
        assert not page.evaluate(CONTRAST)
        page.click("#theme")  # as the system -> light -> dark -> as the system
        assert page.evaluate(background) == light
        page.reload()
        assert page.evaluate(background) == light
        page.click("#theme")
        page.emulate_media(color_scheme="light", reduced_motion="reduce")
        is_light = "!matchMedia('(prefers-color-scheme: dark)').matches"
        eventually(lambda: page.evaluate(is_light), seconds=10)
        assert page.evaluate(background) == dark
        page.click("#theme")
        assert page.evaluate(background) == light


def test_reduced_motion(browser: Browser, server):
    with opened(browser, server.url, reduced_motion="reduce") as (page, _):
        moving = """[...document.querySelectorAll("*")].filter((e) => {
          const style = getComputedStyle(e);
          return style.animationName !== "none" || parseFloat(style.transitionDuration) > 0;
        }).length"""
        assert page.evaluate(moving) == 0
