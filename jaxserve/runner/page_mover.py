"""Moves whole KV pages between the device's pool and the page store, beside the steps.

What touches the pool is launched on the engine's thread, in order with the steps: pages to be
saved are gathered into a buffer of their own before anything overwrites them, and pages that were
fetched are put into the pool by `poll`. What takes time runs on threads (`page_transfers`), as in
CachedAttention (Gao et al., ATC 2024): asynchronous saving, fetching overlapped with computation.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from jax.stages import Compiled

from jaxserve.cache.page_store import PageStore
from jaxserve.core.step import FetchDone, PageCopy, PageSave, StepPlan
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.page_programs import COPIES
from jaxserve.runner.page_transfers import (
    MAX_SAVING_BYTES,
    Fetcher,
    Piece,
    Saver,
    Staging,
    parts_of_shard,
    piece_size,
    to_host,
)
from jaxserve.runner.step_jobs import Job, page_jobs
from pallas_kernels.kv_pages import KvPool


class PageMover:
    """Runs the page movements of step plans.

    All methods are for the engine's thread.

    Args:
        lowering: the programs and the pool's shapes.
        store: where pages are saved and fetched, closed by `close`; None if there is no tier
            below the device.
        copies: whether plans may have page copies.
        max_saving_bytes: per device; see `MAX_SAVING_BYTES`.
    """

    def __init__(
        self,
        lowering: StepLowering,
        store: PageStore | None,
        *,
        copies: bool,
        max_saving_bytes: int = MAX_SAVING_BYTES,
    ) -> None:
        self._lowering = lowering
        self._shards = lowering.rules.data
        self._store = store
        self._copies = copies
        self._sizes = lowering.page_pieces if store is not None else ()
        self._programs: dict[str, Compiled] = {}
        self._staging = Staging(lowering)
        self._layout = lowering.page_layout
        self._saver = None if store is None else Saver(store, self._layout, max_saving_bytes)
        self._fetcher = None if store is None else Fetcher(store, self._staging, self._sizes)

    # -- programs ---------------------------------------------------------------------------

    def jobs(self) -> dict[str, Job]:
        """What is to be compiled, by name: nothing that no plan can ask for."""
        return page_jobs(self._lowering, stores=self._store is not None, copies=self._copies)

    def use(self, programs: Mapping[str, Compiled], kv_pages: KvPool) -> KvPool:
        """Take the compiled jobs and run each once on nothing, as the first call pays for set-up.

        Args:
            programs: by the names of `jobs`.
            kv_pages: the pool (donated); returned as it was.
        """
        self._programs = {name: programs[name] for name in self.jobs()}
        for n in self._sizes:
            numbers = self._no_pages(n)
            saved = self._programs[f"save-pages-{n}"](kv_pages, numbers)
            for shard in range(self._shards):
                to_host(parts_of_shard(saved, shard), self._layout)
            contents = self._staging.nothing(n)
            kv_pages = self._programs[f"fetch-pages-{n}"](kv_pages, numbers, contents)
        return self._copy([], kv_pages) if self._copies else kv_pages

    # -- the engine's side --------------------------------------------------------------------

    def launch(self, plan: StepPlan, kv_pages: KvPool) -> KvPool:
        """Launch a plan's saves, then its copies, and start its fetches; never waits for any.

        Args:
            plan: its rows are not looked at.
            kv_pages: the pool (donated).

        Returns:
            The pool for the plan's rows.

        Raises:
            ValueError: the runner was not set up for such movements.
        """
        if plan.saves:
            self._save(plan.saves, kv_pages)
        if plan.copies:
            if not self._copies:
                raise ValueError("a plan copies pages, and the runner was built without copies")
            kv_pages = self._copy(plan.copies, kv_pages)
        for fetch in plan.fetches:
            if self._fetcher is None:
                raise ValueError("a plan fetches pages, and there is no page store")
            self._fetcher.start(fetch)
        return kv_pages

    def poll(self, kv_pages: KvPool, *, wait: bool) -> tuple[KvPool, list[FetchDone]]:
        """Put the pages that have arrived into the pool.

        Args:
            kv_pages: the pool (donated).
            wait: block until at least one fetch is done, if any is under way.

        Returns:
            The pool, and the fetches of which nothing more will come.
        """
        done: list[FetchDone] = []
        if self._fetcher is None:
            return kv_pages, done
        while True:
            while (piece := self._fetcher.take()) is not None:
                if piece.contents is None:
                    done.append(FetchDone(piece.fetch.ticket, piece.first))
                else:
                    kv_pages = self._put(piece, piece.contents, kv_pages)
            if done or not wait or not self._fetcher.wait():
                return kv_pages, done

    def close(self) -> None:
        """Finish the saves, give up the fetches, close the store. Idempotent."""
        if self._saver is None or self._fetcher is None or self._store is None:
            return
        self._saver.close()
        self._fetcher.stop()
        # Before the loader's thread can end: it may be waiting in there for a page that was
        # expected, and will not come from a plan that was never launched.
        self._store.close()
        self._fetcher.close()

    # -- launching ------------------------------------------------------------------------------

    def _save(self, saves: Sequence[PageSave], kv_pages: KvPool) -> None:
        if self._saver is None:
            raise ValueError("a plan saves pages, and there is no page store")
        rest: list[list[PageSave]] = [[] for _ in range(self._shards)]
        for save in saves:
            rest[save.shard].append(save)
        while longest := max(map(len, rest)):
            n = piece_size(self._sizes, longest)
            piece, rest = [saves[:n] for saves in rest], [saves[n:] for saves in rest]
            numbers = self._no_pages(n)
            for shard, saves in enumerate(piece):
                numbers[shard, : len(saves)] = [save.page for save in saves]
            keys = [[save.key for save in saves] for saves in piece]
            program = self._programs[f"save-pages-{n}"]
            gather = partial(program, kv_pages, numbers)
            self._saver.save(keys, gather, n * self._lowering.page_bytes)

    def _copy(self, copies: Sequence[PageCopy], kv_pages: KvPool) -> KvPool:
        per_shard: list[list[PageCopy]] = [[] for _ in range(self._shards)]
        for copy in copies:
            per_shard[copy.shard].append(copy)
        for first in range(0, max(map(len, per_shard)) or 1, COPIES):
            moves = np.zeros((self._shards, 2, COPIES), np.int32)
            moves[:, 1] = self._lowering.pages_per_shard
            for shard, its_copies in enumerate(per_shard):
                for i, copy in enumerate(its_copies[first : first + COPIES]):
                    moves[shard, :, i] = copy.source, copy.target
            kv_pages = self._programs["copy-pages"](kv_pages, moves)
        return kv_pages

    def _put(self, piece: Piece, contents: KvPool, kv_pages: KvPool) -> KvPool:
        n = contents.shape[1]
        numbers = self._no_pages(n)
        pages = piece.fetch.pages[piece.first : piece.first + piece.count]
        numbers[piece.fetch.shard, : len(pages)] = pages
        return self._programs[f"fetch-pages-{n}"](kv_pages, numbers, contents)

    def _no_pages(self, n: int) -> np.ndarray:
        """Page numbers out of range, int32 [shards, n]: programs leave these places out."""
        return np.full((self._shards, n), self._lowering.pages_per_shard, np.int32)
