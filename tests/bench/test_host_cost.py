"""`bench host-cost`: a steady load for the host alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve.bench import host_cost
from jaxserve.bench.host_cost import HostCost, HostCostResult, measure_host_cost
from jaxserve.bench.settings import HostCostSpec
from jaxserve.cli.bench_engine import host_cost as command
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.step import StepPlan
from jaxserve.scheduling.scheduler import Scheduler

CONFIG = EngineConfig(page_size=4)
SPEC = HostCostSpec(num_running=8, prompt_len=30, output_len=6, num_steps=20)


def test_slots_and_queue_stay_full(monkeypatch: pytest.MonkeyPatch):
    running, waiting = [], []

    class Watched(Scheduler):
        def plan(self, now: float) -> StepPlan | None:
            waiting.append(self.num_waiting)
            plan = super().plan(now)
            running.append(self.num_running)
            self.check()
            return plan

    monkeypatch.setattr("jaxserve.scheduling.build.Scheduler", Watched)
    cost = measure_host_cost(CONFIG, "fcfs", 50, SPEC)
    parts = cost.median_plan_us, cost.median_pack_us, cost.median_commit_us
    assert 0 < max(parts) < cost.median_total_us <= cost.p99_total_us
    assert set(running[-20:]) == {SPEC.num_running} and set(waiting[-20:]) == {50}
    assert len(running) > 20, "the steps that filled the slots were timed, too"


def test_a_load_that_is_never_steady_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_cost, "MAX_WARM_UP_STEPS", 50)
    spec = HostCostSpec(num_running=64, prompt_len=2000, output_len=1, num_steps=5)
    with pytest.raises(ConfigError, match="64 requests do not run at once"):
        measure_host_cost(CONFIG, "fcfs", 5, spec)


def test_the_table_shows_the_step_it_hides_behind():
    seconds = np.array([[1, 2, 3], [2, 4, 6], [9, 9, 9]]) * 1e-6
    costs = [HostCost.of("fcfs", count, seconds) for count in (1, 30)]
    assert [costs[0].median_plan_us, costs[0].median_total_us] == [2, 12]
    assert costs[0].p99_total_us == pytest.approx(12 + 0.98 * 15)
    text = str(HostCostResult(num_running=8, step_ms=50.0, costs=costs))
    assert "A step of 8 rows keeps the device busy for 50.0 ms" in text
    assert [line.split()[:2] for line in text.splitlines()[3:5]] == [["fcfs", "1"], ["fcfs", "30"]]
    assert "is 0.0 % of that" in text


def test_the_command(tmp_path: Path):
    out = tmp_path / "o.json"
    arguments = [
        "--policies", "fcfs", "--waiting", "5,20", "--running", "4", "--input-len", "10",
        "--output-len", "5", "--num-steps", "5", "--step-ms", "40", "--output-json", str(out),
    ]  # fmt: skip
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    fields = json.loads(out.read_text())
    assert fields["step_ms"] == 40 and [c["num_waiting"] for c in fields["costs"]] == [5, 20]
    assert fields["costs"][0]["median_total_us"] > 0


def test_bad_options_end_with_a_message():
    for arguments, message in (
        (["--policies", "no-such"], "got no-such"),
        (["--running", "0"], "--running must be positive"),
        (["--waiting", "0"], "--waiting must be positive"),
    ):
        result = CliRunner().invoke(command, [*arguments, "--step-ms", "1"])
        assert result.exit_code == 2 and message in result.output
    with pytest.raises(ConfigError, match="num_steps"):
        HostCostSpec(num_steps=0)
