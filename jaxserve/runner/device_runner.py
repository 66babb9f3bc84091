"""The executor on real devices: weights, KV pool and compiled programs, and one launch a step."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout
from jax.stages import Compiled

from jaxserve.cache.page_store import PageStore
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.step import LoadDone, SamplingExtras, StepPlan, StepResult
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.packing import PackedStep, pack
from jaxserve.runner.page_mover import PageMover
from jaxserve.runner.program_cache import ProgramCache

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # programs ready, programs in all


class LaunchedStep(NamedTuple):
    """A step under way.

    Attributes:
        tokens: int32 [shards, rows], the sampled tokens; None if no row samples.
        places: where each row of the plan finds its token; None if it does not sample.
        hidden: [shards, rows, hidden], the rows' last hidden states; None if no row is probed.
        probed: where the probed rows find theirs, in the plan's order.
    """

    tokens: jax.Array | None
    places: list[tuple[int, int] | None]
    hidden: jax.Array | None
    probed: list[tuple[int, int]]


class DeviceRunner:
    """Runs step plans with ahead-of-time compiled programs; implements `core.step.Executor`.

    Args:
        lowering: the step's programs and the shapes of what they keep.
        params: weights by name, on the mesh, as `lowering.params` describes them.
        store: where pages are saved and loaded, with pages of `lowering.page_shape` and
            `lowering.kv_dtype`; closed by `close`. None: plans have no saves and loads.
        prefix_cache: whether plans may have page copies.
    """

    def __init__(
        self,
        lowering: StepLowering,
        params: Mapping[str, jax.Array],
        store: PageStore | None = None,
        *,
        prefix_cache: bool = False,
    ) -> None:
        program = lowering.program
        self._lowering = lowering
        self._buckets = program.buckets
        self._shards = lowering.rules.data
        self._params = dict(params)
        self._head = {name: params[name] for name in program.graph.head_names}
        self._kv_pages = _zeros(lowering.kv_pages)
        self._last_tokens = _zeros(lowering.last_tokens)
        self._backbones: dict[int, Compiled] = {}
        self._samplers: dict[int, Compiled] = {}
        self._mover = PageMover(lowering, store, copies=prefix_cache)

    # -- compilation --------------------------------------------------------------------

    def compile(self, cache: ProgramCache, progress: Progress | None = None) -> None:
        """Compile or load every program this runner can ever call, then run each once.

        Args:
            cache: where executables are kept between starts.
            progress: told after each program.
        """
        buckets, lowering = self._buckets, self._lowering
        jobs = {f"backbone-{n}": partial(lowering.backbone, n) for n in buckets.tokens}
        jobs |= {f"sampler-{n}": partial(lowering.sampler, n) for n in buckets.sampled}
        jobs |= self._mover.jobs()
        started = time.monotonic()
        programs: dict[str, Compiled] = {}
        with ThreadPoolExecutor(max_workers=2) as threads:  # XLA compiles outside the GIL
            futures = {name: threads.submit(cache.get, name, job) for name, job in jobs.items()}
            for done, (name, future) in enumerate(futures.items(), start=1):
                programs[name] = future.result()
                if progress is not None:
                    progress(done, len(jobs))
        self._backbones = {n: programs[f"backbone-{n}"] for n in buckets.tokens}
        self._samplers = {n: programs[f"sampler-{n}"] for n in buckets.sampled}
        self._kv_pages = self._mover.use(programs, self._kv_pages)
        self._warm_up()
        log.info("%d programs ready in %.1f s", len(jobs), time.monotonic() - started)

    def _warm_up(self) -> None:
        """Run every program once on an empty batch: the first call pays for set-up."""
        buckets = self._buckets
        for i in range(max(len(buckets.tokens), len(buckets.sampled))):
            tokens = buckets.tokens[min(i, len(buckets.tokens) - 1)]
            sampled = buckets.sampled[min(i, len(buckets.sampled) - 1)]
            empty = np.zeros(self._lowering.packed(tokens).shape, np.int32)
            self._run(PackedStep(empty, tokens, sampled, []))
        jax.block_until_ready(self._last_tokens)

    # -- steps --------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue one step on the devices; returns before it has run.

        Raises:
            ValueError: the plan moves pages in a way that this runner was not built for.
        """
        self._kv_pages = self._mover.launch(plan, self._kv_pages)
        if not plan.rows:
            return LaunchedStep(None, [], None, [])
        packed = pack(plan, self._buckets, self._shards)
        places = [
            place if row.samples else None
            for place, row in zip(packed.places, plan.rows, strict=True)
        ]
        probed = [place for place, row in zip(packed.places, plan.rows, strict=True) if row.probe]
        tokens, hidden = self._run(packed)
        if not probed:
            return LaunchedStep(tokens, places, None, [])
        hidden.copy_to_host_async()
        return LaunchedStep(tokens, places, hidden, probed)

    def _run(self, packed: PackedStep) -> tuple[jax.Array | None, jax.Array]:
        # The NumPy array goes in as it is: the executable's own transfer costs the host less
        # than a device_put before it.
        self._kv_pages, hidden, sampling = self._backbones[packed.num_tokens](
            self._params, self._kv_pages, self._last_tokens, packed.array
        )
        if not packed.num_sampled:
            return None, hidden
        self._last_tokens, tokens = self._samplers[packed.num_sampled](
            self._head, self._last_tokens, hidden, sampling
        )
        return tokens, hidden

    def sample(self, handle: LaunchedStep, extras: Mapping[int, SamplingExtras]) -> None:
        """Sample a launched step whose plan is late; see `Executor.sample`."""
        raise NotImplementedError

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of tokens after hidden states; see `Executor.score`."""
        raise NotImplementedError

    def collect(self, handle: LaunchedStep) -> StepResult:
        """Wait for a step's tokens and put them in the order of its plan."""
        token_ids = np.full(len(handle.places), -1, np.int32)
        if handle.tokens is not None:
            tokens = np.asarray(handle.tokens)
            for i, place in enumerate(handle.places):
                if place is not None:
                    token_ids[i] = tokens[place]
        if handle.hidden is None:
            return StepResult(token_ids)
        hidden = np.asarray(handle.hidden)
        return StepResult(token_ids, np.array([hidden[at] for at in handle.probed], np.float32))

    def poll(self, *, wait: bool = False) -> list[LoadDone]:
        """Put the pages that were loaded into the pool; see `Executor.poll`."""
        self._kv_pages, done = self._mover.poll(self._kv_pages, wait=wait)
        return done

    def close(self) -> None:
        """Finish the saves, give up the loads, and close the page store. Idempotent."""
        self._mover.close()


def _zeros(wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros made in place on every device, where the layout allows it without a program."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only of a sharding that this process has no part in
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, wanted.shape, strict=True)]
        return np.zeros(sizes, wanted.dtype)

    assert wanted.sharding is not None
    zeros = jax.make_array_from_callback(wanted.shape, wanted.sharding, part)
    layout, made = wanted.format.layout, zeros.format.layout
    assert isinstance(made, Layout)
    if not isinstance(layout, Layout) or layout.major_to_minor == made.major_to_minor:
        return zeros
    zeros.delete()  # there may be no room for both
    return jax.jit(lambda: jnp.zeros(wanted.shape, wanted.dtype), out_shardings=wanted.format)()
