"""One int32 array per step: everything the device must be told, in one transfer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepRow
from jaxserve.runner.buckets import Buckets, pick
from pallas_kernels.paged_batch import PagedBatch

SAMPLING_FIELDS = 7
_SETTINGS = ("temperature", "top_p", "min_p", "top_k")  # the last of the sampling fields
_SETTINGS_OF = attrgetter(*_SETTINGS)
_LEAST_TOP_P = 1e-20  # any token's probability; the sampler would keep none to reach 0
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
        starts: where each row's tokens begin among its shard's; int64 [rows], in that order.
    """

    array: np.ndarray
    num_tokens: int
    num_sampled: int
    places: list[tuple[int, int]]
    starts: np.ndarray


def packed_length(num_tokens: int, num_rows: int, max_pages: int) -> int:
    """Length of one shard's part of the packed array."""
    return num_tokens + num_rows * (3 + max_pages + SAMPLING_FIELDS)


class Packer:
    """Lays out plans for the device, one after the other.

    Whole columns of a plan are turned into arrays at once: this is on the host's path in every
    step, and row by row it takes four times as long.

    Args:
        buckets: the shapes of a shard's part of a step.
        num_shards: data shards.

    Attributes:
        buckets: those that steps are padded to, of the same limits; may be set between steps.
    """

    def __init__(self, buckets: Buckets, num_shards: int) -> None:
        self.buckets = buckets
        self._num_shards = num_shards
        slots, width = num_shards * buckets.max_rows, buckets.max_pages
        self._pages = _SlotTable(slots, width, lambda page_ids: _padded(page_ids, width))
        self._settings = _SlotTable(slots, len(_SETTINGS), _read_settings)

    def pack(self, plan: StepPlan) -> PackedStep:
        """Lay out a plan: per shard, rows that sample first, decode rows by context length.

        Neighbours of like length make the decode loop's groups cheap, and the sampler then works
        on a prefix of the rows.
        """
        buckets, num_shards = self.buckets, self._num_shards
        columns = _Columns.of_plan(plan)
        per_shard = np.bincount(columns.shard, columns.num_tokens, num_shards)
        tokens = pick(buckets.tokens, int(per_shard.max()))
        sampled = int(np.bincount(columns.shard[columns.samples], minlength=num_shards).max())
        num_rows = buckets.rows(tokens)
        array = np.zeros((num_shards, packed_length(tokens, num_rows, buckets.max_pages)), np.int32)
        places, query_start = _arrange(columns, num_shards)
        self._fill(array, tokens, num_rows, columns, places, query_start)
        return PackedStep(
            array,
            tokens,
            pick(buckets.sampled, sampled) if sampled else 0,
            list(zip(columns.shard.tolist(), places.tolist(), strict=True)),
            query_start,
        )

    def _fill(
        self,
        array: np.ndarray,
        num_tokens: int,
        num_rows: int,
        columns: "_Columns",
        places: np.ndarray,
        query_start: np.ndarray,
    ) -> None:
        """Write every row to its place; see `_sections` for where what begins."""
        max_rows, max_pages = self.buckets.max_rows, self.buckets.max_pages
        sections = list(_sections(num_tokens, num_rows, max_pages))
        token_ids, rows, _, _, _, sampling = (section.start for section in sections)
        page_table = array[:, sections[4]].reshape(-1, num_rows, max_pages)
        array[:, sampling : sampling + num_rows] = NO_SLOT
        shard, flat = columns.shard, array.reshape(-1)
        offset = shard * array.shape[1]
        # Slots are numbered through all shards; a shard's last-token map holds its own.
        slot = columns.slot - shard * max_rows

        tokens_at = offset + token_ids + query_start
        _scatter(flat, tokens_at, columns.token_ids, columns.num_known)
        pending = columns.num_known < columns.num_tokens
        flat[(tokens_at + columns.num_known)[pending]] = -1 - slot[pending]
        rows_at = offset + rows + places
        for field, values in enumerate((query_start, columns.num_tokens, columns.end)):
            flat[rows_at + field * num_rows] = values
        page_table[shard, places] = self._pages.of(columns.slot, columns.page_ids)

        mask = columns.samples
        settings = np.empty((SAMPLING_FIELDS, int(np.count_nonzero(mask))), np.int32)
        settings[0], settings[1] = slot[mask], columns.end[mask]
        settings[2] = columns.seed[mask].astype(np.uint32).view(np.int32)
        settings[3:] = self._settings.of(columns.slot, columns.params)[mask].T
        fields_at = np.arange(SAMPLING_FIELDS)[:, None] * num_rows
        flat[(offset + sampling + places)[mask] + fields_at] = settings


class _SlotTable:
    """A row of int32 for every slot, as read from what the slot's request brings in every step.

    That is immutable and seldom another: one page more in as many steps as a page has tokens,
    other sampling parameters with another request. The very same object says what it said before,
    and is not read again: to read all of them in every step takes as long as half of the rest.

    Args:
        num_slots: over all shards.
        width: numbers of a row.
        read: makes int32 [objects, width] from immutable objects.
    """

    def __init__(self, num_slots: int, width: int, read: Callable[[list[Any]], np.ndarray]) -> None:
        self._rows = np.zeros((num_slots, width), np.int32)
        self._objects: list[object] = [None] * num_slots
        self._read = read

    def of(self, slots: np.ndarray, objects: Sequence[Any]) -> np.ndarray:
        """The rows of some slots, int32 [slots, width], that bring these objects."""
        held = self._objects
        pairs = zip(slots.tolist(), objects, strict=True)
        changed = [(slot, brought) for slot, brought in pairs if held[slot] is not brought]
        if changed:
            for slot, brought in changed:
                held[slot] = brought
            at, news = zip(*changed, strict=True)
            self._rows[list(at)] = self._read(list(news))
        return self._rows[slots]


class _Columns(NamedTuple):
    """The rows of a plan, field by field, in the plan's order: arrays of int64 [rows].

    `samples` is bool. `num_known` is less than `num_tokens` where the last token is only on the
    device.
    """

    slot: np.ndarray
    shard: np.ndarray
    end: np.ndarray
    num_tokens: np.ndarray
    seed: np.ndarray
    samples: np.ndarray
    num_known: np.ndarray
    token_ids: tuple[Sequence[int], ...]
    page_ids: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]

    @classmethod
    def of_plan(cls, plan: StepPlan) -> "_Columns":
        count = len(plan.rows)
        fields = zip(*plan.rows, strict=True) if count else ((),) * len(StepRow._fields)
        _, slot, shard, start, num_tokens, token_ids, page_ids, samples, params, seed, *_ = fields
        numbers = chain(slot, shard, start, num_tokens, seed, samples, map(len, token_ids))
        slots, shards, starts, nums, seeds, sampling, known = np.fromiter(
            numbers, np.int64, 7 * count
        ).reshape(7, count)
        return cls(
            slots, shards, starts + nums, nums, seeds, sampling.astype(bool), known, token_ids,
            page_ids, params,
        )  # fmt: skip


def _arrange(columns: _Columns, num_shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's index among its shard's rows, and its first token's; int64 [rows], plan order."""
    rank = (columns.shard * 2 + ~columns.samples) * 2 + (columns.num_tokens > 1)
    order = np.argsort((rank << 32) + columns.end, kind="stable")
    count = len(order)
    per_shard = np.bincount(columns.shard, minlength=num_shards)
    places, starts = np.empty(count, np.int64), np.empty(count, np.int64)
    ordered, shard = columns.num_tokens[order], columns.shard[order]
    first = np.cumsum(per_shard) - per_shard  # of each shard, among all rows
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(ordered)])
    places[order] = np.arange(count) - first[shard]
    starts[order] = before[:-1] - before[first][shard]
    return places, starts


def _read_settings(params: list[SamplingParams]) -> np.ndarray:
    """The fields of `_SETTINGS`, int32 [params, 4]: the bits of three float32, and top_k."""
    values = np.array([_SETTINGS_OF(each) for each in params])  # a float64 holds every top_k
    settings = np.empty(values.shape, np.int32)
    values[:, 1] = np.maximum(values[:, 1], _LEAST_TOP_P)
    settings.view(np.float32)[:, :3] = values[:, :3]
    settings[:, 3] = np.maximum(values[:, 3], 0)
    return settings


def _padded(lists: list[Sequence[int]], width: int) -> np.ndarray:
    """Lists of numbers with zeros after them, int32 [lists, width]."""
    rows = np.zeros((len(lists), width), np.int32)
    lens = np.fromiter(map(len, lists), np.int64, len(lists))
    _scatter(rows.reshape(-1), np.arange(len(lists)) * width, lists, lens)
    return rows


def _scatter(
    flat: np.ndarray, starts: np.ndarray, lists: Sequence[Sequence[int]], lens: np.ndarray
) -> None:
    """Write each list of numbers into `flat` from its start on."""
    total = int(lens.sum())
    if not total:  # all rows decode, and their tokens are on the device
        return
    values = np.fromiter(chain.from_iterable(lists), np.int32, total)
    flat[np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(total)] = values


def _sections(num_tokens: int, num_rows: int, max_pages: int) -> Iterator[slice]:
    """token_ids, query_start, query_len, context_len, page_table, sampling."""
    start = 0
    for size in (num_tokens, *[num_rows] * 3, num_rows * max_pages, num_rows * SAMPLING_FIELDS):
        yield slice(start, start + size)
        start += size


def unpack(packed: jax.Array, num_tokens: int, num_rows: int, max_pages: int) -> UnpackedStep:
    """The device's side of `Packer.pack`."""
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
