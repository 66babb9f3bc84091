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

import numpy as np

from jaxserve.bench.settings import ChunkedPrefillSpec
from jaxserve.bench.sides import Sides, differing_answers, identity, token_source
from jaxserve.bench.stepping import Driver, SteppedRecord, TimedRequest, greedy
from jaxserve.bench.tables import Result, tabulate
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import JaxserveError

TPOT, PREFILL_FIRST = "tpot", "prefill first"
TPOT_FACTOR = 3.0  # default target, of the steady gap


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedPrefillFigures:
    """A side's medians over its rounds, in seconds, and the worst round's largest gap."""

    steady_gap: float
    largest_gap: float
    mean_gap: float
    ttft: float
    worst_gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedPrefillResult(Result):
    """All sides by name, the target of `tpot`, and by side the answers that the first has not."""

    spec: ChunkedPrefillSpec
    sides: dict[str, ChunkedPrefillFigures]
    tpot_ms: float
    num_answers: int
    differing_answers: dict[str, int]

    def __str__(self) -> str:
        spec, against = self.spec, self.sides[PREFILL_FIRST].largest_gap
        names = {TPOT: f"tpot {self.tpot_ms:.0f} ms"}
        sides = {names.get(name, name): side for name, side in self.sides.items()}
        table = tabulate("side", sides, {
            "steady gap ms": lambda side: f"{1000 * side.steady_gap:.0f}",
            "mean gap ms": lambda side: f"{1000 * side.mean_gap:.0f}",
            "largest gap ms": lambda side: f"{1000 * side.largest_gap:.0f}",
            "worst round's": lambda side: f"{1000 * side.worst_gap:.0f}",
            "smaller by": lambda side: f"{against / side.largest_gap:.1f}x",
            "prompt's TTFT ms": lambda side: f"{1000 * side.ttft:.0f}",
        })  # fmt: skip
        differing = sum(self.differing_answers.values())
        same = identity(differing, self.num_answers * len(self.differing_answers))
        return (
            f"{spec.num_streams} streams decode, a prompt of {spec.prompt_len} tokens arrives; "
            f"medians of {spec.rounds} rounds\n{table}\n"
            f"answers beside those of the first side, as far as both came: {same}"
        )


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
    config: EngineConfig, spec: ChunkedPrefillSpec, sides: Sides
) -> ChunkedPrefillResult:
    """Run all sides in turns.

    Args:
        config: the engine's options; pool, limits and token budget are set here.
        spec: what to send.
        sides: runs the engines.
    """
    configs = side_configs(config, spec)
    tpot = configs[TPOT]
    drivers = sides.open({name: side for name, side in configs.items() if name != TPOT})

    def run(name: str, number: int) -> _Round:
        return _run_round(drivers[name], spec, number)

    first = sides.take_turns([*drivers], 1, run)
    steady = np.median([mine[0].steady_gap for mine in first.values()])
    target_ms = spec.tpot_ms or 1000 * TPOT_FACTOR * float(steady)
    drivers |= sides.open({TPOT: dataclasses.replace(tpot, slo_tpot_ms=target_ms)})
    first[TPOT] = [run(TPOT, 0)]
    rounds = sides.take_turns([*configs], spec.rounds, lambda name, n: run(name, n + 1))
    answers = {
        name: [a for each in (*first[name], *mine) for a in each.answers]
        for name, mine in rounds.items()
    }
    return ChunkedPrefillResult(
        spec=spec,
        sides={name: _figures(mine) for name, mine in rounds.items()},
        tpot_ms=target_ms,
        num_answers=len(answers[TPOT]),
        differing_answers=differing_answers(answers, cut=True),
    )


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


def _figures(rounds: Sequence[_Round]) -> ChunkedPrefillFigures:
    medians = {
        name: float(np.median([getattr(each, name) for each in rounds]))
        for name in ("steady_gap", "largest_gap", "mean_gap", "ttft")
    }
    return ChunkedPrefillFigures(**medians, worst_gap=max(each.largest_gap for each in rounds))
