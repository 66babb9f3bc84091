"""The backbone on the devices: its weights, and its compiled programs, which are run in order."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

from jaxserve.models.graph import Params
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_jobs import backbone_jobs, embed_name, finish_name, span_name, whole_name
from pallas_kernels.kv_pages import KvPool


class BackboneOut(NamedTuple):
    """What a run of the backbone leaves.

    Attributes:
        kv_pages: the pool, with the step's keys and values in it.
        rows: [shards, max_rows, hidden], the rows' last hidden states.
        sampling: int32 [shards, SAMPLING_FIELDS, max_rows], how to sample them.
        token_hidden: [shards, tokens, hidden], all tokens' after the final norm.
    """

    kv_pages: KvPool
    rows: jax.Array
    sampling: jax.Array
    token_hidden: jax.Array


class _SpanWeights(NamedTuple):
    """A span's weights by their names in its graph, and where its layers begin in the pool."""

    params: Params
    first_layer: jax.Array
    kind: int


class Backbone:
    """Runs the layers of one step: as one program, or span by span.

    Args:
        lowering: lowers its programs.
        params: weights by name, on the mesh.
    """

    def __init__(self, lowering: StepLowering, params: Params) -> None:
        self._lowering = lowering
        self._is_whole = len(lowering.program.spans) == 1
        self._programs: dict[str, Compiled] = {}
        self._buckets: tuple[int, ...] = ()
        everywhere = lowering.rules.sharding()
        self._first_layers = [
            jax.device_put(np.int32(span.first), everywhere) for span in lowering.program.spans
        ]
        self.hold(params)

    def hold(self, params: Params) -> None:
        """Run with these weights from now on; see `StepLowering.params`."""
        graph, spans = self._lowering.program.graph, self._lowering.program.spans
        self._params = dict(params)
        self._embedding = {"embed": params["embed"]}
        self._final_norm = {name: params[name] for name in graph.final_names}
        self._spans = [
            _SpanWeights(span.own(params), first, kind)
            for span, first, kind in zip(
                spans, self._first_layers, self._lowering.span_kinds, strict=True
            )
        ]

    @property
    def buckets(self) -> tuple[int, ...]:
        """The token buckets whose programs are all there, ascending."""
        return self._buckets

    def use(self, programs: Mapping[str, Compiled]) -> None:
        """Take those of these programs, by name, that are the backbone's."""
        of_bucket = {n: backbone_jobs(self._lowering, n) for n in self._all_buckets}
        mine = {name for jobs in of_bucket.values() for name in jobs}
        self._programs |= {name: one for name, one in programs.items() if name in mine}
        self._buckets = tuple(
            n for n, jobs in of_bucket.items() if jobs.keys() <= self._programs.keys()
        )

    @property
    def _all_buckets(self) -> tuple[int, ...]:
        return self._lowering.program.buckets.tokens

    def run(
        self, bucket: int, kv_pages: KvPool, last_tokens: jax.Array, packed: np.ndarray
    ) -> BackboneOut:
        """Queue one step's layers on the devices; returns before they have run.

        Args:
            bucket: one of `buckets`.
            kv_pages: the pool (donated).
            last_tokens: int32 [shards, slots], the token sampled last in every slot.
            packed: the step; see `packing`.
        """
        programs = self._programs
        if self._is_whole:
            # The NumPy array goes in as it is: the executable's own transfer costs the host less
            # than a device_put before it.
            whole = programs[whole_name(bucket)]
            return BackboneOut(*whole(self._params, kv_pages, last_tokens, packed))
        step = jax.device_put(packed, self._lowering.packed(bucket).sharding)
        hidden: Any = programs[embed_name(bucket)](self._embedding, last_tokens, step)
        for span in self._spans:
            program = programs[span_name(span.kind, bucket)]
            hidden, kv_pages = program(span.params, span.first_layer, hidden, kv_pages, step)
        finish = programs[finish_name(bucket)]
        return BackboneOut(kv_pages, *finish(self._final_norm, hidden, step))
