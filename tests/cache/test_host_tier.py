"""Host memory's slots: their table against a dumb model, their memory, and impossible sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.host_tier import HostTier
from jaxserve.cache.slot_table import SlotTable
from jaxserve.core.errors import ConfigError

KEYS = [bytes([number]) for number in range(6)]


@given(st.lists(st.tuples(st.sampled_from(["hold", "drop", "touch", "pin", "unpin"]),
                          st.sampled_from(KEYS)), max_size=50))  # fmt: skip
def test_slots_are_never_lost_or_shared(operations: list[tuple[str, bytes]]) -> None:
    table = SlotTable(4)
    used: list[bytes] = []  # held keys, least recently used first
    pinned: set[bytes] = set()
    for operation, key in operations:
        if operation == "hold" and key not in used:
            slot = table.take()
            assert (slot is None) == (len(used) == 4)
            if slot is not None:
                table.check(1, pinned)
                table.hold(slot, key, pinned=key in pinned)
                used.append(key)
        elif operation == "drop" and key in used:
            table.give_back(table.drop(key))
            used.remove(key)
        elif operation == "touch":
            table.touch(key)
            if key in used:
                used.remove(key)
                used.append(key)
        elif operation == "pin":
            table.pin(key)
            pinned.add(key)
        elif operation == "unpin" and key in pinned:
            table.unpin(key)
            pinned.discard(key)
            if key in used:  # released just now
                used.remove(key)
                used.append(key)
        table.check(0, pinned)
        evictable = [key for key in used if key not in pinned]
        assert table.oldest() == (evictable[0] if evictable else None)
        assert table.oldest_first() == evictable
        assert table.oldest_first(2) == evictable[:2]
        assert table.keys()[: len(evictable)] == evictable
        assert set(table.keys()) == set(used)
        assert (table.num_held, table.num_free) == (len(used), 4 - len(used))
        slots = [table.get(key) for key in used]
        assert None not in slots
        assert len(set(slots)) == len(used)
        assert all((key in table) == (key in used) for key in KEYS)


def test_check_finds_a_slot_with_two_owners_and_a_lost_one() -> None:
    table = SlotTable(3)
    slot = table.take()
    assert slot is not None
    with pytest.raises(AssertionError, match="2 slots accounted for, of 3"):
        table.check(0, set())
    table.give_back(slot)
    table.give_back(slot)
    with pytest.raises(AssertionError, match="two owners"):
        table.check(0, set())


def test_slots_do_not_overlap() -> None:
    tier = HostTier(5, 17)
    assert tier.slots.num_slots == 3
    for slot in range(3):
        tier.view(slot)[:] = slot + 1
    assert [tier.view(slot).tolist() for slot in range(3)] == [[1] * 5, [2] * 5, [3] * 5]


def test_no_memory_makes_no_slots() -> None:
    assert HostTier(5, 0).slots.num_slots == 0


@pytest.mark.parametrize(
    ("max_bytes", "message"),
    [(-1, "cannot be negative"), (4, "a page takes 5"), (1 << 60, "give less --host-cache-memory")],
)
def test_impossible_sizes_say_what_to_do(max_bytes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HostTier(5, max_bytes)
