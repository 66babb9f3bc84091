"""The executor on real devices: weights, KV pool and compiled programs, and one launch a step."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.stages import Compiled

from jaxserve.core.step import StepPlan, StepResult
from jaxserve.models.attention import kv_pages_spec
from jaxserve.parallel.mesh import ShardingRules
from jaxserve.runner.packing import PackedStep, pack, packed_length
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.runner.step_program import StepProgram

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # programs ready, programs in all


class LaunchedStep(NamedTuple):
    """A step under way.

    Attributes:
        tokens: int32 [shards, rows], the sampled tokens; None if no row samples.
        places: where each row of the plan finds its token; None if it does not sample.
    """

    tokens: jax.Array | None
    places: list[tuple[int, int] | None]


class DeviceRunner:
    """Runs step plans with ahead-of-time compiled programs; implements `core.step.Executor`.

    Args:
        program: the step's pure functions.
        params: weights by name, on the mesh.
        rules: the mesh and its placements.
        num_pages: pages of the KV pool, over all data shards.
        page_size: tokens per page.
        kv_dtype: type of the KV pool.
    """

    def __init__(
        self,
        program: StepProgram,
        params: Mapping[str, jax.Array],
        rules: ShardingRules,
        *,
        num_pages: int,
        page_size: int,
        kv_dtype: jnp.dtype,
    ) -> None:
        config = program.graph.abstract.config
        self._program = program
        self._params = dict(params)
        self._head = {name: params[name] for name in program.graph.head_names}
        self._rules = rules
        self._split = rules.sharding("data")  # of anything that is one part per shard
        shape = (
            config.num_layers, num_pages, 2, config.num_kv_heads, page_size, config.head_dim,
        )  # fmt: skip
        pool = NamedSharding(rules.mesh, kv_pages_spec(rules))
        self._kv_pages = _zeros(shape, kv_dtype, pool)
        slots = (rules.data, program.buckets.max_rows)
        self._last_tokens = _zeros(slots, jnp.int32, self._split)
        self._backbones: dict[int, Compiled] = {}
        self._samplers: dict[int, Compiled] = {}

    # -- compilation --------------------------------------------------------------------

    def compile(self, cache: ProgramCache, progress: Progress | None = None) -> None:
        """Compile or load every program this runner can ever call, then run each once.

        Args:
            cache: where executables are kept between starts.
            progress: told after each program.
        """
        buckets = self._program.buckets
        jobs = [(f"backbone-{n}", partial(self.lower_backbone, n)) for n in buckets.tokens]
        jobs += [(f"sampler-{n}", partial(self._lower_sampler, n)) for n in buckets.sampled]
        started = time.monotonic()
        with ThreadPoolExecutor(max_workers=2) as threads:  # XLA compiles outside the GIL
            futures = [threads.submit(cache.get, name, lower) for name, lower in jobs]
            programs = []
            for done, future in enumerate(futures, start=1):
                programs.append(future.result())
                if progress is not None:
                    progress(done, len(jobs))
        self._backbones = dict(zip(buckets.tokens, programs, strict=False))
        self._samplers = dict(zip(buckets.sampled, programs[len(buckets.tokens) :], strict=True))
        self._warm_up()
        log.info("%d programs ready in %.1f s", len(jobs), time.monotonic() - started)

    def lower_backbone(self, num_tokens: int) -> jax.stages.Lowered:
        """The backbone for one token bucket, lowered for this runner's mesh."""
        rows = self._program.buckets.rows(num_tokens)
        length = packed_length(num_tokens, rows, self._program.buckets.max_pages)
        packed = self._abstract((self._rules.data, length), jnp.int32)
        out = (self._kv_pages.sharding, self._split, self._split)
        function = partial(self._program.backbone, num_tokens=num_tokens)
        return jax.jit(function, donate_argnums=1, out_shardings=out).lower(
            self._params, self._kv_pages, self._last_tokens, packed
        )

    def _lower_sampler(self, num_sampled: int) -> jax.stages.Lowered:
        shards = self._rules.data
        hidden = self._abstract((shards, *self._program.hidden_shape), self._activation_dtype)
        sampling = self._abstract((shards, *self._program.sampling_shape), jnp.int32)
        function = partial(self._program.sampler, num_sampled=num_sampled)
        return jax.jit(function, donate_argnums=1, out_shardings=(self._split, self._split)).lower(
            self._head, self._last_tokens, hidden, sampling
        )

    def _abstract(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split)

    @property
    def _activation_dtype(self) -> jnp.dtype:
        return self._params["embed"].dtype

    def _warm_up(self) -> None:
        """Run every program once on an empty batch: the first call pays for set-up."""
        buckets = self._program.buckets
        sizes = max(buckets.tokens, buckets.sampled, key=len)
        for i in range(len(sizes)):
            tokens = buckets.tokens[min(i, len(buckets.tokens) - 1)]
            sampled = buckets.sampled[min(i, len(buckets.sampled) - 1)]
            length = packed_length(tokens, buckets.rows(tokens), buckets.max_pages)
            empty = np.zeros((self._rules.data, length), np.int32)
            self._run(PackedStep(empty, tokens, sampled, []))
        jax.block_until_ready(self._last_tokens)

    # -- steps --------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue one step on the devices; returns before it has run."""
        packed = pack(plan, self._program.buckets, self._rules.data)
        places = [
            place if row.samples else None
            for place, row in zip(packed.places, plan.rows, strict=True)
        ]
        return LaunchedStep(self._run(packed), places)

    def _run(self, packed: PackedStep) -> jax.Array | None:
        # The NumPy array goes in as it is: the executable's own transfer costs the host less
        # than a device_put before it.
        self._kv_pages, hidden, sampling = self._backbones[packed.num_tokens](
            self._params, self._kv_pages, self._last_tokens, packed.array
        )
        if not packed.num_sampled:
            return None
        self._last_tokens, tokens = self._samplers[packed.num_sampled](
            self._head, self._last_tokens, hidden, sampling
        )
        return tokens

    def collect(self, handle: LaunchedStep) -> StepResult:
        """Wait for a step's tokens and put them in the order of its plan."""
        token_ids = np.full(len(handle.places), -1, np.int32)
        if handle.tokens is not None:
            tokens = np.asarray(handle.tokens)
            for i, place in enumerate(handle.places):
                if place is not None:
                    token_ids[i] = tokens[place]
        return StepResult(token_ids)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> jax.Array:
    """Zeros made in place on every device, without compiling a program."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only of a sharding that this process has no part in
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        return np.zeros(sizes, dtype)

    return jax.make_array_from_callback(shape, sharding, part)
