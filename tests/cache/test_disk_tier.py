"""Pages on disk: what a restart finds, and that a damaged file never yields a wrong page."""

import itertools
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.cache import disk_tier
from jaxserve.cache.disk_tier import DiskTier
from jaxserve.core.errors import ConfigError

PAGE_BYTES = 5000  # two blocks, the second not full
STRIDE = 8192
HEADER_BYTES = 64
ROOM = 1 << 20


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def contents_of(key: bytes, version: int = 0) -> np.ndarray:
    seed = int.from_bytes(key, "little") + 1000 * version
    return np.random.default_rng(seed).integers(1, 256, PAGE_BYTES, dtype=np.uint8)


def open_tier(directory: Path, max_bytes: int = ROOM, fingerprint: str = "model") -> DiskTier:
    return DiskTier(directory, PAGE_BYTES, fingerprint, max_bytes)


def save(tier: DiskTier, key: bytes) -> int:
    slot = tier.slots.take()
    assert slot is not None
    tier.write(slot, key, contents_of(key))
    tier.slots.hold(slot, key, pinned=False)
    return slot


def intact_keys(tier: DiskTier) -> list[bytes]:
    """Keys whose pages are read as intact, after comparing each with what it must be."""
    keys, out = [], np.empty(PAGE_BYTES, np.uint8)
    for key in tier.slots.keys():  # noqa: SIM118
        slot = tier.slots.get(key)
        assert slot is not None
        if tier.read(slot, out):
            np.testing.assert_array_equal(out, contents_of(key))
            keys.append(key)
    return keys


def file_of(directory: Path) -> Path:
    (path,) = directory.glob("*.pages")
    return path


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A directory with pages in it, more than share one block of headers, and their keys."""
    keys = [key_of(number) for number in range(70)]
    tier = open_tier(tmp_path)
    for key in keys:
        save(tier, key)
    tier.close()
    return tmp_path, keys


def test_a_restart_finds_all_pages_and_their_order(filled: tuple[Path, list[bytes]]) -> None:
    directory, keys = filled
    tier = open_tier(directory)
    assert tier.slots.keys() == keys  # least recently written first
    assert intact_keys(tier) == keys
    tier.slots.check(0, set())
    save(tier, key_of(99))
    tier.close()
    tier.close()
    tier = open_tier(directory)
    assert intact_keys(tier) == [*keys, key_of(99)]
    tier.close()


def test_the_file_never_exceeds_its_size(tmp_path: Path) -> None:
    for max_bytes in (4096 + STRIDE, 100_000, 64 * STRIDE + 4096, 64 * STRIDE + 4096 + 9000, ROOM):
        tier = open_tier(tmp_path / str(max_bytes), max_bytes)
        wanted = (max_bytes - 4096) // STRIDE
        assert tier.slots.num_slots in (wanted, wanted - 1)  # - 1 for a second block of headers
        for number in range(tier.slots.num_slots):
            save(tier, key_of(number))
        assert file_of(tmp_path / str(max_bytes)).stat().st_size <= max_bytes
        assert len(intact_keys(tier)) == tier.slots.num_slots
        tier.close()


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    open_tier(tmp_path / "kv").close()
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(tmp_path / "kv").stat().st_mode) == 0o600


def test_an_erased_page_is_not_found_again(filled: tuple[Path, list[bytes]]) -> None:
    directory, keys = filled
    tier = open_tier(directory)
    slot = tier.slots.get(keys[3])
    assert slot is not None
    tier.erase(slot)
    tier.close()
    tier = open_tier(directory)
    assert intact_keys(tier) == keys[:3] + keys[4:]
    tier.close()


def test_of_two_pages_with_one_key_the_newer_counts(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for slot in (2, 0, 1):  # given up twice, and the process ended before it erased them
        tier.write(slot, key_of(7), contents_of(key_of(7)))
    tier.close()
    for _ in range(2):
        tier = open_tier(tmp_path)
        assert tier.slots.get(key_of(7)) == 1
        assert tier.slots.num_free == tier.slots.num_slots - 1
        tier.erase(1)
        tier.close()
        tier = open_tier(tmp_path)
        assert tier.slots.num_held == 0  # the older ones are gone for good
        tier.write(1, key_of(7), contents_of(key_of(7)))
        tier.close()


def test_fingerprints_have_files_of_their_own(tmp_path: Path) -> None:
    for fingerprint, number in (("a", 1), ("b", 2)):
        tier = open_tier(tmp_path, fingerprint=fingerprint)
        assert tier.slots.num_held == 0
        save(tier, key_of(number))
        tier.close()
    for fingerprint, number in (("a", 1), ("b", 2)):
        tier = open_tier(tmp_path, fingerprint=fingerprint)
        assert intact_keys(tier) == [key_of(number)]
        tier.close()
    a, b = tmp_path.glob("*.pages")
    b.write_bytes(a.read_bytes())  # somebody mixes them up
    for fingerprint in ("a", "b"):
        tier = open_tier(tmp_path, fingerprint=fingerprint)
        assert tier.slots.num_held <= 1
        found = intact_keys(tier)
        tier.close()
        assert found in ([], [key_of(1 if fingerprint == "a" else 2)])


def test_the_size_may_change_between_starts(filled: tuple[Path, list[bytes]]) -> None:
    directory, keys = filled
    tier = open_tier(directory, 4096 + 20 * STRIDE)
    assert intact_keys(tier) == keys[:20]
    tier.close()
    tier = open_tier(directory, ROOM)
    assert intact_keys(tier) == keys[:20]
    assert tier.slots.num_free == tier.slots.num_slots - 20
    tier.close()


class Killed(BaseException):
    """The process ends here."""


def dies_after(num_bytes: int) -> Callable[[int, memoryview, int], int]:
    """An os.pwrite that writes so many bytes in all, and then the process ends."""
    real, left = os.pwrite, num_bytes

    def write(file: int, data: memoryview, offset: int) -> int:
        nonlocal left
        written = real(file, data[:left], offset) if left else 0
        left -= written
        if written < len(data):
            raise Killed
        return written

    return write


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_write_cut_short_anywhere_leaves_a_page_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    total = HEADER_BYTES + PAGE_BYTES + HEADER_BYTES
    middle = HEADER_BYTES + PAGE_BYTES // 2
    header = range(HEADER_BYTES + PAGE_BYTES, total + 1)
    cuts = [*range(HEADER_BYTES + 2), middle, HEADER_BYTES + PAGE_BYTES - 1, *header]
    old, new = key_of(1), key_of(2)
    results = set()
    for cut in cuts:
        directory = tmp_path / str(cut)
        tier = open_tier(directory, 4096 + STRIDE)
        if overwrites:
            tier.write(0, old, contents_of(old))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(disk_tier.os, "pwrite", dies_after(cut))
            tier.write(0, new, contents_of(new))
            raise Killed
        tier.close()
        tier = open_tier(directory, 4096 + STRIDE)
        found = intact_keys(tier)
        # A header counts only when it is whole, and it is the last thing that is written.
        assert found == tier.slots.keys()
        assert found in ([], [new], [old] if overwrites and not cut else [])
        results.update(found)
        tier.close()
    assert results == ({old, new} if overwrites else {new})


def test_writes_that_the_disk_reordered_are_found_out(tmp_path: Path) -> None:
    """Power fails: of the latest blocks any may be missing, whatever order they had."""
    old, new = key_of(1), key_of(2)
    size = 4096 + STRIDE
    images = []
    for key in (old, new):
        tier = open_tier(tmp_path, size)
        tier.write(0, key, contents_of(key))
        tier.close()
        images.append(file_of(tmp_path).read_bytes())
    before, after = images
    blocks = [slice(start, start + 4096) for start in range(0, size, 4096)]
    for reached in itertools.product([False, True], repeat=len(blocks)):
        image = [
            (after if new else before)[part] for new, part in zip(reached, blocks, strict=True)
        ]
        file_of(tmp_path).write_bytes(b"".join(image))
        tier = open_tier(tmp_path, size)
        expected = {(False,) * 3: [old], (True,) * 3: [new]}.get(reached, [])
        assert intact_keys(tier) == expected
        tier.close()


def test_a_file_cut_short_keeps_what_is_whole(filled: tuple[Path, list[bytes]]) -> None:
    directory, keys = filled
    image = file_of(directory).read_bytes()
    ends = {0: 0}  # so many bytes hold so many pages
    for number in range(len(keys)):
        group, place = divmod(number, 64)
        contents = group * (4096 + 64 * STRIDE) + 4096 + place * STRIDE
        ends[contents + PAGE_BYTES] = number + 1
    cuts = {cut + extra for cut in list(ends)[::9] for extra in (-1, 0, 1, 4096)}
    for cut in sorted(cuts | {1, 63, 64, 4095, 4096, 64 * STRIDE + 4096 + 100, len(image)}):
        if cut < 0:
            continue
        file_of(directory).write_bytes(image[:cut])
        tier = open_tier(directory)
        wanted = max(count for end, count in ends.items() if end <= cut)
        assert intact_keys(tier) == tier.slots.keys() == keys[:wanted]
        tier.close()
        tier = open_tier(directory)  # has its full size again: no header came back to life
        assert tier.slots.keys() == keys[:wanted]
        tier.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 70 * STRIDE), st.binary(min_size=1, max_size=200)),
                max_size=5))  # fmt: skip
def test_garbage_is_never_a_page(
    filled: tuple[Path, list[bytes]], garbage: list[tuple[int, bytes]]
) -> None:
    directory, keys = filled
    path = file_of(directory)
    image = path.read_bytes()
    damaged = bytearray(image)
    for start, data in garbage:
        damaged[start : start + len(data)] = data
    path.write_bytes(damaged)
    try:
        tier = open_tier(directory)
        tier.slots.check(0, set())
        found = intact_keys(tier)  # compares
        tier.close()
    finally:
        path.write_bytes(image)
    if bytes(damaged) == image:
        assert found == keys
    assert len(found) >= len(keys) - 5 * 5  # 200 bytes of garbage touch at most 5 headers


def test_a_file_of_anything_else_holds_nothing(tmp_path: Path) -> None:
    open_tier(tmp_path).close()
    file_of(tmp_path).write_bytes(np.random.default_rng(0).bytes(ROOM))
    tier = open_tier(tmp_path)
    assert tier.slots.num_held == 0
    assert intact_keys(tier) == []
    slot = save(tier, key_of(1))
    assert (slot, intact_keys(tier)) == (0, [key_of(1)])
    tier.close()


def test_a_file_cut_short_while_in_use_is_survived(filled: tuple[Path, list[bytes]]) -> None:
    directory, keys = filled
    tier = open_tier(directory)
    os.truncate(file_of(directory), 4096 + 10 * STRIDE)
    assert intact_keys(tier) == keys[:10]
    tier.write(40, key_of(99), contents_of(key_of(99)))
    out = np.empty(PAGE_BYTES, np.uint8)
    assert tier.read(40, out)
    assert not tier.read(30, out)  # there again, but empty
    tier.close()


WRITER = """
import sys
import numpy as np
from tests.cache.test_disk_tier import contents_of, key_of, open_tier
tier = open_tier(sys.argv[1], 4096 + 8 * 8192)
for number in range(10**9):
    tier.write(number % 8, key_of(number), contents_of(key_of(number)))
    if number % 10 == 0:
        print(number, flush=True)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that overwrites pages without end, until it is killed."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_killed_process_leaves_good_pages_and_no_lock(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(5)]
    with pytest.raises(ConfigError, match=f"in use by process {writer.pid}; stop it"):
        open_tier(tmp_path)
    os.kill(writer.pid, signal.SIGKILL)
    last = int("".join([*lines, writer.stdout.read()]).split()[-1])
    writer.wait(timeout=10)
    tier = open_tier(tmp_path, 4096 + 8 * STRIDE)
    found = intact_keys(tier)
    assert len(found) >= 7  # but for the one that was being overwritten
    assert found == tier.slots.keys()
    assert int.from_bytes(found[-1], "little") >= last
    tier.close()


def test_a_directory_is_for_one_at_a_time(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for fingerprint in ("model", "another"):
        with pytest.raises(ConfigError, match="in use by process"):
            open_tier(tmp_path, fingerprint=fingerprint)
    tier.close()
    open_tier(tmp_path).close()


@pytest.mark.parametrize(
    ("max_bytes", "message"),
    [(-1, "hold no KV page"), (0, "hold no KV page"), (4096 + STRIDE - 1, "takes 12288 bytes"),
     (1 << 60, "give less --disk-cache-memory")],
)  # fmt: skip
def test_impossible_sizes_say_what_to_do(tmp_path: Path, max_bytes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_tier(tmp_path, max_bytes)
    open_tier(tmp_path).close()  # and leave no lock


def test_a_directory_that_others_could_fill_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(0o770)
    with pytest.raises(ConfigError, match=r"others may write .* made of the KV pages kept there"):
        open_tier(tmp_path / "kv")
    (tmp_path / "kv").chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4321)
    os.chown(tmp_path / "kv", 12345 if os.getuid() == 0 else os.getuid(), -1)
    with pytest.raises(ConfigError, match="belongs to user"):
        open_tier(tmp_path / "kv")
    assert not any((tmp_path / "kv").iterdir())


def test_impossible_directories_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ConfigError, match="choose another --disk-cache-dir"):
        open_tier(tmp_path / "file" / "kv")
    with pytest.raises(ConfigError, match="at least one byte"):
        DiskTier(tmp_path, 0, "model", ROOM)


def test_a_full_disk_is_an_error_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path)
    save(tier, key_of(1))
    real = os.pwrite

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if len(data) < 1000:
            return real(file, data, offset)
        if len(data) == PAGE_BYTES:
            return real(file, data[:2000], offset)  # some of it still fits
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(disk_tier.os, "pwrite", pwrite)
        tier.write(0, key_of(2), contents_of(key_of(2)))
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.slots.keys() == []
    tier.close()
