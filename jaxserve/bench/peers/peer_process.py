"""One side of the comparison as a live process that runs a batch whenever it is told to."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from jaxserve.bench.peers.harness import GO, PREFIX

SCRIPTS = Path(__file__).parent


class PeerFailed(Exception):
    """A side could not go on; the message is the end of what it logged."""


class PeerMissing(Exception):
    """A side's library is not installed; the message is the module's name."""


class PeerProcess:
    """A peer script under its own interpreter. Use as a context manager.

    Args:
        command: the interpreter, the script and the spec's path.
        threads: CPU threads it may use.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._log: IO[str] = tempfile.TemporaryFile(  # noqa: SIM115  # closed by __exit__
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment(threads),
        )  # fmt: skip

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def wait_until_loaded(self) -> str:
        """Wait for the engine to be loaded.

        Returns:
            What runs there, with its version.

        Raises:
            PeerMissing: its library is not installed.
            PeerFailed: it ended.
        """
        report = self._next_report()
        if "missing" in report:
            raise PeerMissing(report["missing"])
        return report["version"]

    def run_batch(self) -> dict[str, Any]:
        """Have it run the next batch of the spec, and wait for the report.

        Raises:
            PeerFailed: it ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(GO)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._end_of_log()) from None
        return self._next_report()

    def _next_report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                return json.loads(line.removeprefix(PREFIX))
        raise PeerFailed(self._end_of_log())

    def _end_of_log(self) -> str:
        self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-10:]).strip()
        return tail or "it ended early, without a word"


def environment(threads: int) -> dict[str, str]:
    """Ours, with jaxserve importable also when it runs from a source tree."""
    paths = [str(SCRIPTS.parents[2]), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
