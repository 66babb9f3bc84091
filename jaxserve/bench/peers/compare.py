"""One table of jaxserve beside other engines: the same model, prompts, threads and machine.

Each side runs in a process of its own, on the model's float32 numbers or on a quantised form of
them (`peer_sides`). The sides take turns batch by batch, so that a machine that slows down for a
minute slows them all.
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

from jaxserve.bench.peers.f32_gguf import write_f32_gguf
from jaxserve.bench.peers.peer_process import (
    SCRIPTS,
    PeerFailed,
    PeerMissing,
    PeerProcess,
    environment,
)
from jaxserve.bench.peers.peer_sides import ENGINES, LLAMA_CPP, OURS, Side, Weights
from jaxserve.bench.roofline import Machine, ModelCost, output_throughput_bound
from jaxserve.bench.settings import CompareSpec
from jaxserve.bench.sides import Sides, differing_answers
from jaxserve.bench.tables import Result
from jaxserve.bench.workloads import TokenSource
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig

INTEGER_SPEED = 4  # int8 products in a register where it has one float32 product


@dataclasses.dataclass(frozen=True)
class SideResult:
    """One side's output tokens/s for each batch size, or why there are none.

    Attributes:
        version: what ran.
        output_throughput: tokens/s, prefill included, of every timed run, by concurrency.
        missing: the module that is not installed there, if that is the reason.
        error: the end of its log, if it failed.
        tokens: what it generated in the first run of each batch size.
    """

    version: str = ""
    output_throughput: Mapping[int, Sequence[float]] = dataclasses.field(default_factory=dict)
    missing: str | None = None
    error: str | None = None
    tokens: Mapping[int, list[list[int]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersResult(Result):
    """Every side by name, beside what the machine allows.

    Attributes:
        machine: its memory and arithmetic, as measured.
        bound: the roofline's output tokens/s of every side that ran, by concurrency.
        results: without the sides' tokens.
        num_answers: of each side.
        differing_answers: beside our first side's, of the sides that ran.
    """

    spec: CompareSpec
    machine: Machine
    bound: Mapping[str, Mapping[int, float]]
    results: Mapping[str, SideResult]
    num_answers: int
    differing_answers: Mapping[str, int]

    @classmethod
    def of(
        cls,
        spec: CompareSpec,
        machine: Machine,
        bound: Mapping[str, Mapping[int, float]],
        results: Mapping[str, SideResult],
    ) -> "PeersResult":
        """The result of a run, its answers compared."""
        ran = [name for name, result in results.items() if result.tokens]
        ours = next((name for name in ran if Side.of(name).engine == OURS), None)
        answers = {
            name: [answer for n in spec.concurrency for answer in results[name].tokens[n]]
            for name in sorted(ran, key=lambda name: name != ours)
        }
        return cls(
            spec=spec,
            machine=machine,
            bound=bound,
            results={n: dataclasses.replace(r, tokens={}) for n, r in results.items()},
            num_answers=0 if ours is None else len(answers[ours]),
            differing_answers={} if ours is None else differing_answers(answers),
        )

    def __str__(self) -> str:
        """A Markdown table (output tokens/s per side, and of its bound), and notes."""
        spec = self.spec
        header = ["Concurrent requests"]
        for n in spec.concurrency:
            header += [str(n), "of bound"]
        rows = [header, ["---", *["---:"] * (len(header) - 1)]]
        for name, result in self.results.items():
            row = [name]
            for n in spec.concurrency:
                row += [_cell(result, n), self._reached(name, n)]
            rows.append(row)
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines += [
            "",
            f"End-to-end output tokens/s, prefill included: {spec.input_len} tokens in, "
            f"{spec.output_len} out, {spec.num_threads} threads, median (and spread) of "
            f"{spec.repeats}, the sides taking turns; float32 weights unless a side says others.",
            f"Machine: {self.machine.bandwidth / 1e9:.1f} GB/s memory read, "
            f"{self.machine.matmul / 1e9:.0f} GFLOP/s float32 matmul, both measured; where "
            f"activations are int8, {INTEGER_SPEED} times as many multiplications.",
            *self._beside_the_best(),
        ]
        for name, result in self.results.items():
            if result.missing is not None:
                pip = ENGINES[Side.of(name).engine].pip
                lines.append(f"{name}: no module {result.missing}; pip install {pip}")
            elif result.error is not None:
                lines.append(f"{name} failed:\n{result.error}")
            else:
                lines.append(f"{name}: {result.version}{self._agreement(name)}")
        return "\n".join(lines)

    def _reached(self, name: str, concurrency: int) -> str:
        """How much of its bound a side reached."""
        runs = self.results[name].output_throughput
        if not runs or name not in self.bound:
            return "–"  # noqa: RUF001
        return f"{statistics.median(runs[concurrency]) / self.bound[name][concurrency]:.0%}"

    def _beside_the_best(self) -> list[str]:
        """A line for each of our sides: its ratios to the best of llama.cpp's."""

        def medians(engine: str) -> dict[str, list[float]]:
            return {
                name: [
                    statistics.median(result.output_throughput[n]) for n in self.spec.concurrency
                ]
                for name, result in self.results.items()
                if Side.of(name).engine == engine and result.output_throughput
            }

        theirs = medians(LLAMA_CPP)
        if not theirs:
            return []
        best = [max(column) for column in zip(*theirs.values(), strict=True)]
        return [
            f"{name} / the best of {LLAMA_CPP}'s: "
            + ", ".join(f"{mine / other:.2f}" for mine, other in zip(figures, best, strict=True))
            for name, figures in medians(OURS).items()
        ]

    def _agreement(self, name: str) -> str:
        if name not in self.differing_answers:
            return ""
        equal = self.num_answers - self.differing_answers[name]
        return f"; {equal} of {self.num_answers} answers equal our first side's, token for token"


def _cell(result: SideResult, concurrency: int) -> str:
    if result.missing is not None:
        return "not installed"
    if result.error is not None:
        return "failed"
    runs = result.output_throughput[concurrency]
    spread = f" ({min(runs):.0f} to {max(runs):.0f})" if len(runs) > 1 else ""
    return f"{statistics.median(runs):.1f}{spread}"


def measure_peers(config: EngineConfig, spec: CompareSpec, sides: Sides) -> PeersResult:
    """Let the sides run the same batches in turns.

    Args:
        config: the model, a GGUF file or the name of a demo model, and our side's options.
        spec: what to run.
        sides: whose turns they are.

    Raises:
        ConfigError: the model is no GGUF file.
        JaxserveError: the machine could not be measured.
    """
    from jaxserve.checkpoints.load import open_checkpoint
    from jaxserve.checkpoints.pull import default_cache_dir, pull

    named = {name: Side.of(name) for name in spec.sides}

    source = Path(config.model)
    if not source.exists():
        source = pull(config.model)
    if source.suffix != ".gguf":
        raise ConfigError(f"{source} is not a GGUF file, which all sides can read")
    weights = Weights(source, f32_model(source, default_cache_dir().parent / "peers"))
    architecture = open_checkpoint(weights.float32).config
    before = measure_machine(spec.num_threads)
    results = compare(named, weights, architecture, config, spec, sides)
    machine = before.better(measure_machine(spec.num_threads))
    bound = {
        name: bounds(side, weights, architecture, machine, spec)
        for name, side in named.items()
        if results[name].output_throughput
    }
    return PeersResult.of(spec, machine, bound, results)


def bounds(
    side: Side, weights: Weights, architecture: "ModelConfig", machine: Machine, spec: CompareSpec
) -> dict[int, float]:
    """The most output tokens/s that the machine allows a side, by concurrency."""
    speed = INTEGER_SPEED if side.multiplies_integers else 1
    model = ModelCost.of(architecture, *side.weight_bytes(weights))
    allowed = dataclasses.replace(machine, matmul=speed * machine.matmul)
    return {
        n: output_throughput_bound(
            model, allowed, concurrency=n, input_len=spec.input_len, output_len=spec.output_len
        )
        for n in spec.concurrency
    }


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
    named: Mapping[str, Side],
    weights: Weights,
    architecture: "ModelConfig",
    config: EngineConfig,
    spec: CompareSpec,
    sides: Sides,
) -> dict[str, SideResult]:
    """Run sides in turns.

    Args:
        named: the sides by name.
        weights: of the model.
        architecture: of the model.
        config: our engine's options.
        spec: what to run.
        sides: whose turns they are.
    """
    common = {
        "threads": spec.num_threads,
        "output_len": spec.output_len,
        "max_concurrency": max(spec.concurrency),
        "max_len": spec.input_len + spec.output_len,
        "cases": make_cases(spec, architecture.vocab_size, architecture.eos_token_ids),
    }
    with tempfile.TemporaryDirectory(prefix="jaxserve-peers-") as directory:
        commands = {}
        for number, (name, side) in enumerate(named.items()):
            path = Path(directory) / f"{number}.json"
            path.write_text(json.dumps(common | side.work(weights, config)))
            ours = side.engine == OURS
            python = sys.executable if ours else str(spec.peer_python or sys.executable)
            commands[name] = [python, str(SCRIPTS / ENGINES[side.engine].script), str(path)]
        return run_sides(commands, spec, sides)


def run_sides(
    commands: Mapping[str, Sequence[str]], spec: CompareSpec, sides: Sides
) -> dict[str, SideResult]:
    """Load every side, then let them run the spec's batches in turns."""
    results: dict[str, SideResult] = {}
    with contextlib.ExitStack() as stack:
        live: dict[str, tuple[PeerProcess, str]] = {}
        for name, command in commands.items():
            process = stack.enter_context(PeerProcess(command, spec.num_threads))
            try:
                live[name] = process, process.wait_until_loaded()
            except PeerMissing as error:
                results[name] = SideResult(missing=str(error))
            except PeerFailed as error:
                results[name] = SideResult(error=str(error))

        def run(name: str, number: int) -> dict[str, Any]:
            if name in results:
                return {}  # it has failed
            process, version = live[name]
            try:
                return process.run_batch()
            except PeerFailed as error:
                results[name] = SideResult(version, error=str(error))
                return {}

        runs = sides.take_turns([*live], len(spec.concurrency) * (spec.repeats + 1), run)
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
