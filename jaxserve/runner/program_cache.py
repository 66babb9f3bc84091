"""Compiles programs ahead of time and keeps the executables on disk for the next start."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.resources
import logging
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

from jaxserve.files.private_files import require_private
from jaxserve.files.sealed_files import BrokenSeal, SealedFiles
from jaxserve.runner.compile_counter import CompileCounter

log = logging.getLogger(__name__)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
# Whose options change what the compilers make of the same program.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# What a program is traced from: after a change in any of these, every one is traced anew.
_SOURCES = (
    "jaxserve.models", "jaxserve.runner", "jaxserve.parallel", "jaxserve.prediction",
    "pallas_kernels",
)  # fmt: skip


class ProgramCache:
    """A directory of serialized executables, which are found in two ways.

    By name and everything that shapes them, so that a start like one before traces nothing. And by
    name and what XLA is given, so that a start with other options, or with other code, compiles
    only what came out differently. The former are notes that name the latter.

    Nothing in the directory can stop a start: what is not there, damaged, another program's or
    otherwise of no use is compiled, and its file replaced.

    Files are pickles of compiled machine code (JAX knows no other form), as trusted as the
    installed package itself. So the directory is created for its owner only, and one in which
    somebody else could put a file is refused, as is a file that is somebody else's.

    Args:
        directory: where executables are kept; None keeps none.
        settings: everything besides the code and the machine that shapes the programs.
        devices: ids of those that the programs run on, in order; no program's text names them.

    Attributes:
        seconds: what threads have spent on programs that were loaded, lowered and compiled.

    Raises:
        ConfigError: others than this user may write to the directory.
    """

    def __init__(
        self,
        directory: Path | None,
        settings: Mapping[str, Any],
        devices: Sequence[int] = (),
    ) -> None:
        if directory is not None:
            with contextlib.suppress(OSError):  # the first write says what is wrong with it
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            require_private(directory)
        self._files = None if directory is None else SealedFiles(directory)
        self._facts = {**_machine(), "devices": tuple(devices)}
        self._key = _digest(self._facts | {**settings, "sources": _sources()})
        self._cannot_keep = False  # said once, not once per program
        self._lock = threading.Lock()
        self.seconds = {"loaded": 0.0, "lowered": 0.0, "compiled": 0.0}

    def get(self, name: str, lower: Callable[[], Lowered]) -> Compiled:
        """The program called `name`: loaded if it is on disk, else lowered, compiled, stored."""
        if self._files is None:
            return self._compile(self._lower(lower))
        note = f"{name}-{self._key}.note"
        noted = (self._read(note) or b"").decode()
        program = self._load(noted) if noted else None
        if program is not None:
            return program
        lowered = self._lower(lower)
        file = f"{name}-{_digest(self._facts | _what_is_compiled(lowered))}.xla"
        program = self._load(file) if file != noted else None
        if program is None:
            program = self._compile(lowered)
            self._write(file, lambda: _serialize(program))
        self._write(note, file.encode)
        return program

    def _lower(self, lower: Callable[[], Lowered]) -> Lowered:
        with self._timed("lowered"):
            return lower()

    def _compile(self, lowered: Lowered) -> Compiled:
        with self._timed("compiled"):
            return lowered.compile()

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        with self._lock:
            self.seconds[kind] += time.monotonic() - started

    def _load(self, file: str) -> Compiled | None:
        content = self._read(file)
        if content is None:
            return None
        try:
            with self._timed("loaded"):
                return _deserialize(content)
        except Exception as error:  # of whatever kind: it costs a compile, not the start
            log.warning("ignoring the cached program %s: %s", file, error)
            return None

    def _read(self, name: str) -> bytes | None:
        assert self._files is not None
        try:
            return self._files.read(name)
        except (OSError, BrokenSeal) as error:
            log.warning("ignoring the cached program %s: %s", name, error)
            return None

    def _write(self, name: str, content: Callable[[], bytes]) -> None:
        assert self._files is not None
        if self._cannot_keep:
            return
        try:
            self._files.write(name, content())
        except Exception as error:  # a full disk, or a program that has no serialized form
            if not self._cannot_keep:  # no lock: said twice is no harm
                log.warning(
                    "cannot keep compiled programs (%s: %s); the next start compiles them again",
                    name, error,
                )  # fmt: skip
            self._cannot_keep = True


def _what_is_compiled(lowered: Lowered) -> dict[str, Any]:
    """All that tells one executable from another of the same machine.

    The text alone does not: arguments that the program does not use are not in it, nor are the
    names by which a caller hands them over and gets results back.
    """
    arguments = [(info.shape, str(info.dtype), info.donated)
                 for info in jax.tree.leaves(lowered.args_info)]  # fmt: skip
    trees = str(lowered.in_tree), str(lowered.out_tree)
    return {"text": lowered.as_text(), "trees": trees, "arguments": arguments}


def _serialize(compiled: Compiled) -> bytes:
    executable = compiled.runtime_executable()
    assert executable is not None
    device_ids = [device.id for device in executable.local_devices()]
    return pickle.dumps((device_ids, *serialize_executable.serialize(compiled)))


def _deserialize(content: bytes) -> Compiled:
    device_ids, *serialized = pickle.loads(content)
    # Without their names the program would be loaded for all devices of the process.
    devices = {device.id: device for device in jax.devices()}
    return serialize_executable.deserialize_and_load(
        *serialized, execution_devices=[devices[i] for i in device_ids]
    )


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:24]


def _machine() -> dict[str, Any]:
    """Where executables run, and what they were made by."""
    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "kinds": [(d.platform, d.device_kind) for d in devices],
        "runtime": devices[0].client.platform_version,
        "cpu": _cpu_features() if devices[0].platform == "cpu" else "",
        "flags": [os.environ.get(name, "") for name in _FLAGS],
    }


def _sources() -> str:
    """A digest of the code that programs are traced from."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        for path, content in sorted(_source_files(package)):
            digest.update(path.encode() + content)
    return digest.hexdigest()


def _source_files(package: str) -> Iterator[tuple[str, bytes]]:
    folders = [importlib.resources.files(package)]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_dir():
                folders.append(entry)
            elif entry.name.endswith((".py", ".json")):
                yield f"{package}/{entry.name}", entry.read_bytes()


def _cpu_features() -> str:
    """Machine code for one CPU may not run on another: the kernel's list of its features."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return "unknown"


# JAX reports compilations to the process, not to whoever asked for them.
_watched: "weakref.WeakSet[CompileCounter]" = weakref.WeakSet()


def _on_event(event: str, duration_secs: float, **details: Any) -> None:
    del duration_secs
    if event != _COMPILE_EVENT:
        return
    counters = list(_watched)
    # While one engine of the process starts, what is compiled is compiled for it.
    planning = [counter for counter in counters if counter.is_planned]
    starting = [counter for counter in counters if not counter.is_ready]
    for counter in planning or starting or counters:
        counter.compiled(str(details.get("fun_name", "a program")))


@functools.cache  # once per process
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_on_event)


class CompileWatch:
    """Tells a `CompileCounter` of the XLA compilations in this process, until closed.

    Compiling is rare, so one listener on JAX's own event costs nothing; loading a serialized
    executable does not raise the event. A counter that nobody holds any more is forgotten.
    """

    def __init__(self, counter: CompileCounter) -> None:
        self._counter = counter
        _listen()
        _watched.add(counter)

    def close(self) -> None:
        """Stop counting. Idempotent."""
        _watched.discard(self._counter)
