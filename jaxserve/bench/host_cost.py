"""What the host does per step beside the device: plan, pack and commit, by requests waiting.

The real scheduler, policies and packing, no device: its answers are made up, since their values
change nothing. The claim is that a step costs the host the same however many requests wait.
"""

import dataclasses
import random
import time
from collections import deque

import numpy as np

from jaxserve.bench.settings import HostCostSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.step_time import measure_engine
from jaxserve.bench.tables import Result, format_table
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.packing import Packer
from jaxserve.scheduling.build import build_scheduler
from jaxserve.scheduling.policies import POLICIES

PARTS = ("plan", "pack", "commit", "total")
MAX_WARM_UP_STEPS = 500
STEP_SECONDS = 0.02  # how far the scheduler's clock moves per step
NUM_TENANTS, NUM_PREFIXES, PREFIX_LEN = 8, 16, 128
CONTEXT_LEN = 128  # of the device's rows: 256 of them fit the default pool of a CPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCost:
    """Microseconds per step of each part and of all, by policy and requests in the queue."""

    policy: str
    num_waiting: int
    median_plan_us: float
    p99_plan_us: float
    median_pack_us: float
    p99_pack_us: float
    median_commit_us: float
    p99_commit_us: float
    median_total_us: float
    p99_total_us: float

    @classmethod
    def of(cls, policy: str, num_waiting: int, seconds: np.ndarray) -> "HostCost":
        """The figures of timed steps, `seconds`: float64 [steps, 3] of plan, pack and commit."""
        columns = np.column_stack([seconds, seconds.sum(axis=1)]) * 1e6
        figures = {}
        for part, mine in zip(PARTS, columns.T, strict=True):
            figures[f"median_{part}_us"] = float(np.median(mine))
            figures[f"p99_{part}_us"] = float(np.percentile(mine, 99))
        return cls(policy=policy, num_waiting=num_waiting, **figures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCostResult(Result):
    """All costs, and the device's time per step that hides them."""

    num_running: int
    step_ms: float
    costs: list[HostCost]

    def __str__(self) -> str:
        rows = []
        for cost in self.costs:
            fields = vars(cost)
            cells = (f"{fields[f'median_{p}_us']:.0f} / {fields[f'p99_{p}_us']:.0f}" for p in PARTS)
            rows.append((cost.policy, str(cost.num_waiting), *cells))
        worst = max(cost.median_total_us for cost in self.costs)
        return (
            f"{self.num_running} running requests; microseconds per step, median / p99\n"
            f"{format_table(('policy', 'waiting', *PARTS), rows)}\n"
            f"A step of {self.num_running} rows keeps the device busy for {self.step_ms:.1f} ms; "
            f"the largest median of the host's is {worst / self.step_ms / 10:.1f} % of that."
        )


def measure_host_costs(config: EngineConfig, spec: HostCostSpec, sides: Sides) -> HostCostResult:
    """Measure every policy with every number of requests waiting, and the device's step.

    Args:
        config: the page size, the seed, and the model whose step is timed if none is given.
        spec: the load.
        sides: runs the engine whose step is timed.

    Raises:
        ConfigError: see `measure_host_cost`.
    """
    names = spec.policies or sorted(POLICIES)
    cases = [(name, num_waiting) for name in names for num_waiting in spec.waiting]
    costs = sides.take_turns(cases, 1, lambda case, _: measure_host_cost(config, *case, spec))
    step_ms = spec.step_ms or _measured_step(config, spec.num_running, sides) * 1e3
    return HostCostResult(
        num_running=spec.num_running, step_ms=step_ms, costs=[cost for (cost,) in costs.values()]
    )


def _measured_step(config: EngineConfig, num_rows: int, sides: Sides) -> float:
    """Seconds of the model's decode step of so many rows."""
    config = dataclasses.replace(
        config,
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows,
        max_model_len=CONTEXT_LEN,
        token_buckets=str(num_rows),  # the only program that is wanted
        row_buckets=str(num_rows),
    )
    with sides.alone(config) as driver:
        return measure_engine(driver.engine, [num_rows], CONTEXT_LEN)[num_rows]


def measure_host_cost(
    config: EngineConfig, policy: str, num_waiting: int, spec: HostCostSpec
) -> HostCost:
    """Fill the slots and the queue, then time the steady state.

    Raises:
        ConfigError: no such policy, or the slots never fill up: answers are so short that the
            budget does not suffice for the prompts of those that follow.
    """
    load = _SteadyLoad(config, policy, num_waiting, spec)
    for _ in range(MAX_WARM_UP_STEPS):
        load.step()
        if load.is_steady:
            break
    # A policy that puts newcomers first (mlfq) fills the budget with prompts for ever.
    if load.is_full:
        seconds = np.array([load.step() for _ in range(spec.num_steps)])
        return HostCost.of(policy, num_waiting, seconds)
    raise ConfigError(
        f"{spec.num_running} requests do not run at once with prompts of {spec.prompt_len} and "
        f"answers of {spec.output_len} tokens; make the answers longer"
    )


class _SteadyLoad:
    """A scheduler whose slots and queue are always full, and the loop around it.

    As in the engine with overlap, a step is planned before the one before it is committed.
    """

    def __init__(
        self, config: EngineConfig, policy: str, num_waiting: int, spec: HostCostSpec
    ) -> None:
        self._spec, self._num_waiting = spec, num_waiting
        self._random = random.Random(config.seed)
        self._prefixes = [self._random.randbytes(PREFIX_LEN) for _ in range(NUM_PREFIXES)]
        pages = -(-spec.max_model_len // config.page_size)
        config = dataclasses.replace(
            config,
            policy=policy,
            length_predictor="oracle",  # each request says how long it is taken to be
            num_pages=(pages + 1) * spec.num_running,
            max_num_seqs=spec.num_running,
            max_num_batched_tokens=spec.max_tokens_per_step,
            max_model_len=spec.max_model_len,
            max_waiting=num_waiting + spec.num_running,
        )
        buckets = Buckets.of_config(config, max_model_len=spec.max_model_len)
        self._packer = Packer(buckets, 1)
        self.scheduler = build_scheduler(config, step_sizes=buckets.tokens)
        self._now, self._num_requests = 0.0, 0
        self._in_flight: deque[StepPlan] = deque()
        self.is_full = False  # all slots are taken
        self.is_steady = False  # ... and prompts do not fill the budget
        for _ in range(spec.num_running):
            # They end spread out over time, as in a server that has run for long.
            self._add(self._random.randint(1, spec.output_len))
        while self.scheduler.num_waiting < num_waiting + spec.num_running:
            self._add(spec.output_len)

    def _add(self, output_len: int) -> None:
        spec, draw = self._spec, self._random
        prompt = (draw.choice(self._prefixes) + draw.randbytes(spec.prompt_len))[: spec.prompt_len]
        self._num_requests += 1
        request = Request(
            request_id=str(self._num_requests),
            prompt_token_ids=list(prompt),
            params=SamplingParams(temperature=0.7, max_tokens=output_len),
            service=ServiceParams(
                tenant=str(draw.randrange(NUM_TENANTS)), priority=draw.randrange(3)
            ),
            max_tokens=output_len,
            seed=draw.getrandbits(32),
            arrival_time=self._now,
        )
        request.predicted_len = output_len * draw.uniform(0.5, 2.0)
        self.scheduler.add(request)

    def step(self) -> tuple[float, float, float]:
        """One turn of the loop; seconds of plan, pack, commit."""
        self._now += STEP_SECONDS
        marks = [time.perf_counter()]
        plan = self.scheduler.plan(self._now)
        marks.append(time.perf_counter())
        assert plan is not None  # there is always more work
        self._packer.pack(plan)
        marks.append(time.perf_counter())
        self._in_flight.append(plan)
        self.is_full = self.scheduler.num_running == self._spec.num_running
        self.is_steady = self.is_full and plan.num_tokens < self._spec.max_tokens_per_step
        commit = self._commit() if len(self._in_flight) > 1 else 0.0
        return marks[1] - marks[0], marks[2] - marks[1], commit

    def _commit(self) -> float:
        plan = self._in_flight.popleft()
        result = StepResult(np.zeros(len(plan.rows), np.int32))
        finished = {row.key: FinishReason.LENGTH for row in plan.rows if self._ends(row.key)}
        start = time.perf_counter()
        self.scheduler.commit(plan, result, finished)
        seconds = time.perf_counter() - start
        while self.scheduler.num_waiting < self._num_waiting:
            self._add(self._spec.output_len)
        return seconds

    def _ends(self, key: int) -> bool:
        request = self.scheduler.get_by_key(key)
        return request is not None and len(request.output_token_ids) + 1 >= request.max_tokens
