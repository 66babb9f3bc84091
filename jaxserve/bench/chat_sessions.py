"""What survives of long chats when the device cannot hold them: prefix cache, host and disk tier.

Sessions of several turns take turns with each other, one request at a time. A turn's prompt is
the whole conversation so far, the model's own answers included, and a new message. The device's
pool has room for two conversations only, so what is to survive until a session's next turn must
survive elsewhere. Four engines serve the same sessions, each turn on one after the other:

* `no cache`: computes every prompt from its first token;
* `device`: prefix cache, nothing below it;
* `host`: and a tier in host memory;
* `disk, restarted`: and one on disk; after half of the turns the engine is closed and another is
  built on the same directory, which finds device and host memory empty. Only the turns after
  that count.

Figures:

* TTFT: from a request to its first token. Nobody else is served meanwhile, so it is the time of
  the prefill, and of bringing pages up from the tiers.
* prefill tokens: prompt tokens computed, of those offered.
* prefill throughput: prompt tokens offered per second of TTFT.

CachedAttention (Gao et al., ATC 2024) reports for multi-turn conversations, on other machines,
models and conversations, up to 87 % less TTFT and up to 7.8 times the prefill throughput.
"""

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.bench.settings import ChatSpec
from jaxserve.bench.sides import (
    PrefillFigures,
    Sides,
    differing_answers,
    identity,
    prefill_figures,
    token_source,
    ttfts,
)
from jaxserve.bench.stepping import SteppedRecord, greedy
from jaxserve.bench.tables import Result, format_table, tabulate
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError

PAPER_TTFT, PAPER_GAIN = 0.87, 7.8  # CachedAttention's: how much less, how much faster
NO_CACHE, DEVICE, HOST, DISK = "no cache", "device", "host", "disk, restarted"
CHAT_SIDES = (NO_CACHE, DEVICE, HOST, DISK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnFigures(PrefillFigures):
    """Some turns of one side; see the module."""

    prefill_throughput: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFigures(TurnFigures):
    """One side over the turns that count, from `first_turn_counted` (from 1) on.

    Attributes:
        ttft_reduction, prefill_speedup: beside the same turns without a cache.
    """

    first_turn_counted: int
    ttft_reduction: float
    prefill_speedup: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatResult(Result):
    """Part `chat`: sides and their single turns by name.

    Attributes:
        restart_seconds: what closing the engine with the disk tier and building another took.
        differing_answers: beside those without a cache, by side.
    """

    spec: ChatSpec
    sides: dict[str, ChatFigures]
    turns: dict[str, list[TurnFigures]]
    restart_seconds: float
    num_answers: int
    differing_answers: dict[str, int]

    def __str__(self) -> str:
        """Two tables: each side over all turns, and each turn's TTFT."""
        spec = self.spec
        sides = {
            f"{name} (turns {side.first_turn_counted}-{spec.num_turns})": side
            for name, side in self.sides.items()
        }
        table = tabulate("chat", {**sides, "CachedAttention's paper, up to": None}, {
            "mean TTFT ms": lambda side: f"{1000 * side.mean_ttft:.0f}" if side else "",
            "p99 TTFT ms": lambda side: f"{1000 * side.p99_ttft:.0f}" if side else "",
            "TTFT less": lambda side: f"{side.ttft_reduction if side else PAPER_TTFT:.0%}",
            "prefill tokens/s": lambda side: f"{side.prefill_throughput:.0f}" if side else "",
            "prefill speed-up": lambda side: f"{side.prefill_speedup if side else PAPER_GAIN:.1f}x",
            "prefill tokens computed": lambda side: side.computed() if side else "",
        })  # fmt: skip
        per_turn = [
            (str(turn + 1), *(f"{1000 * mine[turn].mean_ttft:.0f}" for mine in self.turns.values()))
            for turn in range(spec.num_turns)
        ]
        same = "; ".join(
            f"{name}: {identity(count, self.num_answers)}"
            for name, count in self.differing_answers.items()
        )
        return (
            f"{spec.num_sessions} sessions of {spec.num_turns} turns, {spec.message_len} new "
            f"tokens and {spec.answer_len} answered per turn; the device has room for two "
            f"sessions\n{table}\n\n"
            f"{format_table(('mean TTFT ms of turn', *self.turns), per_turn)}\n"
            f"restarted before turn {spec.restart_turn + 1}; answers beside those of {NO_CACHE}: "
            f"{same}"
        )


@dataclasses.dataclass
class _ChatSide:
    """One engine, and the conversations as it has had them."""

    config: EngineConfig
    sides: Sides
    histories: list[list[int]]
    turns: list[list[SteppedRecord]] = dataclasses.field(default_factory=list)
    restart_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.driver = self.sides.driver(self.sides.build(self.config))

    def say(self, turn: int, session: int, message: np.ndarray, answer_len: int) -> None:
        """Put a message to one session's end and have it answered."""
        history = self.histories[session]
        history += message.tolist()
        name = f"session{session}-turn{turn}"
        record = self.driver.serve(name, tuple(history), greedy(answer_len))
        history += record.token_ids
        if len(self.turns) == turn:
            self.turns.append([])
        self.turns[turn].append(record)

    def restart(self) -> None:
        """Close the engine and build another one from the same options."""
        begin = time.perf_counter()
        self.driver.engine.close()
        del self.driver
        gc.collect()  # the weights and pages of the old engine
        self.driver = self.sides.driver(self.sides.build(self.config))
        self.restart_seconds = time.perf_counter() - begin


def measure_chat(config: EngineConfig, spec: ChatSpec, disk_dir: Path, sides: Sides) -> ChatResult:
    """Run part `chat`, every turn of every session on one side after the other.

    Args:
        config: the engine's options; pool, context, prefix cache and tiers are set here, the
            tiers' sizes are taken from it.
        spec: the conversations.
        disk_dir: an empty directory for the disk tier.
        sides: runs the engines.

    Raises:
        ConfigError: no memory for the host or disk tier.
    """
    if not (config.host_cache_memory > 0 and config.disk_cache_memory > 0):
        raise ConfigError("host_cache_memory and disk_cache_memory must be positive here")
    chats = {
        name: _ChatSide(side, sides, [[] for _ in range(spec.num_sessions)])
        for name, side in chat_configs(config, spec, disk_dir).items()
    }
    source = token_source(chats[NO_CACHE].driver)

    def run(name: str, number: int) -> None:
        turn, session = divmod(number, spec.num_sessions)
        if name == DISK and (turn, session) == (spec.restart_turn, 0):
            chats[DISK].restart()
        rng = np.random.default_rng([spec.seed, turn, session])
        chats[name].say(turn, session, source.draw(rng, spec.message_len), spec.answer_len)

    sides.take_turns(CHAT_SIDES, spec.num_turns * spec.num_sessions, run)
    return _chat_results(chats, spec)


def chat_configs(config: EngineConfig, spec: ChatSpec, disk_dir: Path) -> dict[str, EngineConfig]:
    """The options of each side; the pool has room for two whole conversations."""
    pages = -(-spec.session_len // config.page_size)
    no_tier = dict(host_cache_memory=0.0, disk_cache_memory=0.0, disk_cache_dir=None)
    changes: dict[str, dict[str, Any]] = {
        NO_CACHE: dict(prefix_cache=False, **no_tier),
        DEVICE: dict(prefix_cache=True, **no_tier),
        HOST: dict(prefix_cache=True, disk_cache_memory=0.0, disk_cache_dir=None),
        DISK: dict(prefix_cache=True, disk_cache_dir=str(disk_dir)),
    }
    return {
        name: dataclasses.replace(
            config,
            num_pages=2 * pages,
            max_model_len=spec.session_len,
            max_num_seqs=1,  # one request at a time
            **change,
        )
        for name, change in changes.items()
    }


def _chat_results(sides: dict[str, _ChatSide], spec: ChatSpec) -> ChatResult:
    figures = {}
    for name, side in sides.items():
        first = spec.restart_turn if name == DISK else 0
        mine = [record for turn in side.turns[first:] for record in turn]
        base = [record for turn in sides[NO_CACHE].turns[first:] for record in turn]
        counted, against = _turn_figures(mine), _turn_figures(base)
        figures[name] = ChatFigures(
            **vars(counted),
            first_turn_counted=first + 1,
            ttft_reduction=1 - counted.mean_ttft / against.mean_ttft,
            prefill_speedup=counted.prefill_throughput / against.prefill_throughput,
        )
    answers = {
        name: [r.token_ids for turn in side.turns for r in turn] for name, side in sides.items()
    }
    return ChatResult(
        spec=spec,
        sides=figures,
        turns={name: [_turn_figures(t) for t in side.turns] for name, side in sides.items()},
        restart_seconds=sides[DISK].restart_seconds,
        num_answers=len(answers[NO_CACHE]),
        differing_answers=differing_answers(answers),
    )


def _turn_figures(records: Sequence[SteppedRecord]) -> TurnFigures:
    figures = prefill_figures(records)
    throughput = figures.prefill_tokens_offered / float(ttfts(records).sum())
    return TurnFigures(**vars(figures), prefill_throughput=throughput)
