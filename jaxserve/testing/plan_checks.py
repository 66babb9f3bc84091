"""Contradictions in step plans, which a device would compute nonsense from without a word."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from jaxserve.core.step import PageFetch, StepPlan, StepRow

Page = tuple[int, int]  # shard, page


def check_plan(plan: StepPlan, page_size: int, fetching: Collection[Page]) -> None:
    """Verify what can be seen of a plan without knowing what the pages hold.

    Rows may share pages that they only read. One row may write a page that others read in the
    same step, since all rows write before any reads; but then it must fill it, or they would
    share a page that somebody is going to write again.

    Args:
        plan: to be launched next.
        page_size: tokens per page.
        fetching: pages that fetches of earlier plans are going to fill.

    Raises:
        ValueError: the plan contradicts itself; the message says where.
    """
    if not (plan.rows or plan.saves or plan.copies or plan.fetches):
        raise ValueError("a plan without rows or page movements")
    _unique("two rows have the same key", (row.key for row in plan.rows))
    _unique("two rows have the same slot", (row.slot for row in plan.rows))
    for row in plan.rows:
        unknown = row.num_tokens - len(row.token_ids)
        if row.num_tokens < 1 or unknown not in (0, 1):
            raise ValueError(f"{len(row.token_ids)} token ids for {row.num_tokens} tokens")
        if len(row.page_ids) != -(-row.end // page_size):
            raise ValueError(f"{len(row.page_ids)} pages for {row.end} tokens")
        _unique("a row has a page twice", row.page_ids)
    _check_sharing(plan, page_size)
    _check_movements(plan, page_size)
    _check_fetching(plan, fetching)


def fetch_pages(fetch: PageFetch) -> set[Page]:
    """The pages that a fetch fills."""
    return {(fetch.shard, page) for page in fetch.pages}


def _unique(problem: str, values: Iterable[Any]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"{problem}: {value}")


def _row_pages(row: StepRow) -> list[Page]:
    return [(row.shard, page) for page in row.page_ids]


def _check_sharing(plan: StepPlan, page_size: int) -> None:
    written: dict[Page, tuple[StepRow, int]] = {}  # by whom, and which of its pages it is
    for row in plan.rows:
        for index, page in enumerate(_row_pages(row)):
            if index < row.start // page_size:
                continue
            if page in written:
                raise ValueError(f"two rows write page {page}")
            written[page] = row, index
    for row in plan.rows:
        for index, page in enumerate(_row_pages(row)):
            writer, its_index = written.get(page, (row, index))
            if writer is row:
                continue
            if index != its_index:
                raise ValueError(f"page {page} is number {index} of one row and {its_index} of one")
            if writer.end < (index + 1) * page_size:
                raise ValueError(f"a row reads page {page}, which another one writes but not fills")


def _check_movements(plan: StepPlan, page_size: int) -> None:
    _unique("two saves have the same key", (save.key for save in plan.saves))
    targets = [(copy.shard, copy.target) for copy in plan.copies]
    _unique("two copies have the same target", targets)
    for copy in plan.copies:
        if (copy.shard, copy.source) in targets:
            raise ValueError(f"page {copy.source} is the source of a copy and a target")
    written = {page for row in plan.rows for page in _row_pages(row)[row.start // page_size :]}
    for row in plan.rows:
        for page in _row_pages(row)[: row.start // page_size]:
            if page in targets and page not in written:  # copies are made to be written on
                raise ValueError(f"a row only reads page {page}, a copy's target")
    for fetch in plan.fetches:
        if not fetch.pages or len(fetch.pages) != len(fetch.keys):
            raise ValueError(f"a fetch of {len(fetch.pages)} pages from {len(fetch.keys)} keys")


def _check_fetching(plan: StepPlan, fetching: Collection[Page]) -> None:
    """Pages that a fetch fills are used by nothing else until it is done."""
    new = [(fetch.shard, page) for fetch in plan.fetches for page in fetch.pages]
    _unique("two fetches fill the same page", (*new, *fetching))
    for row in plan.rows:
        _refuse("row", _row_pages(row), {*new, *fetching})
    for copy in plan.copies:
        _refuse("copy's target", [(copy.shard, copy.target)], {*new, *fetching})
        # What a new fetch will overwrite may be copied or saved first.
        _refuse("copy's source", [(copy.shard, copy.source)], fetching)
    for save in plan.saves:
        _refuse("save", [(save.shard, save.page)], fetching)


def _refuse(what: str, pages: Iterable[Page], fetching: Collection[Page]) -> None:
    for page in pages:
        if page in fetching:
            raise ValueError(f"page {page} of a {what} is being fetched")
