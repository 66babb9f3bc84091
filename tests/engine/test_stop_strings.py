"""Stop strings against an oracle that looks at whole texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.stop_strings import StopStrings


def oracle(text: str, stop: list[str]) -> tuple[str, bool]:
    """Grow the text by characters until it has a stop string; cut at the earliest there."""
    for end in range(len(text) + 1):
        found = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if found:
            return text[: min(found)], True
    return text, False


@given(
    st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab\u00e9", max_size=6), max_size=8),
)
def test_any_chunking_gives_the_text_before_the_first_stop(stop: list[str], chunks: list[str]):
    watcher = StopStrings(stop)
    text = "".join(chunks)
    expected, stopped = oracle(text, stop)
    emitted = ""
    for n, chunk in enumerate(chunks):
        emitted += watcher.push(chunk)
        assert expected.startswith(emitted)
        so_far = "".join(chunks[: n + 1])
        if not watcher.stopped:  # held back: exactly the longest tail that begins a stop string
            tails = [so_far[i:] for i in range(len(so_far) + 1)]
            held = next(t for t in tails if not t or any(s.startswith(t) for s in stop))
            assert emitted == so_far.removesuffix(held)
    assert watcher.stopped == stopped
    assert emitted + watcher.flush() == expected


@pytest.mark.parametrize(
    ("stop", "chunks", "emitted"),
    [
        (["</s>"], ["Hello <", "/s", "> x"], ["Hello ", "", ""]),
        (["</s>"], ["a<", "b"], ["a", "<b"]),
        (["aab"], ["aaa", "b"], ["a", ""]),
        (["stop"], ["no sto"], ["no "]),
        ([], ["any", "thing"], ["any", "thing"]),
        # "bc" is complete first, and a generation ends at once: "abcd" never comes to be.
        (["abcd", "bc"], ["xabcd"], ["xa"]),
    ],
)
def test_what_each_push_returns(stop: list[str], chunks: list[str], emitted: list[str]):
    watcher = StopStrings(stop)
    assert [watcher.push(chunk) for chunk in chunks] == emitted


def test_flush_returns_what_was_held_and_only_once():
    watcher = StopStrings(["stop"])
    assert watcher.push("full st") == "full "
    assert watcher.flush() == "st"
    assert watcher.flush() == ""
    assert not watcher.stopped


def test_nothing_comes_after_the_stop():
    watcher = StopStrings(["."])
    assert watcher.push("a.b") == "a"
    assert watcher.stopped
    assert watcher.push("more") == ""
    assert watcher.flush() == ""


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.tuples(st.text("ab", max_size=4), st.booleans()), max_size=8),
    st.booleans(),
)
def test_only_armed_pushes_end_the_text(
    stop: list[str], chunks: list[tuple[str, bool]], keep: bool
):
    """An oracle over whole texts: which stop strings end where the text may end."""
    watcher = StopStrings(stop, keep=keep)
    emitted = "".join(watcher.push(chunk, armed=armed) for chunk, armed in chunks)
    so_far = ""
    for chunk, armed in chunks:
        for char in chunk:
            so_far += char
            ending = [s for s in stop if so_far.endswith(s)]
            if ending and armed:
                longest = max(ending, key=len)
                assert watcher.found == longest
                assert emitted == (so_far if keep else so_far.removesuffix(longest))
                return
    assert watcher.found is None and not watcher.stopped
    assert emitted + watcher.flush() == so_far


def test_a_stop_string_that_is_kept_holds_nothing_back():
    watcher = StopStrings(["stop"], keep=True)
    assert [watcher.push(text) for text in ("a st", "op it")] == ["a st", "op"]
    assert watcher.found == "stop"
