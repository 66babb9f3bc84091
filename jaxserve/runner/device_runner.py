"""The executor on real devices: weights, KV pool and compiled programs, and one launch a step."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout
from jax.stages import Compiled

from jaxserve.cache.page_store import PageStore
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.step import FetchDone, SamplingExtras, StepPlan, StepResult, StepRow
from jaxserve.models.graph import Params
from jaxserve.runner.backbone import Backbone
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.late_sampler import LateSampler, unpack_logprobs
from jaxserve.runner.logit_edits import NO_EXTRAS, LateRow
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.packing import Packer
from jaxserve.runner.page_mover import PageMover
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.runner.program_loading import ProgramLoading
from jaxserve.runner.step_jobs import StepJobs, late_jobs, step_jobs
from pallas_kernels.kv_pages import KvPool

Progress = Callable[[int, int], None]  # programs ready, programs in all


@dataclasses.dataclass
class LaunchedStep:
    """A step under way.

    Attributes:
        rows: the plan's.
        places: where each row finds what is the rows': (shard, index among the shard's rows).
        starts: where each row's tokens begin among its shard's.
        tokens: int32 [shards, rows], the sampled tokens; None if no row samples.
        hidden: [shards, rows, hidden], the rows' last hidden states; None if no row is probed.
        token_hidden: [shards, tokens, hidden], all tokens' after the final norm; None if no row
            wants its own.
        logprobs: of the sampled tokens, as `LateTokens` has them; None if no row wants any.
        unsampled: what the backbone left for `sample`: hidden states and settings of the rows;
            None unless the step is late and not sampled yet.
    """

    rows: tuple[StepRow, ...] = ()
    places: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    starts: Sequence[int] = ()
    tokens: jax.Array | None = None
    hidden: jax.Array | None = None
    token_hidden: jax.Array | None = None
    logprobs: jax.Array | None = None
    unsampled: tuple[jax.Array, jax.Array] | None = None


class DeviceRunner:
    """Runs step plans with ahead-of-time compiled programs; implements `core.step.Executor`.

    Args:
        lowering: the step's programs and the shapes of what they keep.
        params: weights by name, on the mesh, as `lowering.params` describes them.
        store: where pages are saved and fetched, of `lowering.page_layout`; closed by `close`.
            None: plans have no saves and fetches.
        prefix_cache: whether plans may have page copies.
    """

    def __init__(
        self,
        lowering: StepLowering,
        params: Params,
        store: PageStore | None = None,
        *,
        prefix_cache: bool = False,
    ) -> None:
        program = lowering.program
        self._lowering = lowering
        self._buckets = program.buckets
        self._packer = Packer(program.buckets, lowering.rules.data)
        self._backbone = Backbone(lowering, params)
        self._head = {name: params[name] for name in program.graph.head_names}
        self._kv_pages: KvPool = jax.tree.map(_zeros, lowering.kv_pages)
        self._last_tokens = _zeros(lowering.last_tokens)
        self._samplers: dict[int, Compiled] = {}
        self._late = LateSampler(lowering, self._head)
        self._unsampled = False  # the step launched last is late and not sampled yet
        self._late_names = {name for n in program.buckets.late for name in late_jobs(lowering, n)}
        self._late_programs: dict[str, Compiled] = {}
        self._mover = PageMover(lowering, store, copies=prefix_cache)
        self._stores, self._copies = store is not None, prefix_cache
        self._loading: ProgramLoading | None = None

    # -- programs -------------------------------------------------------------------------

    def compile(self, cache: ProgramCache) -> None:
        """Compile or load every program this runner can ever call, and warm up."""
        self.use(ProgramLoading(cache, self.jobs()))

    def jobs(self) -> StepJobs:
        """Every program this runner can ever call."""
        return step_jobs(self._lowering, stores=self._stores, copies=self._copies)

    def use(self, loading: ProgramLoading, progress: Progress | None = None) -> None:
        """Take the programs that are needed and warm up; take the others as they come.

        Args:
            loading: of `jobs`; closed by `close`.
            progress: told after each program.
        """
        self._loading = loading
        programs: dict[str, Compiled] = {}
        for name, program in loading.needed():
            programs[name] = program
            if progress is not None:
                progress(len(programs), loading.num_needed)
        self._take(programs)
        self._kv_pages = self._mover.use(programs, self._kv_pages)
        self._warm_up()
        loading.go_on()

    def _take(self, programs: Mapping[str, Compiled]) -> None:
        """Let steps be padded to the buckets of these programs, too."""
        self._backbone.use(programs)
        for name, program in programs.items():
            kind, _, size = name.rpartition("-")
            if kind == "sampler":
                self._samplers[int(size)] = program
        self._late_programs |= {
            name: program for name, program in programs.items() if name in self._late_names
        }
        self._late.use(self._late_programs)
        self._packer.buckets = self.ready_buckets

    @property
    def ready_buckets(self) -> Buckets:
        """The buckets whose programs are there: what steps are padded to."""
        return dataclasses.replace(
            self._buckets,
            tokens=self._backbone.buckets or self._buckets.tokens,
            sampled=tuple(sorted(self._samplers)) or self._buckets.sampled,
        )

    def _warm_up(self) -> None:
        """Run programs once on an empty batch: the first call pays for set-up.

        On a CPU there is none, and large buckets take seconds: there the smallest is enough to
        have all weights in memory.
        """
        is_cpu = self._lowering.rules.mesh.devices.flat[0].platform == "cpu"
        buckets = self.ready_buckets
        for n in buckets.tokens[: 1 if is_cpu else None]:
            empty = np.zeros(self._lowering.packed(n).shape, np.int32)
            hidden, sampling, _ = self._run_backbone(n, empty)
        for n in buckets.sampled:
            self._run_sampler(n, hidden, sampling)
        self._last_tokens = self._late.warm_up(hidden, sampling, self._last_tokens)
        jax.block_until_ready(self._last_tokens)

    # -- steps --------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue one step on the devices; returns before it has run.

        Raises:
            ValueError: the plan moves pages in a way that this runner was not built for, or the
                step before is late and was not sampled.
        """
        if self._unsampled:
            raise ValueError("the step launched last is late, and not sampled yet")
        if self._loading is not None and (more := self._loading.take()):
            self._take(more)
        self._kv_pages = self._mover.launch(plan, self._kv_pages)
        if not plan.rows:
            return LaunchedStep()
        packed = self._packer.pack(plan)
        hidden, sampling, token_hidden = self._run_backbone(packed.num_tokens, packed.array)
        step = LaunchedStep(plan.rows, packed.places, packed.starts.tolist())
        if plan.is_late:
            step.unsampled = hidden, sampling
            self._unsampled = True
        elif packed.num_sampled:
            step.tokens = self._run_sampler(packed.num_sampled, hidden, sampling)
        if any(row.probe for row in plan.rows):
            step.hidden = hidden
            hidden.copy_to_host_async()
        if any(row.wants_hidden for row in plan.rows):
            step.token_hidden = token_hidden
            token_hidden.copy_to_host_async()
        return step

    def _run_backbone(
        self, bucket: int, packed: np.ndarray
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        out = self._backbone.run(bucket, self._kv_pages, self._last_tokens, packed)
        self._kv_pages = out.kv_pages
        return out.rows, out.sampling, out.token_hidden

    def _run_sampler(self, bucket: int, hidden: jax.Array, sampling: jax.Array) -> jax.Array:
        self._last_tokens, tokens = self._samplers[bucket](
            self._head, self._last_tokens, hidden, sampling
        )
        return tokens

    def sample(self, handle: LaunchedStep, extras: Mapping[int, SamplingExtras]) -> None:
        """Sample a launched step whose plan is late; see `Executor.sample`.

        Raises:
            ValueError: it is not late or was sampled already, a row that is not late has
                extras, or they do not fit the vocabulary. Nothing was sampled.
        """
        if handle.unsampled is None:
            raise ValueError("the step is not late, or it was sampled already")
        early = [i for i in extras if not handle.rows[i].late]
        if early:
            raise ValueError(f"rows {early} have extras and are not late")
        rows = [
            LateRow(*place, row.params, extras.get(i, NO_EXTRAS))
            for i, (row, place) in enumerate(zip(handle.rows, handle.places, strict=True))
            if row.samples
        ]
        if rows:
            self._last_tokens, handle.tokens, handle.logprobs = self._late.sample(
                rows, *handle.unsampled, self._last_tokens
            )
        handle.unsampled = None
        self._unsampled = False

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of tokens after hidden states; see `Executor.score`."""
        return self._late.score(hidden, token_ids, num_top)

    def collect(self, handle: LaunchedStep) -> StepResult:
        """Wait for a step's tokens and put them in the order of its plan.

        Raises:
            ValueError: the step is late and was not sampled.
        """
        if handle.unsampled is not None:
            raise ValueError("the step is late, and not sampled yet")
        token_ids = np.full(len(handle.rows), -1, np.int32)
        if handle.tokens is not None:
            tokens = np.asarray(handle.tokens)
            for i, (row, place) in enumerate(zip(handle.rows, handle.places, strict=True)):
                if row.samples:
                    token_ids[i] = tokens[place]
        hidden = None
        if handle.hidden is not None:
            states = np.asarray(handle.hidden)
            probed = zip(handle.rows, handle.places, strict=True)
            hidden = np.array([states[at] for row, at in probed if row.probe], np.float32)
        return StepResult(token_ids, hidden, _logprobs(handle, token_ids), _token_hidden(handle))

    def poll(self, *, wait: bool = False) -> list[FetchDone]:
        """Put the pages that were fetched into the pool; see `Executor.poll`."""
        self._kv_pages, done = self._mover.poll(self._kv_pages, wait=wait)
        return done

    def close(self) -> None:
        """Finish the saves, give up the fetches, close the page store. Idempotent.

        Nothing runs on the devices when it returns, not even steps that nobody has collected.
        """
        if self._loading is not None:
            self._loading.close()
        self._mover.close()
        with contextlib.suppress(Exception):  # what has failed runs no more, either
            jax.block_until_ready((self._kv_pages, self._last_tokens))


def _logprobs(step: LaunchedStep, token_ids: np.ndarray) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the sampled tokens of the rows that want them, by row."""
    if step.logprobs is None:
        return {}
    packed = np.asarray(step.logprobs)
    return {
        i: unpack_logprobs(int(token_ids[i]), packed[place], row.params.logprobs)
        for i, (row, place) in enumerate(zip(step.rows, step.places, strict=True))
        if row.samples and row.params.logprobs is not None
    }


def _token_hidden(step: LaunchedStep) -> dict[int, np.ndarray]:
    """All tokens' hidden states of the rows that want them, by row."""
    if step.token_hidden is None:
        return {}
    states = np.asarray(step.token_hidden)
    return {
        i: states[row.shard, start : start + row.num_tokens].astype(np.float32)
        for i, (row, start) in enumerate(zip(step.rows, step.starts, strict=True))
        if row.wants_hidden
    }


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
