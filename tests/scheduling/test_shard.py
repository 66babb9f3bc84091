"""What a shard leaves to its running requests, counted for all at once and one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cache.page_pool import PagePool
from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.scheduling.page_traffic import PageTraffic
from jaxserve.scheduling.request_pages import RequestPages
from jaxserve.scheduling.shard import Shard

PAGE_SIZE = 7


@st.composite
def running(draw: st.DrawFn) -> Request:
    """A request somewhere between its first token and its last, with pages for some or all."""
    prompt_len, max_tokens = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    most_pages = -(-(prompt_len + max_tokens - 1) // PAGE_SIZE)
    return Request(
        request_id="r",
        prompt_token_ids=[1] * prompt_len,
        params=SamplingParams(),
        max_tokens=max_tokens,
        output_token_ids=[1] * draw(st.integers(0, max_tokens)),
        page_ids=tuple(range(draw(st.integers(0, most_pages)))),
        predicted_len=draw(st.none() | st.floats(1, 50)),
    )


@pytest.mark.parametrize("admission", ["current", "predicted", "max"])
@settings(max_examples=300)
@given(requests=st.lists(running(), max_size=4))
def test_what_is_owed_to_all_is_what_is_owed_to_each(admission: str, requests: list[Request]):
    pages = RequestPages(0, PagePool(1), PAGE_SIZE, PageTraffic(None), prefix_cache=False)
    shard = Shard(0, pages, range(4), PAGE_SIZE, admission, probe_every=0)
    shard.running = requests
    owed = shard.pool.num_available - shard.spare_pages
    assert owed == sum(map(shard.pages_owed, requests))
