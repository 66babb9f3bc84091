"""Renders chat templates in processes of their own, which a template cannot outstay.

A template comes with a checkpoint and is a program: Jinja's sandbox keeps it from files and from
Python's inside, but not from loops in loops, strings doubled over and over, or `ljust(2000000000)`.
Counting all that can grow in Python's and Jinja's own functions would leave gaps; a process has
limits that the kernel keeps. It is started when the first template is compiled, imports little,
and serves all templates and requests to come; one that overruns is replaced.
"""

import atexit
import functools
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.templates.program import LENGTH_BYTES, encoded

CPU_SECONDS = 2.0
MEMORY_MIB = 768
_PATIENCE_SECONDS = 60.0  # for a machine so busy that CPU_SECONDS are not to be had sooner
_MAX_WORKERS = 4
_MAX_REPLY_BYTES = 2**28
_MAX_CACHED = 64


def template_variables(source: str) -> frozenset[str]:
    """Names that a template reads and does not set.

    Args:
        source: Jinja.

    Raises:
        InvalidRequest: it is not valid Jinja, or overruns its budget while it is compiled.
        ConfigError: no process can be started.
    """
    found = _variables(source)
    if isinstance(found, str):
        raise InvalidRequest(found)
    return found


def rendered(source: str, variables: Mapping[str, Any], max_chars: int) -> str:
    """What a template makes of its variables. Takes about a tenth of a millisecond more than it.

    Args:
        source: valid Jinja.
        variables: values that JSON has.
        max_chars: a longer result is an error.

    Raises:
        InvalidRequest: the template fails, overruns its budget or writes too much, or a variable
            is nothing that JSON has.
        ConfigError: no process can be started.
    """
    reply = _pool.ask(source, {"variables": dict(variables), "max_chars": max_chars})
    if "error" in reply:
        raise InvalidRequest(f"the chat template refused the messages: {reply['error']}")
    if reply["text"] is None:
        raise InvalidRequest(f"the chat template's result exceeds {max_chars} characters")
    return reply["text"]


@functools.lru_cache(maxsize=_MAX_CACHED)
def _variables(source: str) -> frozenset[str] | str:
    """A template's variables, or what is wrong with it: either is found out once."""
    try:
        reply = _pool.ask(source, {})
    except InvalidRequest as error:
        return str(error)
    if "error" in reply:
        return f"the model's chat template is broken: {reply['error']}"
    return frozenset(reply["names"])


class _Gone(Exception):
    """A worker has ended while it was asked."""


class _Worker:
    """One process.

    Raises:
        ConfigError: it cannot be started.
    """

    def __init__(self) -> None:
        arguments = f"{CPU_SECONDS!r}, {MEMORY_MIB * 2**20}"
        code = f"from jaxserve.templates.program import main; main({arguments})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the server, which may still be draining
            )
        except OSError as error:
            raise ConfigError(f"cannot start the chat templates' process: {error}") from error
        self._known: set[str] = set()

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, source: str, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer.

        Raises:
            _Gone: it has ended.
            InvalidRequest: the request has what JSON has not; nothing was asked.
        """
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        more = {"key": key} if key in self._known else {"key": key, "source": source}
        try:
            data = encoded({**request, **more})
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"a chat has what JSON has not: {error}") from error
        deadline = time.monotonic() + _PATIENCE_SECONDS
        self._write(data)
        length = int.from_bytes(self._read(LENGTH_BYTES, deadline), "little")
        if length > _MAX_REPLY_BYTES:
            raise _Gone
        reply = json.loads(self._read(length, deadline))
        if not reply.get("compiling"):
            self._known.add(key)
        return reply

    def end(self) -> int:
        """Make sure that it has ended; its exit status, negative for a signal's number."""
        pipes = (self._process.stdin, self._process.stdout)
        for pipe in pipes:
            if pipe is not None:
                pipe.close()
        try:
            return self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError as error:
            raise _Gone from error

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        pipe, data = self._process.stdout.fileno(), bytearray()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while len(data) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self._process.kill()
                raise _Gone
            piece = os.read(pipe, min(size - len(data), 2**20))
            if not piece:
                raise _Gone
            data += piece
        return bytes(data)


class _Pool:
    """The workers of this process: as many as are asked at the same time, up to a few."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # pipes are not for two to write into
        atexit.register(self.close)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._room = threading.Semaphore(_MAX_WORKERS)
        self._idle: list[_Worker] = []

    def ask(self, source: str, request: dict[str, Any]) -> dict[str, Any]:
        """A worker's answer; waits for one that has time.

        Raises:
            InvalidRequest: the template overruns its budget, or a variable is not JSON's.
            ConfigError: no process can be started.
        """
        with self._room:
            worker = self._take()
            try:
                reply = worker.ask(source, request)
            except _Gone:
                raise InvalidRequest(_overrun(worker.end())) from None
            except InvalidRequest:
                self._idle.append(worker)
                raise
            except BaseException:
                worker.end()
                raise
            if reply.get("out_of_memory"):
                worker.end()
                raise InvalidRequest(_overrun(0))
            self._idle.append(worker)
            return reply

    def close(self) -> None:
        """End all workers that have nothing to do."""
        while self._idle:
            self._idle.pop().end()

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                worker.end()
        return _Worker()


def _overrun(status: int) -> str:
    if status not in (0, -signal.SIGPROF):
        return f"the model's chat template has ended its process (status {status})"
    return (
        f"the model's chat template takes more than its {CPU_SECONDS:g} s of processor time or "
        f"{MEMORY_MIB} MiB of memory for this"
    )


_pool = _Pool()
