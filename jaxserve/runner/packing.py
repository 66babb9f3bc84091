"""One int32 array per step: everything the device must be told, in one transfer."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.step import StepPlan, StepRow
from jaxserve.runner.buckets import Buckets, pick
from pallas_kernels.paged_batch import PagedBatch

SAMPLING_FIELDS = 7
NO_SLOT = np.iinfo(np.int32).max  # out of range: the device drops what is written there


class SamplingRows(NamedTuple):
    """How each row is sampled; the rows that sample come first.

    Attributes:
        slot: int32, where the sampled token is kept; out of range for rows that do not sample.
        position: int32, of the token to be sampled.
        seed: uint32.
        temperature, top_p, min_p: float32.
        top_k: int32, 0 for all.
    """

    slot: jax.Array
    position: jax.Array
    seed: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array


class UnpackedStep(NamedTuple):
    """A step's inputs as the program sees them; leading axis: data shards, then the name's.

    Attributes:
        token_ids: int32 [shards, tokens]; -1 - slot stands for that slot's last token.
        batch: the rows, every field [shards, rows, ...].
        sampling: int32 [shards, SAMPLING_FIELDS, rows], still packed.
    """

    token_ids: jax.Array
    batch: PagedBatch
    sampling: jax.Array


class PackedStep(NamedTuple):
    """A plan laid out for the device.

    Attributes:
        array: int32 [shards, length].
        num_tokens: the token bucket, per shard.
        num_sampled: the sampler's bucket per shard; 0 if no row samples.
        places: (shard, index among the shard's rows) of every row of the plan, in its order.
    """

    array: np.ndarray
    num_tokens: int
    num_sampled: int
    places: list[tuple[int, int]]


def packed_length(num_tokens: int, num_rows: int, max_pages: int) -> int:
    """Length of one shard's part of the packed array."""
    return num_tokens + num_rows * (3 + max_pages + SAMPLING_FIELDS)


def pack(plan: StepPlan, buckets: Buckets, num_shards: int) -> PackedStep:
    """Lay out a plan: per shard, rows that sample first, decode rows by context length.

    Neighbours of like length make the decode loop's groups cheap, and the sampler then works
    on a prefix of the rows.
    """
    shards: list[list[tuple[int, StepRow]]] = [[] for _ in range(num_shards)]
    for index, row in enumerate(plan.rows):
        shards[row.shard].append((index, row))
    tokens = pick(buckets.tokens, max(sum(r.num_tokens for _, r in rows) for rows in shards))
    sampled = max(sum(r.samples for _, r in rows) for rows in shards)
    num_rows = buckets.rows(tokens)
    array = np.zeros((num_shards, packed_length(tokens, num_rows, buckets.max_pages)), np.int32)
    places: list[tuple[int, int]] = [(0, 0)] * len(plan.rows)
    for shard, rows in enumerate(shards):
        rows.sort(key=lambda item: (not item[1].samples, item[1].num_tokens > 1, item[1].end))
        # Slots are numbered through all shards; a shard's last-token map holds its own.
        first_slot = shard * buckets.max_rows
        rows_only = [row for _, row in rows]
        _pack_shard(array[shard], rows_only, tokens, num_rows, buckets.max_pages, first_slot)
        for place, (index, _) in enumerate(rows):
            places[index] = (shard, place)
    return PackedStep(array, tokens, pick(buckets.sampled, sampled) if sampled else 0, places)


def _sections(num_tokens: int, num_rows: int, max_pages: int) -> Iterator[slice]:
    """token_ids, query_start, query_len, context_len, page_table, sampling."""
    start = 0
    for size in (num_tokens, *[num_rows] * 3, num_rows * max_pages, num_rows * SAMPLING_FIELDS):
        yield slice(start, start + size)
        start += size


def _pack_shard(
    out: np.ndarray,
    rows: list[StepRow],
    num_tokens: int,
    num_rows: int,
    max_pages: int,
    first_slot: int,
) -> None:
    token_ids, query_start, query_len, context_len, page_table, sampling = (
        out[section] for section in _sections(num_tokens, num_rows, max_pages)
    )
    page_table = page_table.reshape(num_rows, max_pages)
    sampling = sampling.reshape(SAMPLING_FIELDS, num_rows)
    sampling[0] = NO_SLOT
    floats = sampling.view(np.float32)
    start = 0
    for i, row in enumerate(rows):
        known = len(row.token_ids)
        token_ids[start : start + known] = row.token_ids
        if known < row.num_tokens:
            token_ids[start + known] = -1 - (row.slot - first_slot)
        query_start[i], query_len[i], context_len[i] = start, row.num_tokens, row.end
        page_table[i, : len(row.page_ids)] = row.page_ids
        if row.samples:
            params = row.params
            seed = np.uint32(row.seed).view(np.int32)
            sampling[:3, i] = row.slot - first_slot, row.end, seed
            floats[3:6, i] = params.temperature, params.top_p, params.min_p
            sampling[6, i] = max(params.top_k, 0)
        start += row.num_tokens


def unpack(packed: jax.Array, num_tokens: int, num_rows: int, max_pages: int) -> UnpackedStep:
    """The device's side of `pack`."""
    token_ids, query_start, query_len, context_len, page_table, sampling = (
        packed[:, section] for section in _sections(num_tokens, num_rows, max_pages)
    )
    shards = packed.shape[0]
    return UnpackedStep(
        token_ids,
        PagedBatch(
            query_start, query_len, context_len, page_table.reshape(shards, num_rows, max_pages)
        ),
        sampling.reshape(shards, SAMPLING_FIELDS, num_rows),
    )


def unpack_sampling(sampling: jax.Array) -> SamplingRows:
    """int32 [shards, SAMPLING_FIELDS, rows] -> fields of [shards, rows]."""
    slot, position, seed, *floats, top_k = (sampling[:, i] for i in range(SAMPLING_FIELDS))
    temperature, top_p, min_p = (
        jax.lax.bitcast_convert_type(field, jnp.float32) for field in floats
    )
    seed = jax.lax.bitcast_convert_type(seed, jnp.uint32)
    return SamplingRows(slot, position, seed, temperature, top_p, min_p, top_k)
