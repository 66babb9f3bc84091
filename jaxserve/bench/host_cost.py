"""What the host does per step beside the device: plan, pack and commit, by requests waiting.

The real scheduler, policies and packing, no device: its answers are made up, since their values
change nothing. The claim is that a step costs the host the same however many requests wait.
"""

import dataclasses
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.bench.tables import format_table
from jaxserve.cache.page_pool import PagePool
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.packing import Packer
from jaxserve.scheduling.policies import PolicySettings, make_policy
from jaxserve.scheduling.scheduler import Scheduler

PARTS = ("plan", "pack", "commit")
MAX_WARM_UP_STEPS = 500
STEP_SECONDS = 0.02  # how far the scheduler's clock moves per step
NUM_TENANTS, NUM_PREFIXES, PREFIX_LEN = 8, 16, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCostSpec:
    """The load under which the host is measured.

    Attributes:
        num_running: requests that decode at the same time.
        prompt_len, output_len: tokens; an answer ends with the step that brings its last one,
            and another request takes its place.
        page_size: tokens per KV page.
        num_steps: steps that are timed.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a number is not positive.
    """

    num_running: int = 256
    prompt_len: int = 400
    output_len: int = 512
    page_size: int = 64
    num_steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("num_running", "prompt_len", "output_len", "page_size", "num_steps"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")

    @property
    def max_tokens_per_step(self) -> int:
        """A budget that leaves newcomers' prompts room beside all decodes."""
        return self.num_running + max(1024, self.prompt_len)

    @property
    def max_model_len(self) -> int:
        """Room for every prompt and its answer."""
        return self.prompt_len + self.output_len + 1


@dataclasses.dataclass(frozen=True)
class HostCost:
    """Seconds of each part of every timed step, float64 [steps].

    Attributes:
        policy: the scheduling policy.
        num_waiting: requests in the queue all along.
        plan, pack, commit: the parts.
    """

    policy: str
    num_waiting: int
    plan: np.ndarray
    pack: np.ndarray
    commit: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """All parts together."""
        return self.plan + self.pack + self.commit

    def to_dict(self) -> dict[str, Any]:
        """Medians and 99th percentiles in microseconds."""
        fields: dict[str, Any] = {"policy": self.policy, "num_waiting": self.num_waiting}
        for part in (*PARTS, "total"):
            seconds = getattr(self, part)
            fields[f"median_{part}_us"] = float(np.median(seconds)) * 1e6
            fields[f"p99_{part}_us"] = float(np.percentile(seconds, 99)) * 1e6
        return fields


def measure_host_cost(policy: str, num_waiting: int, spec: HostCostSpec) -> HostCost:
    """Fill the slots and the queue, then time the steady state.

    Raises:
        ConfigError: no such policy, nobody waits, or the slots never fill up: answers are so
            short that the budget does not suffice for the prompts of those that follow.
    """
    if num_waiting < 1:
        raise ConfigError(f"at least 1 request must wait to take the next slot, got {num_waiting}")
    load = _SteadyLoad(policy, num_waiting, spec)
    for _ in range(MAX_WARM_UP_STEPS):
        load.step()
        if load.is_steady:
            break
    # A policy that puts newcomers first (mlfq) fills the budget with prompts for ever.
    if load.is_full:
        return load.measure(spec.num_steps)
    raise ConfigError(
        f"{spec.num_running} requests do not run at once with prompts of {spec.prompt_len} and "
        f"answers of {spec.output_len} tokens; make the answers longer"
    )


class _SteadyLoad:
    """A scheduler whose slots and queue are always full, and the loop around it.

    As in the engine with overlap, a step is planned before the one before it is committed.
    """

    def __init__(self, policy: str, num_waiting: int, spec: HostCostSpec) -> None:
        self._spec, self._policy, self._num_waiting = spec, policy, num_waiting
        self._random = random.Random(spec.seed)
        self._prefixes = [self._random.randbytes(PREFIX_LEN) for _ in range(NUM_PREFIXES)]
        buckets = Buckets.for_limits(
            max_tokens=spec.max_tokens_per_step,
            max_rows=spec.num_running,
            max_model_len=spec.max_model_len,
            page_size=spec.page_size,
        )
        self._packer = Packer(buckets, 1)
        self.scheduler = Scheduler(
            page_pools=[PagePool((buckets.max_pages + 1) * spec.num_running)],
            page_size=spec.page_size,
            max_num_seqs=spec.num_running,
            max_num_batched_tokens=spec.max_tokens_per_step,
            max_model_len=spec.max_model_len,
            max_waiting=num_waiting + spec.num_running,
            policy=make_policy(policy, PolicySettings(page_size=spec.page_size)),
        )
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

    def measure(self, num_steps: int) -> HostCost:
        """Time so many steps."""
        seconds = np.array([self.step() for _ in range(num_steps)])
        return HostCost(self._policy, self._num_waiting, *seconds.T)


def format_host_costs(
    costs: Sequence[HostCost], spec: HostCostSpec, step_seconds: float | None
) -> str:
    """A table, microseconds as median / 99th percentile, and the step that hides it all."""
    columns = (*PARTS, "total")
    rows = []
    for cost in costs:
        fields = cost.to_dict()
        cells = (f"{fields[f'median_{c}_us']:.0f} / {fields[f'p99_{c}_us']:.0f}" for c in columns)
        rows.append((cost.policy, str(cost.num_waiting), *cells))
    table = format_table(("policy", "waiting", *columns), rows)
    text = f"{spec.num_running} running requests; microseconds per step, median / p99\n{table}"
    if step_seconds is not None:
        worst = max(float(np.median(cost.total)) for cost in costs)
        text += (
            f"\nA step of {spec.num_running} rows keeps the device busy for "
            f"{step_seconds * 1e3:.1f} ms; the largest median of the host's is "
            f"{100 * worst / step_seconds:.1f} % of that."
        )
    return text
