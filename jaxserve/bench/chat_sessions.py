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
from tqdm import tqdm

from jaxserve.bench.sides import (
    BuildEngine,
    MakeDriver,
    count_differing,
    identity,
    in_turns,
    prefill_figures,
    require_positive,
    token_source,
    ttfts,
)
from jaxserve.bench.stepping import Driver, SteppedRecord, greedy
from jaxserve.bench.tables import format_table
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError

CACHED_ATTENTION = {"ttft_reduction": 0.87, "prefill_speedup": 7.8}
NO_CACHE, DEVICE, HOST, DISK = "no cache", "device", "host", "disk, restarted"
CHAT_SIDES = (NO_CACHE, DEVICE, HOST, DISK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSpec:
    """Part `chat`: lengths in tokens.

    Raises:
        ConfigError: a count is below 1, or there is nothing that a small pool could not hold.
    """

    num_sessions: int = 6
    num_turns: int = 10
    message_len: int = 32
    answer_len: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self)
        if self.num_sessions < 3:
            raise ConfigError("there must be at least 3 sessions: the device has room for 2")
        if self.num_turns < 2:
            raise ConfigError("a chat has at least 2 turns")

    @property
    def session_len(self) -> int:
        """Tokens of a whole conversation."""
        return self.num_turns * (self.message_len + self.answer_len)

    @property
    def restart_turn(self) -> int:
        """The first turn (from 0) after the restart."""
        return self.num_turns // 2


@dataclasses.dataclass
class _ChatSide:
    """One engine, and the conversations as it has had them."""

    config: EngineConfig
    build: BuildEngine
    make_driver: MakeDriver
    histories: list[list[int]]
    turns: list[list[SteppedRecord]] = dataclasses.field(default_factory=list)
    restart_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.driver = self.make_driver(self.build(self.config))

    def say(self, turn: int, session: int, message: Sequence[int], answer_len: int) -> None:
        """Put a message to one session's end and have it answered."""
        history = self.histories[session]
        history += message
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
        self.driver = self.make_driver(self.build(self.config))
        self.restart_seconds = time.perf_counter() - begin


def measure_chat(
    config: EngineConfig,
    spec: ChatSpec,
    *,
    disk_dir: Path,
    build: BuildEngine,
    driver: MakeDriver = Driver,
    progress: bool = False,
) -> dict[str, Any]:
    """Run part `chat`, every turn of every session on one side after the other.

    Args:
        config: the engine's options; pool, context, prefix cache and tiers are set here, the
            tiers' sizes are taken from it.
        spec: the conversations.
        disk_dir: an empty directory for the disk tier.
        build: makes an engine.
        driver: steps it.
        progress: show progress bars.

    Returns:
        `sides` by name, `turns` by name (figures of each turn), and `differing_answers`.

    Raises:
        ConfigError: no memory for the host or disk tier.
    """
    if not (config.host_cache_memory > 0 and config.disk_cache_memory > 0):
        raise ConfigError("host_cache_memory and disk_cache_memory must be positive here")
    sides = {
        name: _ChatSide(side, build, driver, [[] for _ in range(spec.num_sessions)])
        for name, side in chat_configs(config, spec, disk_dir).items()
    }
    source = token_source(sides[NO_CACHE].driver)
    total = spec.num_turns * spec.num_sessions
    with tqdm(total=total, desc="turns", disable=not progress) as bar:
        for turn in range(spec.num_turns):
            if turn == spec.restart_turn:
                sides[DISK].restart()
            for session in range(spec.num_sessions):
                rng = np.random.default_rng([spec.seed, turn, session])
                message = source.draw(rng, spec.message_len).tolist()
                for name in in_turns(CHAT_SIDES, turn + session):
                    sides[name].say(turn, session, message, spec.answer_len)
                bar.update()
    return _chat_results(sides, spec)


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


def _chat_results(sides: dict[str, _ChatSide], spec: ChatSpec) -> dict[str, Any]:
    turns = {name: [_chat_figures(turn) for turn in side.turns] for name, side in sides.items()}
    figures = {}
    for name, side in sides.items():
        first = spec.restart_turn if name == DISK else 0
        mine = [record for turn in side.turns[first:] for record in turn]
        base = [record for turn in sides[NO_CACHE].turns[first:] for record in turn]
        figures[name] = _chat_figures(mine)
        figures[name]["first_turn_counted"] = first + 1
        figures[name]["ttft_reduction"] = 1 - float(ttfts(mine).mean() / ttfts(base).mean())
        figures[name]["prefill_speedup"] = (
            figures[name]["prefill_throughput"] / _chat_figures(base)["prefill_throughput"]
        )
    flat = {name: [r for turn in side.turns for r in turn] for name, side in sides.items()}
    return {
        "sides": figures,
        "turns": turns,
        "restart_seconds": sides[DISK].restart_seconds,
        "num_answers": len(flat[NO_CACHE]),
        "differing_answers": {
            name: count_differing(flat[NO_CACHE], flat[name]) for name in CHAT_SIDES[1:]
        },
    }


def _chat_figures(records: Sequence[SteppedRecord]) -> dict[str, float]:
    figures = prefill_figures(records)
    throughput = figures["prefill_tokens_offered"] / float(ttfts(records).sum())
    return {**figures, "prefill_throughput": throughput}


def format_chat(result: dict[str, Any], spec: ChatSpec) -> str:
    """Part `chat` as two tables: each side over all turns, and each turn's TTFT."""
    rows = [
        (
            f"{name} (turns {side['first_turn_counted']}-{spec.num_turns})",
            f"{1000 * side['mean_ttft']:.0f}",
            f"{1000 * side['p99_ttft']:.0f}",
            f"{side['ttft_reduction']:.0%}",
            f"{side['prefill_throughput']:.0f}",
            f"{side['prefill_speedup']:.1f}x",
            f"{side['prefill_tokens_computed']} of {side['prefill_tokens_offered']}",
        )
        for name, side in result["sides"].items()
    ]
    paper = CACHED_ATTENTION
    rows.append(("CachedAttention's paper, up to", "", "", f"{paper['ttft_reduction']:.0%}", "",
                 f"{paper['prefill_speedup']}x", ""))  # fmt: skip
    header = (
        "chat", "mean TTFT ms", "p99 TTFT ms", "TTFT less", "prefill tokens/s", "prefill speed-up",
        "prefill tokens computed",
    )  # fmt: skip
    names = list(result["turns"])
    per_turn = [
        (
            str(turn + 1),
            *(f"{1000 * result['turns'][name][turn]['mean_ttft']:.0f}" for name in names),
        )
        for turn in range(spec.num_turns)
    ]
    same = "; ".join(
        f"{name}: {identity(count, result['num_answers'])}"
        for name, count in result["differing_answers"].items()
    )
    return (
        f"{spec.num_sessions} sessions of {spec.num_turns} turns, {spec.message_len} new tokens "
        f"and {spec.answer_len} answered per turn; the device has room for two sessions\n"
        f"{format_table(header, rows)}\n\n"
        f"{format_table(('mean TTFT ms of turn', *names), per_turn)}\n"
        f"restarted before turn {spec.restart_turn + 1}; answers beside those of {NO_CACHE}: {same}"
    )
