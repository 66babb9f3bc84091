"""Samples late steps: rows whose tokens depend on more than their settings.

A late step runs the head, then only what some row asks for: edits of single logits (penalties
and biases), masks, and log-probabilities, which are of the logits as the head made them. Each is
a program of its own, so that no setting compiles anything, nobody pays for what nobody wants,
and together they compile faster than one program with all of it as branches. Edits have no
limit: what does not fit one call goes in another of the same program, as no logit is edited
twice (see `logit_programs.edit_logits`).
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.sampling_params import MAX_LOGPROBS
from jaxserve.models.graph import Params
from jaxserve.runner.buckets import pick
from jaxserve.runner.logit_edits import LateRow, pack_edits, pack_masks
from jaxserve.runner.logit_programs import ALL_TOKENS
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_jobs import late_jobs


class _Programs(NamedTuple):
    """Those of one bucket of rows; see the methods of `StepLowering` that lower them.

    Attributes:
        logits, edit, draw, logprobs: the programs.
        all_tokens: masks on the device that allow everything.
    """

    logits: Compiled
    edit: Compiled
    draw: Compiled
    logprobs: Compiled
    all_tokens: jax.Array


class LateTokens(NamedTuple):
    """What a late step sampled, on the device.

    Attributes:
        last_tokens: int32 [shards, slots], the last-token map with the new tokens in it.
        tokens: int32 [shards, rows].
        logprobs: int32 [shards, rows, LOGPROB_FIELDS] for `unpack_logprobs`; None if no row
            wants any.
    """

    last_tokens: jax.Array
    tokens: jax.Array
    logprobs: jax.Array | None


class LateSampler:
    """The programs that sample late steps, and those that score tokens.

    Args:
        lowering: lowers the programs.
        head: the head's weights by name, on the mesh.
    """

    def __init__(self, lowering: StepLowering, head: Params) -> None:
        self._lowering = lowering
        self._head = dict(head)
        self._shards = lowering.rules.data
        self._vocab_size = lowering.program.graph.config.vocab_size
        self._buckets: tuple[int, ...] = ()  # those whose programs are there
        self._programs: dict[int, _Programs] = {}

    def use(self, programs: Mapping[str, Compiled]) -> None:
        """Take the buckets whose `late_jobs` are all among these programs by name."""
        for n in self._lowering.program.buckets.late:
            names = late_jobs(self._lowering, n)
            if n in self._programs or not programs.keys() >= names.keys():
                continue
            masks = self._lowering.masks(n)
            every = jax.device_put(np.full(masks.shape, ALL_TOKENS), masks.sharding)
            logits, edit, draw, logprobs = (programs[name] for name in names)
            self._programs[n] = _Programs(logits, edit, draw, logprobs, every)
        self._buckets = tuple(sorted(self._programs))

    def warm_up(self, hidden: jax.Array, sampling: jax.Array, last_tokens: jax.Array) -> jax.Array:
        """Run every program once on an empty batch.

        Args:
            hidden, sampling: as a backbone returned them for an empty step.
            last_tokens: the last-token map; a new one comes back.
        """
        for n, programs in self._programs.items():
            masks, edits = self._lowering.masks(n), self._lowering.edits(n)
            every = np.full(masks.shape, ALL_TOKENS)
            logits = programs.logits(self._head, hidden, np.False_)
            logits = programs.edit(logits, np.zeros(edits.shape, np.int32))
            last_tokens, tokens = programs.draw(last_tokens, logits, sampling, every)
            last_tokens, tokens = programs.draw(last_tokens, logits, sampling, programs.all_tokens)
            programs.logprobs(logits, tokens)
        return last_tokens

    def sample(
        self, rows: Sequence[LateRow], hidden: jax.Array, sampling: jax.Array,
        last_tokens: jax.Array,
    ) -> LateTokens:  # fmt: skip
        """Queue the sampling of a step's rows; returns before it has run.

        Args:
            rows: those that sample, at least one; the first of each shard's rows.
            hidden, sampling: as the backbone returned them.
            last_tokens: the last-token map (donated).

        Raises:
            ValueError: a mask or a token that does not fit the vocabulary. Nothing was run.
        """
        bucket = pick(self._buckets, 1 + max(row.place for row in rows))
        programs, lowering = self._programs[bucket], self._lowering
        capacity = lowering.edits(bucket).shape[-1]
        edits = pack_edits(
            rows, num_shards=self._shards, capacity=capacity, vocab_size=self._vocab_size
        )
        masks = pack_masks(rows, lowering.masks(bucket).shape)
        raw = logits = programs.logits(self._head, hidden, np.False_)
        for call in edits:
            logits = programs.edit(logits, call)
        allowed = programs.all_tokens if masks is None else masks
        last_tokens, tokens = programs.draw(last_tokens, logits, sampling, allowed)
        if all(row.params.logprobs is None for row in rows):
            return LateTokens(last_tokens, tokens, None)
        return LateTokens(last_tokens, tokens, programs.logprobs(raw, tokens))

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of tokens after hidden states; see `Executor.score`.

        In pieces of the largest bucket, one after the other: so it takes no more of the
        device's memory than sampling does.

        Raises:
            ValueError: not one hidden state per token, or a token that is not in the vocabulary.
        """
        tokens = np.asarray(token_ids, np.int32)
        shards, max_rows, width = self._lowering.hidden.shape
        if hidden.shape != (len(tokens), width):
            raise ValueError(f"hidden states {hidden.shape} of {len(tokens)} tokens")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(f"not all tokens are in [0, {self._vocab_size})")
        piece = shards * self._buckets[-1]
        scored: list[TokenLogprobs] = []
        for start in range(0, len(tokens), piece):
            part = tokens[start : start + piece]
            bucket = pick(self._buckets, -(-len(part) // shards))
            at = np.divmod(np.arange(len(part)), bucket)  # shard, row
            states = np.zeros((shards, max_rows, width), self._lowering.dtype)
            states[at] = hidden[start : start + piece]
            given = np.zeros((shards, bucket), np.int32)
            given[at] = part
            programs = self._programs[bucket]
            logits = programs.logits(self._head, states, np.True_)
            packed = np.asarray(programs.logprobs(logits, given))[at]
            scored += map(unpack_logprobs, part.tolist(), packed, repeat(num_top))
        return scored


def unpack_logprobs(token_id: int, fields: np.ndarray, num_top: int) -> TokenLogprobs:
    """Read one row of `logit_programs.token_logprobs`.

    Args:
        token_id: the row's token.
        fields: int32 [LOGPROB_FIELDS].
        num_top: how many of the most likely tokens are wanted, at most MAX_LOGPROBS; there are
            no more than the vocabulary has.
    """
    num_top = min(num_top, int(np.count_nonzero(fields[2 : 2 + MAX_LOGPROBS] >= 0)))
    floats = fields.view(np.float32)
    top = 2 + MAX_LOGPROBS
    return TokenLogprobs(
        token_id,
        float(floats[0]),
        int(fields[1]),
        tuple(fields[2 : 2 + num_top].tolist()),
        tuple(floats[top : top + num_top].tolist()),
    )
