"""Where one request's deltas wait for their reader."""

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence

from jaxserve.core.errors import JaxserveError
from jaxserve.engine.outputs import TokenDelta

Item = TokenDelta | JaxserveError


class Mailbox:
    """A queue of deltas with one reader, who gets all that wait as one: slow readers catch up.

    An `asyncio.Queue` would do, at twice the time per token. It belongs to one event loop.
    """

    __slots__ = ("_items", "_reader")

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """Leave a delta, or what the request failed with, which must be the last."""
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Item:
        """Wait until there is something; deltas come before the error that follows them."""
        if not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        items, self._items = self._items, []
        if len(items) == 1:
            return items[0]
        deltas = [item for item in items if isinstance(item, TokenDelta)]
        if len(deltas) < len(items):
            self._items = items[len(deltas) :]
            if not deltas:
                return self._items.pop()
        return joined(deltas)


def joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Deltas of one request that follow each other, as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return dataclasses.replace(
        last,
        text="".join([delta.text for delta in deltas]),
        token_ids=tuple(itertools.chain.from_iterable([delta.token_ids for delta in deltas])),
        logprobs=tuple(itertools.chain.from_iterable([delta.logprobs for delta in deltas])),
        prompt_logprobs=deltas[0].prompt_logprobs,  # which come with the first or not at all
    )
