"""KV pages in a file, which outlives the process."""

import contextlib
import fcntl
import hashlib
import itertools
import logging
import mmap
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from jaxserve.cache.page_keys import KEY_BYTES
from jaxserve.cache.slot_table import SlotTable
from jaxserve.core.errors import ConfigError
from jaxserve.files.private_files import require_private

log = logging.getLogger(__name__)

_FORMAT = b"jaxserve.kv.1"  # a file of another layout gets another name
_BLOCK = 4096  # contents begin at multiples of it, as the system's own pages do
# magic, key, sequence number, bytes of contents, CRC-32 of contents; then CRC-32 of all these.
_HEADER = struct.Struct(f"<8s{KEY_BYTES}sQQI")
_HEADER_BYTES = 64
_GROUP = _BLOCK // _HEADER_BYTES  # slots whose headers share a block


class DiskTier:
    """A file of page-sized slots with a header each, and the table of who holds them.

    The headers of 64 slots share one block in front of their contents, so that opening reads one
    small block per 64 pages, and the number of slots can change from one start to the next.

    A page counts from the moment its header is written: first the slot's old header is erased,
    then contents are written, then the new header. A process killed at any point thus leaves the
    page or a free slot. A machine that loses power may keep later writes without earlier ones;
    that is what the contents' CRC-32 is for, verified each time a page is read. It guards
    against accidents, not against a user who may write to the directory (only its owner may).
    CRC-32 ran at 6 GB/s where BLAKE2b did 1.2. So nothing needs to wait for the disk (fsync).

    Pages are read through a memory map. They are not written through it: a store to a mapped
    block first reads what it is about to overwrite, and on a full disk it ends the process by a
    signal where pwrite has an error to return. The file is sparse and grows as it fills.

    Which slot is whose is kept in `slots` under the page store's lock; `read`, `write` and
    `erase` take no lock, and their caller sees to it that the slot stays theirs meanwhile.

    Args:
        directory: made if need be, readable by its owner only; for one process at a time. Each
            fingerprint has a file of its own in it, and other files are left alone.
        page_bytes: size of a page's contents.
        fingerprint: all that makes equal keys mean equal contents: model, dtype, page size, ...
        max_bytes: size that the file may grow to.

    Raises:
        ConfigError: the directory cannot be used, others than this user may write to it or another
            process uses it, or `max_bytes` is less than a page or more than the disk has left.

    Attributes:
        page_bytes: as given.
        slots: which key is where.
    """

    def __init__(
        self, directory: Path | str, page_bytes: int, fingerprint: str, max_bytes: int
    ) -> None:
        if page_bytes < 1:
            raise ConfigError(f"a KV page has at least one byte, got {page_bytes}")
        directory = Path(directory).expanduser()
        self.page_bytes = page_bytes
        self._stride = -(-page_bytes // _BLOCK) * _BLOCK
        num_slots = _num_slots(max_bytes, self._stride)
        if num_slots < 1:
            raise ConfigError(
                f"{max_bytes} bytes of disk hold no KV page: a page takes "
                f"{_BLOCK + self._stride} bytes; give more --disk-cache-memory, or 0 for none"
            )
        facts = f"{page_bytes} {fingerprint}".encode()
        digest = hashlib.blake2b(facts, digest_size=16, person=_FORMAT)
        self._magic = digest.digest()[:8]
        self._checksums: dict[int, int] = {}  # slot -> CRC-32 of its contents
        self._size = self._end(num_slots - 1)
        with contextlib.ExitStack() as undo:
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                require_private(directory, because="answers are made of the KV pages kept there")
                self._lock_file = _lock(directory)
                undo.callback(os.close, self._lock_file)
                path = directory / f"{digest.hexdigest()}.pages"
                self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                undo.callback(os.close, self._file)
                old_size = self._resize(directory)
                self._map = mmap.mmap(self._file, self._size, prot=mmap.PROT_READ)
                undo.callback(self._map.close)
                self.slots = SlotTable(num_slots)
                self._scan(old_size)
            except OSError as error:
                raise ConfigError(
                    f"cannot keep KV pages in {directory}: {error}; choose another "
                    "--disk-cache-dir, or 0 --disk-cache-memory for none"
                ) from error
            undo.pop_all()
        self._is_open = True
        log.info("%d KV pages found in %s", self.slots.num_held, path)

    def write(self, slot: int, key: bytes, contents: np.ndarray) -> None:
        """Write a page's contents, uint8 [page_bytes], into a slot; it is `key`'s on disk then.

        Raises:
            OSError: the disk is full or broken; the slot holds nothing.
        """
        checksum = zlib.crc32(contents.data)
        self.erase(slot)
        self._write_at(contents.data, self._contents_at(slot))
        fields = _HEADER.pack(self._magic, key, next(self._sequence), self.page_bytes, checksum)
        header = fields + zlib.crc32(fields).to_bytes(4, "little")
        self._write_at(memoryview(header), self._header_at(slot))
        self._checksums[slot] = checksum

    def read(self, slot: int, out: np.ndarray) -> bool:
        """Copy a slot's contents into `out`, uint8 [page_bytes]; whether they are intact."""
        start = self._contents_at(slot)
        # Touching a mapped block that the file no longer has would be the end of the process.
        if os.fstat(self._file).st_size < start + self.page_bytes:
            return False
        np.copyto(out, np.frombuffer(self._map, np.uint8, self.page_bytes, start))
        return zlib.crc32(out.data) == self._checksums[slot]

    def erase(self, slot: int) -> None:
        """Make sure that the slot holds nothing after a restart.

        Raises:
            OSError: the disk is broken.
        """
        self._write_at(memoryview(bytes(_HEADER_BYTES)), self._header_at(slot))

    def close(self) -> None:
        """Leave the directory to others. No transfer may be under way. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._map.close()
            os.close(self._file)
            os.close(self._lock_file)  # releases the lock

    def _header_at(self, slot: int) -> int:
        return self._group_at(slot) + slot % _GROUP * _HEADER_BYTES

    def _contents_at(self, slot: int) -> int:
        return self._group_at(slot) + _BLOCK + slot % _GROUP * self._stride

    def _group_at(self, slot: int) -> int:
        return slot // _GROUP * (_BLOCK + _GROUP * self._stride)

    def _end(self, slot: int) -> int:
        return self._contents_at(slot) + self._stride

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:  # a nearly full disk takes a part, and refuses the rest
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def _resize(self, directory: Path) -> int:
        """Give the file its size, without taking disk space yet; return the size it had."""
        stat, disk = os.fstat(self._file), os.statvfs(directory)
        room = disk.f_bavail * disk.f_frsize + stat.st_blocks * 512
        if self._size > room:
            raise ConfigError(
                f"no room for {self._size / 2**30:.2f} GiB of KV pages in {directory}, where "
                f"{room / 2**30:.2f} GiB are left; give less --disk-cache-memory or choose "
                "another --disk-cache-dir"
            )
        os.ftruncate(self._file, self._size)
        return stat.st_size

    def _scan(self, old_size: int) -> None:
        """Find out from the headers what the file holds; contents are verified when read."""
        found: dict[bytes, tuple[int, int, int]] = {}  # key -> (sequence number, slot, checksum)
        stale: list[int] = []
        for first in range(0, self.slots.num_slots, _GROUP):
            block = os.pread(self._file, _BLOCK, self._group_at(first))
            if not any(block):
                continue
            for slot in range(first, min(first + _GROUP, self.slots.num_slots)):
                start = (slot - first) * _HEADER_BYTES
                entry = self._parse(block[start : start + _HEADER_BYTES])
                if entry is None:
                    continue
                key, sequence, checksum = entry
                entry = (sequence, slot, checksum)
                if self._contents_at(slot) + self.page_bytes > old_size:
                    stale.append(slot)  # the file was cut short: a header without contents
                    continue
                if key in found:  # a slot that was given up, and the process ended before erasing
                    stale.append(min(found[key], entry)[1])
                    entry = max(found[key], entry)
                found[key] = entry
        for slot in stale:
            self.erase(slot)
        self._adopt(found)

    def _adopt(self, found: dict[bytes, tuple[int, int, int]]) -> None:
        """Enter pages into the table, those written last as the most recently used."""
        in_use = {slot for _, slot, _ in found.values()}
        taken = [self.slots.take() for _ in range(self.slots.num_slots)]
        for slot in reversed(taken):
            if slot is not None and slot not in in_use:
                self.slots.give_back(slot)
        last = 0
        for key, (sequence, slot, checksum) in sorted(found.items(), key=lambda item: item[1]):
            self.slots.hold(slot, key, pinned=False)
            self._checksums[slot] = checksum
            last = sequence
        self._sequence = itertools.count(last + 1)

    def _parse(self, header: bytes) -> tuple[bytes, int, int] | None:
        """Key, sequence number and contents' checksum, if this is a whole header of ours."""
        fields = header[: _HEADER.size]
        if header[_HEADER.size : _HEADER.size + 4] != zlib.crc32(fields).to_bytes(4, "little"):
            return None
        magic, key, sequence, length, checksum = _HEADER.unpack(fields)
        if (magic, length) != (self._magic, self.page_bytes):
            return None
        return key, sequence, checksum


def _num_slots(max_bytes: int, stride: int) -> int:
    """Slots in a file of at most `max_bytes`, whose last group may be a part of one."""
    groups, rest = divmod(max_bytes, _BLOCK + _GROUP * stride)
    return groups * _GROUP + max(0, (rest - _BLOCK) // stride)


def _lock(directory: Path) -> int:
    """Keep other processes out of the directory; return the lock file's descriptor.

    The system releases the lock when the descriptor is closed, however the process ends.

    Raises:
        ConfigError: another has it.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise ConfigError(
            f"KV pages in {directory} are in use by process {owner}; stop it, or choose another "
            "--disk-cache-dir for this one"
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
