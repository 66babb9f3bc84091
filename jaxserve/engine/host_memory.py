"""How much memory this process may take: of the machine, of its cgroup, of its resource limits."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class MemoryLimit(NamedTuple):
    """A number of bytes, and what it is, for messages."""

    bytes: int
    what: str


def host_memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The smallest of the limits that hold for this process; None where nothing is known.

    Args:
        root: where /proc and /sys are.
    """
    found = [*_machine(root), *_cgroups(root), *_resource_limits(root)]
    return min(found, default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine has free or could free at once; None where that is unknown."""
    return _meminfo(root).get("MemAvailable")


def _machine(root: Path) -> Iterator[MemoryLimit]:
    total = _meminfo(root).get("MemTotal")
    if total is not None:
        yield MemoryLimit(total, "the machine's memory")


def _meminfo(root: Path) -> dict[str, int]:
    sizes = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024  # written as kB
    return sizes


def _cgroups(root: Path) -> Iterator[MemoryLimit]:
    """The limits of this process' cgroup and those above it, of version 1 or 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be one of the host's: then what is mounted is ours.
        folder = Path(path.lstrip("/"))
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is none
                yield MemoryLimit(int((base / place / file).read_text()), "the cgroup's limit")


def _resource_limits(root: Path) -> Iterator[MemoryLimit]:
    """What `ulimit -v` and `ulimit -d` leave of the address space beside what is taken."""
    used = {}
    with contextlib.suppress(OSError, ValueError):
        sizes = (root / "proc/self/statm").read_text().split()
        page = resource.getpagesize()
        used = {"ulimit -v": int(sizes[0]) * page, "ulimit -d": int(sizes[5]) * page}
    for kind, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield MemoryLimit(max(limit - used.get(name, 0), 0), f"what {name} leaves")
