"""Packing a plan for the device and reading it back, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepRow
from jaxserve.runner.buckets import Buckets, doubling_buckets, pick
from jaxserve.runner.packing import Packer, packed_length, unpack, unpack_sampling

PAGE_SIZE = 4
BUCKETS = Buckets.for_limits(max_tokens=23, max_rows=7, max_model_len=53, page_size=PAGE_SIZE)


@st.composite
def plans(draw: st.DrawFn) -> tuple[StepPlan, int]:
    """A plan over one to three data shards, rows of all shards interleaved, and the shards."""
    shards = draw(st.integers(1, 3))
    rows: list[StepRow] = []
    for shard in range(shards):
        budget = BUCKETS.tokens[-1]
        slots = draw(st.permutations(range(BUCKETS.max_rows)))
        for slot in slots[: draw(st.integers(0, BUCKETS.max_rows))]:
            if budget == 0:
                break
            count = draw(st.one_of(st.just(1), st.integers(1, budget)))
            start = draw(st.integers(0, 53 - count))
            pending = draw(st.booleans())
            tokens = st.integers(0, 2**31 - 1)
            rows.append(
                StepRow(
                    key=len(rows), slot=shard * BUCKETS.max_rows + slot, shard=shard,
                    start=start, num_tokens=count,
                    token_ids=tuple(draw(tokens) for _ in range(count - pending)),
                    page_ids=tuple(range(slot, slot - -(start + count) // PAGE_SIZE)),
                    samples=pending or draw(st.booleans()),
                    params=SamplingParams(
                        temperature=draw(st.sampled_from([0.0, 0.3, 1.0])),
                        top_k=draw(st.sampled_from([-1, 0, 5, 2**31 - 1])),
                        top_p=draw(st.sampled_from([1.0, 0.123, 0.0])),
                        min_p=draw(st.sampled_from([0.0, 0.7])),
                    ),
                    seed=draw(st.integers(0, 2**32 - 1)),
                )
            )  # fmt: skip
            budget -= count
    if not rows:
        rows.append(_ROW._replace(num_tokens=1, token_ids=(5,)))
    return StepPlan(tuple(draw(st.permutations(rows)))), shards


_ROW = StepRow(
    key=0, slot=0, shard=0, start=0, num_tokens=1, token_ids=(5,), page_ids=(3,), samples=True,
    params=SamplingParams(), seed=1,
)  # fmt: skip


def read_row(row: StepRow, fields: dict[str, np.ndarray], place: int) -> None:
    """Everything that the device is told of one row."""
    start, local_slot = fields["query_start"][place], row.slot - row.shard * BUCKETS.max_rows
    tokens = fields["token_ids"][start : start + row.num_tokens].tolist()
    assert tokens[: len(row.token_ids)] == list(row.token_ids)
    if len(row.token_ids) < row.num_tokens:
        assert tokens[-1] == -1 - local_slot
    assert fields["query_len"][place] == row.num_tokens
    assert fields["context_len"][place] == row.start + row.num_tokens
    assert fields["page_table"][place][: len(row.page_ids)].tolist() == list(row.page_ids)
    if not row.samples:
        assert fields["slot"][place] >= BUCKETS.max_rows  # out of range: nothing is stored
        return
    assert fields["slot"][place] == local_slot
    assert fields["position"][place] == row.end
    assert fields["seed"][place] == row.seed
    assert fields["top_k"][place] == max(row.params.top_k, 0)
    for name in ("temperature", "top_p", "min_p"):
        value = getattr(row.params, name)
        assert fields[name][place] == np.float32(value) or (name == "top_p" and value == 0)
    assert fields["top_p"][place] > 0  # 0 would keep no token at all


@settings(max_examples=150)
@given(plans())
def test_round_trip(drawn: tuple[StepPlan, int]):
    plan, shards = drawn
    packed = Packer(BUCKETS, shards).pack(plan)
    assert packed.array.dtype == np.int32
    per_shard = [[r for r in plan.rows if r.shard == s] for s in range(shards)]
    most = max(sum(r.num_tokens for r in rows) for rows in per_shard)
    assert packed.num_tokens == min(n for n in BUCKETS.tokens if n >= most)
    sampling = max(sum(r.samples for r in rows) for rows in per_shard)
    fits = [n for n in BUCKETS.sampled if n >= sampling]
    assert packed.num_sampled == (min(fits) if sampling else 0)

    num_rows = BUCKETS.rows(packed.num_tokens)
    assert packed.array.shape == (
        shards,
        packed_length(packed.num_tokens, num_rows, BUCKETS.max_pages),
    )
    step = unpack(jnp.asarray(packed.array), packed.num_tokens, num_rows, BUCKETS.max_pages)
    named = step.batch._asdict() | unpack_sampling(step.sampling)._asdict()
    named["token_ids"] = step.token_ids
    arrays = {name: np.asarray(value) for name, value in named.items()}
    assert len(packed.places) == len(plan.rows) == len(set(packed.places))
    for row, (shard, place) in zip(plan.rows, packed.places, strict=True):
        assert shard == row.shard
        read_row(row, {name: value[shard] for name, value in arrays.items()}, place)

    for shard, rows in enumerate(per_shard):
        lens = arrays["query_len"][shard]
        assert (lens[: len(rows)] > 0).all() and not lens[len(rows) :].any()
        starts = np.cumsum(lens) - lens  # one behind the other, from 0
        assert (arrays["query_start"][shard][: len(rows)] == starts[: len(rows)]).all()
        count = sum(row.samples for row in rows)
        places = {p for r, (s, p) in zip(plan.rows, packed.places, strict=True)
                  if s == shard and r.samples}  # fmt: skip
        assert places == set(range(count)), "rows that sample do not lie first"
        assert (arrays["slot"][shard][count:] >= BUCKETS.max_rows).all()
        ends = arrays["context_len"][shard][:count][lens[:count] == 1]
        assert (np.diff(ends) >= 0).all(), "decode rows not sorted by context length"


@settings(max_examples=60)
@given(
    drawn=st.lists(plans(), min_size=3, max_size=3),
    order=st.lists(st.integers(0, 2), min_size=2, max_size=6),
)
def test_no_step_shows_in_a_later_one(drawn: list[tuple[StepPlan, int]], order: list[int]):
    """Slots bring the same pages and settings again, or those of another request."""
    packer = Packer(BUCKETS, num_shards=3)
    for plan in [drawn[index][0] for index in order]:
        packed, alone = packer.pack(plan), Packer(BUCKETS, num_shards=3).pack(plan)
        assert (packed.array == alone.array).all()


@pytest.mark.parametrize("num_tokens", [1, 6, 7, 23])
def test_a_padded_step_has_no_rows(num_tokens: int):
    num_rows = BUCKETS.rows(num_tokens)
    zeros = np.zeros((2, packed_length(num_tokens, num_rows, BUCKETS.max_pages)), np.int32)
    step = unpack(jnp.asarray(zeros), num_tokens, num_rows, BUCKETS.max_pages)
    assert not np.asarray(step.batch.query_len).any()


def test_too_many_tokens_are_refused():
    row = _ROW._replace(num_tokens=24, token_ids=(1,) * 24, page_ids=tuple(range(6)))
    with pytest.raises(ValueError, match="24 exceeds the largest bucket, 23"):
        Packer(BUCKETS, 1).pack(StepPlan((row,)))


@given(largest=st.integers(1, 5000), data=st.data())
def test_buckets(largest: int, data: st.DataObject):
    sizes = doubling_buckets(largest)
    assert sizes[0] == 1 and sizes[-1] == largest and sorted(set(sizes)) == list(sizes)
    assert pick(sizes, 1) == 1
    size = data.draw(st.integers(1, largest))
    bucket = pick(sizes, size)
    assert size <= bucket < max(2 * size, 9), "more than half of a large step is padding"
    assert len(sizes) <= largest.bit_length() + 1


def test_rows_never_exceed_tokens():
    assert BUCKETS.rows(1) == 1 and BUCKETS.rows(8) == 7
    assert BUCKETS.max_pages == 14  # 53 tokens in pages of 4
