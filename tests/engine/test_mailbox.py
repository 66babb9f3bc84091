"""Deltas wait, and are joined."""

import asyncio
import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import EngineDead
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.engine.mailbox import Mailbox
from jaxserve.engine.outputs import TokenDelta


def deltas(count: int) -> list[TokenDelta]:
    """What a request of so many steps says."""
    made = [
        TokenDelta(
            request_id="r", text=chr(97 + i % 26), token_ids=(i,), finish_reason=None,
            num_prompt_tokens=3, num_output_tokens=i + 1, num_cached_tokens=0,
            logprobs=(TokenLogprobs(i, -1.0, 1),),
        )
        for i in range(count)
    ]  # fmt: skip
    made[0] = dataclasses.replace(made[0], prompt_logprobs=(TokenLogprobs(9, -2.0, 1),))
    made[-1] = dataclasses.replace(made[-1], finish_reason=FinishReason.STOP, stop_reason="x")
    return made


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.booleans())
def test_nothing_is_lost_or_changes_places(bursts: list[int], fails: bool) -> None:
    sent = deltas(sum(bursts))

    async def main() -> None:
        mailbox, rest, got = Mailbox(), iter(sent), []
        for burst in bursts:
            for delta in itertools.islice(rest, burst):
                mailbox.put(delta)
            if burst == bursts[-1] and fails and len(got) == len(bursts) - 1:
                mailbox.put(EngineDead("gone"))
            got.append(await mailbox.get())
        assert [t for d in got for t in d.token_ids] == [t for d in sent for t in d.token_ids]
        assert [p for d in got for p in d.logprobs] == [p for d in sent for p in d.logprobs]
        assert "".join(d.text for d in got) == "".join(d.text for d in sent)
        assert got[0].prompt_logprobs == sent[0].prompt_logprobs
        assert all(d.prompt_logprobs is None for d in got[1:])
        assert [d.num_output_tokens for d in got] == list(itertools.accumulate(bursts))
        assert got[-1].finish_reason is FinishReason.STOP and got[-1].stop_reason == "x"
        if fails:
            assert isinstance(await mailbox.get(), EngineDead)

    asyncio.run(main())


def test_a_reader_that_waits_is_woken() -> None:
    async def main() -> None:
        mailbox = Mailbox()
        reading = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        (delta,) = deltas(1)
        mailbox.put(delta)
        assert await reading is delta

    asyncio.run(main())


def test_a_reader_that_gives_up_leaves_what_came() -> None:
    async def main() -> None:
        mailbox = Mailbox()
        reading = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        (delta,) = deltas(1)
        mailbox.put(delta)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        mailbox.put(EngineDead("gone"))
        assert await mailbox.get() is delta
        assert isinstance(await mailbox.get(), EngineDead)

    asyncio.run(main())
