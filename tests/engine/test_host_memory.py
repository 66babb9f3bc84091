"""What this process may take, as the kernel's files say it."""

import resource
from pathlib import Path

import pytest

from jaxserve.engine.host_memory import available_memory, host_memory_limit

MIB = 2**20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 MiB, half of it free, without other limits."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    write(tmp_path / "proc/meminfo", "MemTotal: 65536 kB\nMemAvailable:   32768 kB\nHugePages: 0\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_machine(root: Path) -> None:
    assert host_memory_limit(root) == (64 * MIB, "the machine's memory")
    assert available_memory(root) == 32 * MIB


@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_a_cgroup_of_version_2_or_one_above_it(root: Path, place: str) -> None:
    write(root / "proc/self/cgroup", "0::/a/b\n")
    for folder in ("", "a", "a/b"):
        limit = str(48 * MIB) if folder == place else "max"
        write(root / "sys/fs/cgroup" / folder / "memory.max", f"{limit}\n")
    assert host_memory_limit(root) == (48 * MIB, "the cgroup's limit")


@pytest.mark.parametrize("place", ["", "docker/x"])
def test_a_cgroup_of_version_1_even_where_its_path_is_the_host_s(root: Path, place: str) -> None:
    write(root / "proc/self/cgroup", "3:cpu,cpuacct:/docker/x\n2:memory:/docker/x\n0::/\n")
    write(root / "sys/fs/cgroup/memory" / place / "memory.limit_in_bytes", f"{16 * MIB}\n")
    assert host_memory_limit(root) == (16 * MIB, "the cgroup's limit")


@pytest.mark.parametrize(
    ("kind", "name"), [(resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")]
)
def test_resource_limits(root: Path, kind: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they leave beside what the process has taken."""
    page = resource.getpagesize()
    write(root / "proc/self/statm", "7 6 5 4 0 7 0")
    unlimited = (resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(
        resource, "getrlimit", lambda asked: (8 * MIB, 8 * MIB) if asked == kind else unlimited
    )
    assert host_memory_limit(root) == (8 * MIB - 7 * page, f"what {name} leaves")


def test_nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert host_memory_limit(tmp_path) is None
    assert available_memory(tmp_path) is None
