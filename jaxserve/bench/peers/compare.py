"""One table of jaxserve beside other engines: the same weights, prompts, threads and machine.

Each side runs in a process of its own and reads the same float32 GGUF file. The sides take
turns batch by batch, so that a machine that slows down for a minute slows them all.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.peers.f32_gguf import write_f32_gguf
from jaxserve.bench.peers.peer_process import (
    SCRIPTS,
    PeerFailed,
    PeerMissing,
    PeerProcess,
    environment,
)
from jaxserve.bench.roofline import Machine, output_throughput_bound
from jaxserve.bench.workloads import TokenSource
from jaxserve.core.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig

OURS = "jaxserve"


@dataclasses.dataclass(frozen=True)
class Side:
    """A script that runs one engine, and what to install for it."""

    script: str
    pip: str


SIDES = {
    OURS: Side("jaxserve_peer.py", "jaxserve"),
    "transformers": Side("transformers_peer.py", "torch transformers gguf"),
    "llama.cpp": Side("llama_cpp_peer.py", "llama-cpp-python"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSpec:
    """What is compared.

    Attributes:
        concurrency: batch sizes: prompts given to an engine at once.
        input_len, output_len: tokens per prompt and per answer.
        threads: CPU threads of every side.
        repeats: timed runs per batch size (after one for warm-up); the median counts.
        seed: of the prompts.

    Raises:
        ConfigError: a number is not positive.
    """

    concurrency: tuple[int, ...] = (1, 8, 32)
    input_len: int = 128
    output_len: int = 64
    threads: int = 1
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.concurrency, self.input_len, self.output_len, self.threads, self.repeats)
        if not self.concurrency or min(numbers) < 1:
            raise ConfigError("concurrency, lengths, threads and repeats must be at least 1")


@dataclasses.dataclass(frozen=True)
class SideResult:
    """One side's output tokens/s for each batch size, or why there are none.

    Attributes:
        version: what ran.
        throughput: output tokens/s, prefill included, of every timed run, by concurrency.
        missing: the module that is not installed there, if that is the reason.
        error: the end of its log, if it failed.
        tokens: what it generated in the first run of each batch size.
    """

    version: str = ""
    throughput: Mapping[int, Sequence[float]] = dataclasses.field(default_factory=dict)
    missing: str | None = None
    error: str | None = None
    tokens: Mapping[int, list[list[int]]] = dataclasses.field(default_factory=dict)


def f32_model(source: Path, directory: Path) -> Path:
    """The float32 copy of a GGUF file, written to `directory` unless it is there already."""
    stat = source.stat()
    target = directory / f"{source.stem}-{stat.st_size}-{stat.st_mtime_ns}-f32.gguf"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_f32_gguf(source, target)
    return target


def make_cases(spec: CompareSpec, vocab_size: int, avoid: Sequence[int]) -> list[dict[str, Any]]:
    """The harness' cases: `repeats + 1` batches of distinct random prompts per batch size."""
    rng = np.random.default_rng(spec.seed)
    source = TokenSource(vocab_size, avoid)
    return [
        {
            "concurrency": n,
            "batches": [
                [source.draw(rng, spec.input_len).tolist() for _ in range(n)]
                for _ in range(spec.repeats + 1)
            ],
        }
        for n in spec.concurrency
    ]


def compare(
    model: Path,
    config: "ModelConfig",
    spec: CompareSpec,
    *,
    sides: Sequence[str] = tuple(SIDES),
    peer_python: Path | None = None,
    jaxserve_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, SideResult]:
    """Run the sides in turns.

    Args:
        model: the float32 GGUF file.
        config: its architecture.
        spec: what to run.
        sides: names out of `SIDES`.
        peer_python: the interpreter that has the peers; default this one.
        jaxserve_options: engine options of our side.
        progress: show a bar on stderr.
    """
    work = {
        "model": str(model),
        "threads": spec.threads,
        "output_len": spec.output_len,
        "max_concurrency": max(spec.concurrency),
        "max_len": spec.input_len + spec.output_len,
        "cases": make_cases(spec, config.vocab_size, config.eos_token_ids),
        "jaxserve_options": dict(jaxserve_options or {}),
    }
    runs = len(sides) * len(spec.concurrency) * (spec.repeats + 1)
    with tempfile.TemporaryDirectory(prefix="jaxserve-peers-") as directory:
        path = Path(directory) / "spec.json"
        path.write_text(json.dumps(work))
        commands = {}
        for name in sides:
            python = sys.executable if name == OURS else str(peer_python or sys.executable)
            commands[name] = [python, str(SCRIPTS / SIDES[name].script), str(path)]
        with tqdm(total=runs, unit="run", disable=not progress) as bar:
            return run_sides(commands, spec, bar)


def run_sides(
    commands: Mapping[str, Sequence[str]], spec: CompareSpec, bar: tqdm
) -> dict[str, SideResult]:
    """Load every side, then let them run the spec's batches in turns."""
    results: dict[str, SideResult] = {}
    with contextlib.ExitStack() as stack:
        live: dict[str, tuple[PeerProcess, str]] = {}
        for name, command in commands.items():
            bar.set_description(f"loading {name}")
            process = stack.enter_context(PeerProcess(command, spec.threads))
            try:
                live[name] = process, process.wait_until_loaded()
            except PeerMissing as error:
                results[name] = SideResult(missing=str(error))
            except PeerFailed as error:
                results[name] = SideResult(error=str(error))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in live}
        for turn in range(len(spec.concurrency) * (spec.repeats + 1)):
            order = [name for name in live if name not in results]
            for name in order if turn % 2 else reversed(order):
                bar.set_description(name)
                try:
                    runs[name].append(live[name][0].run_batch())
                    bar.update()
                except PeerFailed as error:
                    results[name] = SideResult(live[name][1], error=str(error))
    for name, (_, version) in live.items():
        if name not in results:
            results[name] = _collect(version, runs[name], spec)
    return {name: results[name] for name in commands}


def _collect(version: str, runs: list[dict[str, Any]], spec: CompareSpec) -> SideResult:
    throughput, tokens = {}, {}
    for n in spec.concurrency:
        timed = [run for run in runs if run["concurrency"] == n][1:]  # the first is warm-up
        throughput[n] = [n * spec.output_len / run["seconds"] for run in timed]
        tokens[n] = timed[0]["tokens"]
    return SideResult(version, throughput, tokens=tokens)


def measure_machine(threads: int) -> Machine:
    """Memory bandwidth and matmul speed of this machine, in a process of its own.

    Raises:
        JaxserveError: it could not be measured.
    """
    command = [sys.executable, str(SCRIPTS / "machine.py"), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads))
    if done.returncode:
        raise JaxserveError(f"could not measure this machine:\n{done.stderr[-1000:]}")
    return Machine(**json.loads(done.stdout))


def format_table(
    results: Mapping[str, SideResult], bounds: Mapping[int, float], spec: CompareSpec
) -> str:
    """The comparison as a Markdown table: output tokens/s per side, the bound, our fraction."""
    ours = results.get(OURS)
    header = ["Concurrent requests", *results, "bound", f"{OURS} / bound"]
    rows = [header, ["---:"] * len(header)]
    for n in spec.concurrency:
        cells = [_cell(result, n) for result in results.values()]
        reached = "–"  # noqa: RUF001
        if ours and ours.throughput:
            reached = f"{statistics.median(ours.throughput[n]) / bounds[n]:.0%}"
        rows.append([str(n), *cells, f"{bounds[n]:.0f}", reached])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(result: SideResult, concurrency: int) -> str:
    if result.missing is not None:
        return "not installed"
    if result.error is not None:
        return "failed"
    runs = result.throughput[concurrency]
    spread = f" ({min(runs):.0f} to {max(runs):.0f})" if len(runs) > 1 else ""
    return f"{statistics.median(runs):.1f}{spread}"


def format_notes(results: Mapping[str, SideResult], spec: CompareSpec, machine: Machine) -> str:
    """What belongs below the table: the work, the versions, the machine, what went wrong."""
    lines = [
        f"End-to-end output tokens/s, prefill included: {spec.input_len} tokens in, "
        f"{spec.output_len} out, float32 weights, {spec.threads} threads, median (and spread) of "
        f"{spec.repeats}, the sides taking turns.",
        f"Machine: {machine.bandwidth / 1e9:.1f} GB/s memory read, "
        f"{machine.matmul / 1e9:.0f} GFLOP/s float32 matmul, both measured.",
    ]
    for name, result in results.items():
        if result.missing is not None:
            lines.append(f"{name}: no module {result.missing}; pip install {SIDES[name].pip}")
        elif result.error is not None:
            lines.append(f"{name} failed:\n{result.error}")
        else:
            lines.append(f"{name}: {result.version}{_agreement(results, name)}")
    return "\n".join(lines)


def _agreement(results: Mapping[str, SideResult], name: str) -> str:
    """How many of a side's greedy answers are ours, token for token."""
    ours, theirs = results.get(OURS), results[name]
    if name == OURS or ours is None or not ours.tokens:
        return ""
    pairs = [pair for n in ours.tokens
             for pair in zip(ours.tokens[n], theirs.tokens[n], strict=True)]  # fmt: skip
    same = sum(a == b for a, b in pairs)
    return f"; {same} of {len(pairs)} answers equal {OURS}'s, token for token"


def bounds(config: "ModelConfig", machine: Machine, spec: CompareSpec) -> dict[int, float]:
    """The roofline's output tokens/s by concurrency."""
    return {
        n: output_throughput_bound(
            config, machine, concurrency=n, input_len=spec.input_len, output_len=spec.output_len
        )
        for n in spec.concurrency
    }
