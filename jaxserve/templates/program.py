"""What runs in a template's process: it answers one request after another on its pipes.

A message, either way, is its length as 8 bytes, little-endian, and JSON. A request has the `key`
of a template, its `source` the first time, and `variables` with `max_chars` if it is to be
rendered. An answer has `names` (of variables that the template reads), `text` (null: too long), or
an `error` and whether `compiling` raised it.

The process ends by itself when the other end closes, when it has run out of memory (and said so),
and by SIGPROF when a request has taken its time; that is the kernel's doing.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxserve.templates.dialect import CompiledTemplate

LENGTH_BYTES = 8


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Answer until the pipe closes.

    Args:
        cpu_seconds: of the processor, for each request.
        memory_bytes: of address space, for everything.
    """
    with contextlib.suppress(OSError, ValueError):  # systems that know no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    templates: dict[str, CompiledTemplate] = {}
    for data in messages(sys.stdin.buffer):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        out_of_memory = False
        try:
            reply = encoded(_answer(data, templates))
        except MemoryError:
            out_of_memory = True
            reply = encoded({"error": "out of memory", "out_of_memory": True})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()
        if out_of_memory:
            return


def messages(stream: BinaryIO) -> Iterator[bytes]:
    """The messages of a pipe until it closes."""
    while True:
        head = stream.read(LENGTH_BYTES)
        if len(head) < LENGTH_BYTES:
            return
        yield stream.read(int.from_bytes(head, "little"))


def encoded(message: dict[str, Any]) -> bytes:
    """A message for a pipe.

    Raises:
        TypeError, ValueError, RecursionError: it has what JSON has not, or is nested too deep.
    """
    # Texts may have lone surrogates, which are found out when they are encoded to tokens.
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def _answer(data: bytes, templates: dict[str, CompiledTemplate]) -> dict[str, Any]:
    compiling = False
    try:
        request = json.loads(data)
        template = templates.get(request["key"])
        if template is None:
            compiling = True
            template = templates[request["key"]] = CompiledTemplate(request["source"])
            compiling = False
        if "variables" not in request:
            return {"names": sorted(template.variables)}
        return {"text": template.render(request["variables"], request["max_chars"])}
    except MemoryError:
        raise
    except Exception as error:  # a template can fail in any way a program can
        return {"error": str(error)[:1000], "compiling": compiling}
