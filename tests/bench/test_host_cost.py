"""`bench host-cost`: a steady load for the host alone."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jaxserve.bench import host_cost
from jaxserve.bench.host_cost import HostCostSpec, format_host_costs, measure_host_cost
from jaxserve.cli.bench_host_cost import host_cost as command
from jaxserve.core.errors import ConfigError
from jaxserve.core.step import StepPlan
from jaxserve.scheduling.scheduler import Scheduler

SPEC = HostCostSpec(num_running=8, prompt_len=30, output_len=6, page_size=4, num_steps=20)


def test_slots_and_queue_stay_full(monkeypatch: pytest.MonkeyPatch):
    running, waiting = [], []

    class Watched(Scheduler):
        def plan(self, now: float) -> StepPlan | None:
            waiting.append(self.num_waiting)
            plan = super().plan(now)
            running.append(self.num_running)
            self.check()
            return plan

    monkeypatch.setattr(host_cost, "Scheduler", Watched)
    cost = measure_host_cost("fcfs", 50, SPEC)
    assert len(cost.plan) == len(cost.pack) == len(cost.commit) == 20
    assert (cost.total > 0).all()
    assert cost.total == pytest.approx(cost.plan + cost.pack + cost.commit)
    assert set(running[-20:]) == {SPEC.num_running} and set(waiting[-20:]) == {50}
    assert len(running) > 20, "the steps that filled the slots were timed, too"


def test_a_load_that_is_never_steady_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_cost, "MAX_WARM_UP_STEPS", 50)
    spec = HostCostSpec(num_running=64, prompt_len=2000, output_len=1, num_steps=5)
    with pytest.raises(ConfigError, match="64 requests do not run at once"):
        measure_host_cost("fcfs", 5, spec)


def test_the_table_shows_the_step_it_hides_behind():
    costs = [measure_host_cost("fcfs", count, SPEC) for count in (1, 30)]
    text = format_host_costs(costs, SPEC, 0.05)
    assert "A step of 8 rows keeps the device busy for 50.0 ms" in text
    assert [line.split()[:2] for line in text.splitlines()[3:5]] == [["fcfs", "1"], ["fcfs", "30"]]
    assert "device" not in format_host_costs(costs, SPEC, None)


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
        (["--policies", "no-such"], "unknown policy 'no-such'"),
        (["--running", "0"], "num_running must be at least 1"),
        (["--waiting", "0"], "at least 1 request must wait"),
    ):
        result = CliRunner().invoke(command, [*arguments, "--step-ms", "1"])
        assert result.exit_code in (1, 2) and message in result.output
    with pytest.raises(ConfigError, match="num_steps"):
        HostCostSpec(num_steps=0)
