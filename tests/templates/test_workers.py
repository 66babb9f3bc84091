"""A template that overruns its budget is an error of its request, and of nothing else."""

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.limits import RequestLimits
from jaxserve.server.prompts import chat_prompt
from jaxserve.templates import workers
from jaxserve.templates.workers import rendered, template_variables
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

FOREVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
OVERRUNS = "takes more than its"


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "CPU_SECONDS", 0.05)
    monkeypatch.setattr(workers, "MEMORY_MIB", 256)
    pool = workers._Pool()
    monkeypatch.setattr(workers, "_pool", pool)
    workers._variables.cache_clear()
    yield
    pool.close()
    workers._variables.cache_clear()


def render(source: str, **variables: Any) -> str:
    return rendered(source, variables, 10**6)


@pytest.mark.parametrize(
    "source",
    [
        FOREVER,
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x | length }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "{{ 'a'.ljust(2000000000) | length }}",
        "{{ x.center(2000000000) | length }}",
        "{{ x | center(2000000000) | length }}",
        "{{ 'a' | center(2000000000) | length }}",  # worked out when it is compiled
        "{{ '%2000000000d' % 1 }}",
        "{{ '{:>2000000000}'.format(x) }}",
        "{{ ['a'] | tojson(indent=2000000000) }}",
        "{{ 'a\nb' | indent(2000000000) }}",
        "{{ x | replace('', 'a' * 10000) | replace('a', 'b' * 100000) | length }}",
    ],
)
def test_overruns(small_budget, source: str) -> None:
    with pytest.raises(InvalidRequest, match=OVERRUNS):
        template_variables(source)
        render(source, x="hi")
    assert render("{{ x }}", x=1) == "1"  # another process, if need be


def test_what_is_only_an_error(small_budget) -> None:
    with pytest.raises(InvalidRequest, match="recursion"):
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    with pytest.raises(InvalidRequest, match=r"broken: .*recursion"):
        template_variables("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}")
    with pytest.raises(InvalidRequest, match="JSON has not"):
        render("{{ x }}", x=object())


def test_texts_come_back_as_they_were() -> None:
    text = "h\u00e9 \ud83d\ude00 \U0001f600 \ue000 \x00\n</s>"
    assert render("{{ x }}", x=text) == text
    assert render("{{ x | length }}", x="\u6f22" * 10**6) == str(10**6)
    assert template_variables("{{ x }}{% set y = z %}") == {"x", "z"}


def test_a_broken_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="broken"):
        template_variables("{% if once %}")
    monkeypatch.setattr(workers, "_pool", None)
    with pytest.raises(InvalidRequest, match="broken"):
        template_variables("{% if once %}")


def test_a_process_that_somebody_ends_is_replaced(small_budget) -> None:
    assert render("{{ 1 }}") == "1"
    [worker] = workers._pool._idle
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert render("{{ 1 }}") == "1"


def test_several_threads_at_once() -> None:
    found: list[str] = []

    def many() -> None:
        found.extend(render("{{ x }}", x=i) for i in range(20))

    threads = [threading.Thread(target=many) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(str(i) for i in range(20) for _ in range(6))
    assert len(workers._pool._idle) <= workers._MAX_WORKERS


def test_the_event_loop_goes_on_meanwhile(small_budget) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.settings = dataclasses.replace(tokenizer.settings, chat_template=FOREVER)

    async def main() -> None:
        message = [{"role": "user", "content": "hi"}]
        chat = asyncio.ensure_future(chat_prompt(message, tokenizer, RequestLimits()))
        num_turns = 0
        while not chat.done():
            num_turns += 1
            await asyncio.sleep(0.001)
        assert num_turns > 1
        with pytest.raises(InvalidRequest, match=OVERRUNS):
            await chat

    asyncio.run(main())
