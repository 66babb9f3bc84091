"""Keys of pages: equal for equal tokens after equal tokens, and for nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.page_keys import KEY_BYTES, extend_keys, page_key, root_key, token_bytes

tokens = st.lists(st.integers(0, 2), max_size=12)


@given(tokens, st.integers(0, 12), st.integers(1, 4))
def test_a_prompt_is_hashed_page_by_page(tokens: list[int], cut: int, page_size: int) -> None:
    """At once, in two parts, or by hand: the same keys, of the full pages only."""
    at_once: list[bytes] = []
    extend_keys(at_once, root_key(), tokens, page_size)
    assert len(at_once) == len(tokens) // page_size
    in_parts: list[bytes] = []
    extend_keys(in_parts, root_key(), tokens[:cut], page_size)
    extend_keys(in_parts, root_key(), tokens[len(in_parts) * page_size :], page_size)
    parent, by_hand = root_key(), []
    for i in range(len(at_once)):
        parent = page_key(parent, tokens[i * page_size : (i + 1) * page_size])
        by_hand.append(parent)
    assert at_once == in_parts == by_hand


@given(tokens, tokens, st.sampled_from(["", "a"]), st.sampled_from(["", "a"]))
def test_a_key_tells_tokens_parent_and_salt(
    a: list[int], b: list[int], salt_a: str, salt_b: str
) -> None:
    keys_a: list[bytes] = []
    keys_b: list[bytes] = []
    extend_keys(keys_a, root_key(salt_a), a, 2)
    extend_keys(keys_b, root_key(salt_b), b, 2)
    for i, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        end = 2 * (i + 1)
        assert (key_a == key_b) == (salt_a == salt_b and a[:end] == b[:end])
        assert len(key_a) == KEY_BYTES


def test_the_length_of_a_page_is_part_of_its_key() -> None:
    assert len({page_key(root_key(), [0] * n) for n in range(1, 65)}) == 64


def test_keys_are_the_same_on_every_machine_and_in_every_release() -> None:
    """They name pages on disk and in other instances; a change must be meant."""
    assert root_key("tenant").hex() == "fa598602c506f5cbb055be01145ccace"
    assert page_key(root_key(), [1, 2, 49151]).hex() == "09a87b21a7bea8b8cad5992fc0579a29"
    assert token_bytes([1, -1]) == bytes([1, 0, 0, 0, 255, 255, 255, 255])


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_a_token_that_is_no_int32_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="int32"):
        page_key(root_key(), [token])
