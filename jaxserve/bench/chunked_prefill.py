"""What a long prompt does to those who are being answered: chunked prefill, or prefill first.

Some streams decode steadily; then one long prompt arrives. Sides differ only in how the engine
fits it in:

* `budget N`: stall-free batching (Sarathi-Serve, Agrawal et al., OSDI 2024): every step decodes
  all streams, and a chunk of the prompt fills it up to N tokens;
* `tpot`: the same, with as many tokens as keep a step within a target time;
* `prefill first`: no decoding until the whole prompt is computed (as in Orca and early vLLM), in
  steps of the largest budget.

Figures, of one round; a side's are the medians over its rounds:

* gap: time between two tokens of one stream, as its client sees it.
* steady gap: the median gap before the prompt arrives.
* largest gap, mean gap: of all streams, over gaps that lie at least partly between the prompt's
  arrival and its first token.
* TTFT of the prompt: from its arrival to its first token.

The sides take turns; each has a round first that does not count, and where no target is given,
that of `tpot` is three times the steady gap of those rounds. Every round has tokens of its
own, and there is no prefix cache.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.sides import (
    BuildEngine,
    MakeDriver,
    identity,
    in_turns,
    require_positive,
    token_source,
)
from jaxserve.bench.stepping import Driver, SteppedRecord, TimedRequest, greedy
from jaxserve.bench.tables import format_table
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, JaxserveError

TPOT, PREFILL_FIRST = "tpot", "prefill first"
TPOT_FACTOR = 3.0  # default target, of the steady gap
_SMALLEST_CHUNK = 8  # the streams last while the prompt gets so many tokens per step, or more


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedPrefillSpec:
    """What to send and which sides there are.

    Attributes:
        num_streams: requests that decode when the prompt arrives.
        stream_prompt_len: tokens of each one's prompt.
        prompt_len: tokens of the prompt that arrives.
        steady_tokens: tokens that each stream has by then.
        answer_len: tokens answered to the prompt.
        budgets: fixed token budgets; the largest is also that of the other sides.
        tpot_ms: target of the side `tpot`, in milliseconds; None: from the first rounds.
        rounds: rounds that count.
        seed: of all tokens.

    Raises:
        ConfigError: a number is not positive, or a budget leaves no room beside the streams.
    """

    num_streams: int = 8
    stream_prompt_len: int = 32
    prompt_len: int = 2000
    steady_tokens: int = 16
    answer_len: int = 8
    budgets: tuple[int, ...] = (32, 64, 128, 256, 512)
    tpot_ms: float | None = None
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ConfigError("there must be at least one budget")
        least = self.num_streams + _SMALLEST_CHUNK
        if min(self.budgets) < least:
            raise ConfigError(
                f"a budget of {min(self.budgets)} leaves too little room for the prompt beside "
                f"{self.num_streams} streams; it must be at least {least}"
            )
        require_positive(self)

    @property
    def stream_len(self) -> int:
        """Tokens that each stream may generate: more than the rest of a round takes."""
        return self.steady_tokens + self.prompt_len // _SMALLEST_CHUNK + 2 * self.answer_len + 16


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round's figures in seconds, and its answers."""

    steady_gap: float
    largest_gap: float
    mean_gap: float
    ttft: float
    answers: tuple[tuple[int, ...], ...]  # the prompt's, then each stream's as far as it came


def side_configs(config: EngineConfig, spec: ChunkedPrefillSpec) -> dict[str, EngineConfig]:
    """The options of each side, by name; `tpot` still lacks its target."""
    streams = -(-(spec.stream_prompt_len + spec.stream_len) // config.page_size)
    prompt = -(-(spec.prompt_len + spec.answer_len) // config.page_size)
    common = dataclasses.replace(
        config,
        prefix_cache=False,
        num_pages=spec.num_streams * streams + prompt,
        max_num_seqs=spec.num_streams + 1,
        max_model_len=max(
            spec.prompt_len + spec.answer_len, spec.stream_prompt_len + spec.stream_len
        ),
        max_num_batched_tokens=max(spec.budgets),
        token_budget="fixed",
        prefill_first=False,
    )
    sides = {
        f"budget {budget}": dataclasses.replace(common, max_num_batched_tokens=budget)
        for budget in spec.budgets
    }
    sides[TPOT] = dataclasses.replace(common, token_budget="tpot")
    sides[PREFILL_FIRST] = dataclasses.replace(common, prefill_first=True)
    return sides


def measure_chunked_prefill(
    config: EngineConfig,
    spec: ChunkedPrefillSpec,
    *,
    build: BuildEngine,
    driver: MakeDriver = Driver,
    progress: bool = False,
) -> dict[str, Any]:
    """Run all sides in turns.

    Args:
        config: the engine's options; pool, limits and token budget are set here.
        spec: what to send.
        build: makes an engine.
        driver: steps it.
        progress: show a progress bar.

    Returns:
        `sides` by name, in seconds, `tpot_ms`, `num_answers` and `differing_answers`.
    """
    configs = side_configs(config, spec)
    rounds: dict[str, list[_Round]] = {name: [] for name in configs}
    sides: dict[str, Driver] = {}
    with tqdm(total=(spec.rounds + 1) * len(configs), desc="rounds", disable=not progress) as bar:

        def run(name: str, number: int) -> None:
            rounds[name].append(_run_round(sides[name], spec, number))
            bar.update()

        for name in configs:
            if name != TPOT:
                sides[name] = driver(build(configs[name]))
                run(name, 0)
        steady = np.median([mine[0].steady_gap for mine in rounds.values() if mine])
        target_ms = spec.tpot_ms or 1000 * TPOT_FACTOR * float(steady)
        sides[TPOT] = driver(build(dataclasses.replace(configs[TPOT], slo_tpot_ms=target_ms)))
        run(TPOT, 0)
        for number in range(1, spec.rounds + 1):
            for name in in_turns([*configs], number):
                run(name, number)
    figures = {name: _figures(mine[1:]) for name, mine in rounds.items()}
    first, *others = configs
    answers = {name: [a for r in mine for a in r.answers] for name, mine in rounds.items()}
    return {
        "sides": figures,
        "tpot_ms": target_ms,
        "num_answers": len(answers[first]),
        "differing_answers": {
            name: sum(
                any(x != y for x, y in zip(a, b, strict=False))
                for a, b in zip(answers[first], answers[name], strict=True)
            )
            for name in others
        },
    }


def _run_round(driver: Driver, spec: ChunkedPrefillSpec, number: int) -> _Round:
    source = token_source(driver)
    rng = np.random.default_rng([spec.seed, number])

    def add(name: str, prompt_len: int, answer_len: int) -> SteppedRecord:
        return driver.add(
            TimedRequest(
                request_id=f"round{number}-{name}",
                prompt_token_ids=source.draw(rng, prompt_len).tolist(),
                params=greedy(answer_len),
                arrival=driver.now(),
            )
        )

    streams = [
        add(f"stream{i}", spec.stream_prompt_len, spec.stream_len) for i in range(spec.num_streams)
    ]
    while min(stream.output_len for stream in streams) < spec.steady_tokens:
        driver.step()
    prompt = add("prompt", spec.prompt_len, spec.answer_len)
    while not prompt.is_complete:
        driver.step()
    if any(stream.is_complete for stream in streams):
        raise JaxserveError(
            f"the streams' {spec.stream_len} tokens were over before the prompt was answered: "
            "the engine gave it fewer tokens per step than it could have; raise --tpot-ms"
        )
    driver.stop()
    answers = tuple(tuple(record.token_ids) for record in (prompt, *streams))
    return _Round(*_gaps(streams, prompt), answers)


def _gaps(
    streams: Sequence[SteppedRecord], prompt: SteppedRecord
) -> tuple[float, float, float, float]:
    """Steady, largest and mean gap, and the prompt's TTFT, in seconds."""
    steady: list[float] = []
    during: list[float] = []
    first_token = prompt.delta_times[0]
    for stream in streams:
        times = stream.delta_times
        for before, after in itertools.pairwise(times):
            if after <= prompt.start:
                steady.append(after - before)
            elif before < first_token:
                during.append(after - before)
    return (
        float(np.median(steady)), max(during), float(np.mean(during)), first_token - prompt.start,
    )  # fmt: skip


def _figures(rounds: Sequence[_Round]) -> dict[str, float]:
    figures = {
        name: float(np.median([getattr(each, name) for each in rounds]))
        for name in ("steady_gap", "largest_gap", "mean_gap", "ttft")
    }
    return {**figures, "worst_gap": max(each.largest_gap for each in rounds)}


def format_chunked_prefill(result: dict[str, Any], spec: ChunkedPrefillSpec) -> str:
    """The sides as a table."""
    against = result["sides"][PREFILL_FIRST]["largest_gap"]
    rows = [
        (
            f"tpot {result['tpot_ms']:.0f} ms" if name == TPOT else name,
            f"{1000 * side['steady_gap']:.0f}",
            f"{1000 * side['mean_gap']:.0f}",
            f"{1000 * side['largest_gap']:.0f}",
            f"{1000 * side['worst_gap']:.0f}",
            f"{against / side['largest_gap']:.1f}x",
            f"{1000 * side['ttft']:.0f}",
        )
        for name, side in result["sides"].items()
    ]
    header = (
        "side", "steady gap ms", "mean gap ms", "largest gap ms", "worst round's", "smaller by",
        "prompt's TTFT ms",
    )  # fmt: skip
    differing = sum(result["differing_answers"].values())
    same = identity(differing, result["num_answers"] * len(result["differing_answers"]))
    return (
        f"{spec.num_streams} streams decode, a prompt of {spec.prompt_len} tokens arrives; medians "
        f"of {spec.rounds} rounds\n{format_table(header, rows)}\n"
        f"answers beside those of the first side, as far as both came: {same}"
    )
