"""What every peer script shares: read the work, time it, report. Standard library only.

A peer runs as `python <peer>.py SPEC.json`, perhaps under another interpreter, so nothing here
imports jaxserve. SPEC.json holds:

    model       path of a GGUF file
    quantise    llama.cpp: {"source": path, "type": Q8_0, ...} that the file is made from if need be
    jaxserve_options   of our engine
    threads     CPU threads to use
    output_len  tokens to generate per prompt, EOS ignored, greedy
    max_concurrency, max_len   the largest batch, and prompt + output in tokens
    cases       [{"concurrency": N, "batches": [[token ids, ...] * N, ...]}, ...]

Each batch is one run, started by a line on standard input, so that the caller can let the
sides take turns; a case's first batch is its warm-up (the caller drops its time). Every report
is one line on standard output, `@peer ` and then JSON:

    {"version": ...}                                        once, after loading
    {"concurrency": N, "seconds": s, "tokens": [[...]...]}  per batch
    {"missing": module}                                     instead, when it is not installed
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PREFIX = "@peer "
GO = "go\n"

Spec = dict[str, Any]


class Peer(Protocol):
    """A loaded engine."""

    version: str

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Generate for all prompts at once and return the new tokens of each."""
        ...


def report(**fields: Any) -> None:
    """Write one report line for the caller."""
    sys.stdout.write(PREFIX + json.dumps(fields) + "\n")
    sys.stdout.flush()


def limit_threads(threads: int) -> None:
    """Let this process run on its first `threads` CPUs only, where the system can do that.

    Some engines take no thread count and use every CPU they may run on; this makes it one
    rule for all. Must run before a numerical library starts its pool.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))


def main(load: Callable[[Spec], Peer]) -> None:
    """Run the spec named on the command line with the peer that `load` makes."""
    spec: Spec = json.loads(Path(sys.argv[1]).read_text())
    limit_threads(spec["threads"])
    try:
        peer = load(spec)
    except ModuleNotFoundError as error:
        report(missing=error.name)
        return
    report(version=peer.version)
    for case in spec["cases"]:
        for prompts in case["batches"]:
            if sys.stdin.readline() != GO:
                return
            start = time.perf_counter()
            tokens = peer.generate(prompts)
            seconds = time.perf_counter() - start
            if [len(row) for row in tokens] != [spec["output_len"]] * len(prompts):
                raise RuntimeError(f"asked for {spec['output_len']} tokens from every prompt")
            report(concurrency=case["concurrency"], seconds=seconds, tokens=tokens)
