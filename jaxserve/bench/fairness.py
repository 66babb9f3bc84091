"""Two tenants, one of which sends ten times as much: who is served, under `vtc` and `fcfs`.

All requests are there from the start, in random order, ten of the heavy tenant to one of the
light one, so that both are backlogged until one of them has nothing waiting any more. Sides
take turns.

Figures:

* service: what a tenant has received, in weighted tokens as the Virtual Token Counter counts them
  (Sheng et al., OSDI 2024): 1 per prompt token, 2 per answer token. A prompt counts when its
  first answer token comes.
* backlogged: a tenant is, while a request of it waits for its first token.
* difference in service: over all stretches of time in which both are backlogged, the largest
  difference between what the two received in it. With D the service of the heavy tenant less that
  of the light one, that is D's largest value less its smallest.
* the proven bound on it under VTC: 2 * max(1 * longest prompt, 2 * tokens of a full batch). A full
  batch here is `max_num_seqs` requests with all their tokens, or the KV pool, if that is less.
* tokens/s: prompt and answer tokens of all requests, over the whole run: what fairness costs.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxserve.bench.settings import FairnessSpec
from jaxserve.bench.sides import Sides, differing_answers, identity, token_source
from jaxserve.bench.stepping import Driver, RunResult, SteppedRecord, TimedRequest, greedy
from jaxserve.bench.tables import Result, tabulate
from jaxserve.core.config import EngineConfig
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.outputs import ModelInfo
from jaxserve.scheduling.tenant_accounts import ANSWER_PRICE, PROMPT_PRICE

LIGHT, HEAVY = "light", "heavy"
POLICIES = ("vtc", "fcfs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FairnessFigures:
    """One policy's figures over all rounds; see the module.

    Attributes:
        curve: seconds, and what the light and the heavy tenant had received by then, of the
            first round.
    """

    difference: float
    backlogged_seconds: float
    light_service: float
    heavy_service: float
    token_throughput: float
    curve: list[tuple[float, float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FairnessResult(Result):
    """Both policies, the bound proven for vtc, and how many answers they do not agree on."""

    spec: FairnessSpec
    bound: float
    sides: dict[str, FairnessFigures]
    num_answers: int
    differing_answers: int

    def __str__(self) -> str:
        spec, sides = self.spec, self.sides
        table = tabulate("policy", sides, {
            "difference in service": lambda side: f"{side.difference:.0f}",
            "of the bound": lambda side: f"{side.difference / self.bound:.2f}",
            "light per s": lambda side: f"{side.light_service / side.backlogged_seconds:.0f}",
            "heavy per s": lambda side: f"{side.heavy_service / side.backlogged_seconds:.0f}",
            "both backlogged s": lambda side: f"{side.backlogged_seconds / spec.rounds:.1f}",
            "tokens/s": lambda side: f"{side.token_throughput:.1f}",
        })  # fmt: skip
        vtc, fcfs = (sides[name].token_throughput for name in POLICIES)
        return (
            f"two tenants, {spec.light_requests} and {spec.light_requests * spec.ratio} requests "
            f"of {spec.input_len} tokens in and {spec.output_len} out, {spec.rounds} rounds; the "
            f"proven bound is {self.bound:.0f} weighted tokens\n{table}\n"
            f"vtc's throughput is {vtc / fcfs:.1%} of fcfs's; "
            f"{identity(self.differing_answers, self.num_answers)}"
        )


@dataclasses.dataclass(frozen=True)
class ServicePoint:
    """What both tenants have received at one time, in weighted tokens."""

    seconds: float
    light: float
    heavy: float


class ServiceMeter:
    """Follows what the tenants receive, for as long as both are backlogged.

    Args:
        waiting: requests of each tenant, all of them there from the start.

    Attributes:
        points: one per step that somebody received something in, the start included.
    """

    def __init__(self, waiting: dict[str, int]) -> None:
        self.points = [ServicePoint(0.0, 0.0, 0.0)]
        self._waiting = dict(waiting)
        self._service = dict.fromkeys(waiting, 0.0)

    def take(self, tenants: dict[str, str], changed: Sequence[SteppedRecord]) -> None:
        """Count one step.

        Args:
            tenants: each request's tenant, by request id.
            changed: the records that it gave a token.
        """
        if not changed or not all(self._waiting.values()):
            return
        for record in changed:
            tenant = tenants[record.request_id]
            self._service[tenant] += ANSWER_PRICE * record.delta_tokens[-1]
            if len(record.delta_times) == 1:
                self._service[tenant] += PROMPT_PRICE * record.prompt_len
                self._waiting[tenant] -= 1
        now = changed[0].delta_times[-1]
        self.points.append(ServicePoint(now, self._service[LIGHT], self._service[HEAVY]))

    @property
    def difference(self) -> float:
        """The largest difference in service over any stretch of time; see the module."""
        ahead = [point.heavy - point.light for point in self.points]
        return max(ahead) - min(ahead)


def proven_bound(info: ModelInfo, spec: FairnessSpec) -> float:
    """The paper's bound on the difference between two backlogged tenants, in weighted tokens."""
    batch = min(info.max_num_seqs * spec.request_len, info.num_pages * info.page_size)
    return 2 * max(PROMPT_PRICE * spec.input_len, ANSWER_PRICE * batch)


def measure_fairness(config: EngineConfig, spec: FairnessSpec, sides: Sides) -> FairnessResult:
    """Run both policies in turns, each on an engine of its own.

    Args:
        config: the engine's options; pool, context and policy are set here.
        spec: what to send.
        sides: runs the engines.
    """
    pages = config.max_num_seqs * -(-spec.request_len // config.page_size)
    config = dataclasses.replace(
        config,
        prefix_cache=False,
        num_pages=pages,
        max_model_len=spec.request_len,
        max_waiting=max(config.max_waiting, spec.num_requests),
    )
    drivers = sides.open({name: dataclasses.replace(config, policy=name) for name in POLICIES})
    runs = sides.take_turns(
        POLICIES, spec.rounds, lambda name, number: _run(drivers[name], spec, number)
    )
    answers = {
        name: [r.token_ids for result, _ in mine for r in _by_id(result)]
        for name, mine in runs.items()
    }
    return FairnessResult(
        spec=spec,
        bound=proven_bound(drivers[POLICIES[0]].engine.info, spec),
        sides={name: _figures(mine) for name, mine in runs.items()},
        num_answers=len(answers[POLICIES[0]]),
        differing_answers=sum(differing_answers(answers).values()),
    )


def _run(driver: Driver, spec: FairnessSpec, number: int) -> tuple[RunResult, ServiceMeter]:
    source = token_source(driver)
    rng = np.random.default_rng([spec.seed, number])
    owners = [LIGHT] + [HEAVY] * spec.ratio
    order = [owner for _ in range(spec.light_requests) for owner in rng.permutation(owners)]
    start = driver.now()
    requests = [
        TimedRequest(
            request_id=f"round{number}-{i}",
            prompt_token_ids=source.draw(rng, spec.input_len).tolist(),
            params=greedy(spec.output_len),
            service=ServiceParams(tenant=str(owner)),
            arrival=start,
        )
        for i, owner in enumerate(order)
    ]
    tenants = {request.request_id: request.service.tenant for request in requests}
    waiting = {LIGHT: spec.light_requests, HEAVY: spec.light_requests * spec.ratio}
    meter = ServiceMeter(waiting)
    result = driver.run(requests, on_step=lambda changed: meter.take(tenants, changed))
    begin = result.records[0].start
    meter.points = [
        dataclasses.replace(point, seconds=max(0.0, point.seconds - begin))
        for point in meter.points
    ]
    return result, meter


def _by_id(result: RunResult) -> list[SteppedRecord]:
    return sorted(result.records, key=lambda record: record.request_id)


def _figures(runs: Sequence[tuple[RunResult, ServiceMeter]]) -> FairnessFigures:
    tokens = sum(r.prompt_len + r.output_len for result, _ in runs for r in result.records)
    last = [meter.points[-1] for _, meter in runs]
    return FairnessFigures(
        difference=max(meter.difference for _, meter in runs),
        backlogged_seconds=sum(point.seconds for point in last),
        light_service=sum(point.light for point in last),
        heavy_service=sum(point.heavy for point in last),
        token_throughput=tokens / sum(result.duration for result, _ in runs),
        curve=[dataclasses.astuple(point) for point in runs[0][1].points],
    )
