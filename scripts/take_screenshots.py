"""Take the pictures of the page that the README shows, with a real model and other callers.

Usage: python scripts/take_screenshots.py [--model smollm2-135m | --url http://HOST:PORT]

Starts a server on the model (pulled before: `jaxserve pull smollm2-135m`), lets some clients ask
it things meanwhile, chats on the page and writes light.png, dark.png and phone.png. Needs
playwright and a Chromium.
"""

import argparse
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

from playwright.sync_api import Browser, Page

from jaxserve.testing.browser import find_chromium, launched

QUESTION = "Why is the sky blue? Answer in three sentences."
TOPICS = ("rain", "bread", "the moon", "trains", "a lighthouse", "bees", "chess", "salt", "maps")
WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
SERVER = ("--max-num-seqs", "16", "--num-pages", "384", "--host-cache-memory", "0.25")


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
        shots = (("light", WIDE, 1), ("dark", WIDE, 1), ("phone", PHONE, 1.5))
        for name, viewport, scale in shots:
            seconds = args.warm_seconds if name == "light" else args.warm_seconds / 2
            options = {"viewport": viewport, "device_scale_factor": scale}
            take(browser, url, name, options, args.out / f"{name}.png", seconds)


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


def take(browser: Browser, url: str, name: str, options: dict, path: Path, seconds: float) -> None:
    """Chat on the page and take its picture."""
    scheme = "dark" if name == "dark" else "light"
    context = browser.new_context(**options, color_scheme=scheme)
    context.set_default_timeout(180_000)
    page = context.new_page()
    page.goto(url)
    page.locator("#state[data-state=ready]").wait_for()
    for field, value in (("seed", "7"), ("max_tokens", "120"), ("temperature", "0.8")):
        page.eval_on_selector(f"#{field}", "(e, v) => (e.value = v)", value)
    page.wait_for_timeout(seconds * 1000)
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.locator(".message.model:not(.streaming)").wait_for()
    hover_a_doubtful_token(page)
    page.wait_for_timeout(1200)
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size // 1024} KiB")
    context.close()


def hover_a_doubtful_token(page: Page) -> None:
    """Show the alternatives of an unlikely token early in the answer, if there is one."""
    doubtful = page.locator(".tint-0, .tint-1, .tint-2")
    tokens = doubtful if doubtful.count() else page.locator(".token")
    if tokens.count():
        tokens.nth(min(2, tokens.count() - 1)).hover()


if __name__ == "__main__":
    main()
