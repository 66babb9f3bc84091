"""Take the pictures of the page that the README shows, with a real model and other callers.

Usage: python scripts/take_screenshots.py [--model smollm2-135m | --url http://HOST:PORT]

Starts a server on the model (pulled before: `jaxserve pull smollm2-135m`), lets some clients ask
it things meanwhile, chats on the page and writes light.png, dark.png and phone.png. Needs
playwright and a Chromium.
"""

import argparse
import base64
import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, ViewportSize

from jaxserve.testing.browser import find_chromium, launched

QUESTIONS = ("Give me a short fact about whales.", "Why is the sky blue? Three sentences.")
TOPICS = ("rain", "bread", "the moon", "trains", "a lighthouse", "bees", "chess", "salt", "maps")
WIDE: ViewportSize = {"width": 1440, "height": 1100}
PHONE: ViewportSize = {"width": 390, "height": 844}
SERVER = ("--max-num-seqs", "12", "--num-pages", "256", "--host-cache-memory", "0.25")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the screenshots of the page.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "screenshots")
    parser.add_argument("--clients", type=int, default=10, help="other callers (%(default)s)")
    parser.add_argument("--warm-seconds", type=float, default=40, help="of load before the first")
    args = parser.parse_args()
    if find_chromium() is None:
        sys.exit("no Chromium here: see scripts/install_chromium.sh")
    args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        url = (args.url or stack.enter_context(server(args.model))).rstrip("/") + "/"
        browser = stack.enter_context(launched())
        stack.enter_context(load(url, args.clients))
        for name in ("light", "dark"):
            with chatted(browser, url, name, WIDE, args.warm_seconds) as page:
                hover_a_doubtful_token(page)
                save(page, args.out / f"{name}.png")
        with chatted(browser, url, "light", PHONE, args.warm_seconds) as page:
            shots = [page.screenshot()]
            page.tap("#tab-engine")
            page.wait_for_timeout(1500)
            shots.append(page.screenshot())
            save_beside(page, shots, args.out / "phone.png")


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """A server on a model; gives its URL."""
    command = [
        str(Path(sys.executable).with_name("jaxserve")), "serve", model, "--port", "0",
        "--http-port", "0", *SERVER,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = re.search(r"^READY .*http=(\S+)", line)
            if found:
                yield f"http://{found[1]}"
                return
        sys.exit("the server did not start")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def load(url: str, num_clients: int) -> Iterator[None]:
    """Clients that ask for stories, one after the other, of lengths that differ."""
    end = threading.Event()

    def ask_on(client: int) -> None:
        end.wait(0.7 * client)  # they do not all come at once
        for i in itertools.count(client):
            if end.is_set():
                return
            topic = TOPICS[i % len(TOPICS)]
            text = f"Write a story about {topic}, part {i}. " + f"It mentions {topic}. " * (i % 7)
            ask(url, text, 24 + 29 * i % 160)
            end.wait(0.3 * (i % 5))

    threads = [threading.Thread(target=ask_on, args=[i]) for i in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def ask(url: str, text: str, max_tokens: int) -> None:
    """One answer, of which nothing is kept."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "model": model_name(url),
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        url + "v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request) as response:
        response.read()


def model_name(url: str) -> str:
    """What the server serves."""
    with urllib.request.urlopen(url + "v1/models") as response:
        return json.load(response)["data"][0]["id"]


@contextlib.contextmanager
def chatted(
    browser: Browser, url: str, scheme: Literal["light", "dark"], size: ViewportSize, seconds: float
) -> Iterator[Page]:
    """The page after a chat, and after it has watched the engine for some seconds."""
    scale = 1.5 if size == PHONE else 1
    context = browser.new_context(
        viewport=size, device_scale_factor=scale, color_scheme=scheme, has_touch=size == PHONE
    )
    context.set_default_timeout(180_000)
    page = context.new_page()
    page.goto(url)
    page.locator("#state[data-state=ready]").wait_for()
    for field, value in (("seed", "7"), ("max_tokens", "120"), ("temperature", "0.8")):
        page.eval_on_selector(f"#{field}", "(e, v) => (e.value = v)", value)
    page.wait_for_timeout(seconds * 1000)
    for i, question in enumerate(QUESTIONS, 1):
        page.fill("#prompt", question)
        page.press("#prompt", "Enter")
        page.locator(".message.model:not(.streaming)").nth(i - 1).wait_for()
    page.wait_for_timeout(1200)
    yield page
    context.close()


def save(page: Page, path: Path) -> None:
    """Write what is on the screen."""
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


def save_beside(page: Page, shots: list[bytes], path: Path) -> None:
    """Write pictures side by side as one."""
    urls = [f"data:image/png;base64,{base64.b64encode(shot).decode()}" for shot in shots]
    images = "".join(f'<img width="{PHONE["width"]}" src="{url}">' for url in urls)
    width = len(shots) * PHONE["width"] + (len(shots) - 1) * 16
    page.goto("about:blank")
    page.set_viewport_size({**PHONE, "width": width})
    page.set_content(f"<body style='margin:0;display:flex;gap:16px;background:#fff'>{images}")
    save(page, path)


def hover_a_doubtful_token(page: Page) -> None:
    """Show the alternatives of an unlikely token early in the answer, if there is one."""
    answer = page.locator(".message.model").last
    doubtful = answer.locator(".tint-0, .tint-1, .tint-2")
    tokens = doubtful if doubtful.count() else answer.locator(".token")
    if tokens.count():
        tokens.nth(min(2, tokens.count() - 1)).hover()


if __name__ == "__main__":
    main()
