"""The Grafana dashboard asks for metrics that there are."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from jaxserve.runner.buckets import Buckets
from jaxserve.server.metrics.endpoint import Metrics
from jaxserve.testing.fake_engine import fake_engine
from tests.server.exposition import samples

ROOT = Path(__file__).parents[2]
FILE = ROOT / "jaxserve/server/dashboards/jaxserve.json"


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(FILE.read_text())


def queries(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


@pytest.mark.parametrize("names", ["jaxserve", "vllm"])
def test_every_metric_that_it_names_is_served(dashboard: dict, names: str) -> None:
    metrics = Metrics("vllm" if names == "vllm" else "none")
    engine = fake_engine()
    try:
        engine.records._buckets = Buckets((4, 16), (1,), max_rows=1, max_pages=1)
        metrics.attach(engine)
        served = {name for name, *_ in samples(generate_latest(metrics.registry).decode())}
    finally:
        engine.shutdown()
    variables = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    asked = set()
    for query in queries(dashboard) + variables:
        asked |= set(re.findall(r"\w+:\w+", query.replace("${names}", names)))
    assert len(asked) > 40
    assert asked <= served


def test_labels_are_those_of_the_metrics(dashboard: dict) -> None:
    labels = {label for query in queries(dashboard) for label in re.findall(r"by \((\w+)\)", query)}
    assert labels == {"le", "finished_reason", "state", "bucket", "phase", "tier"}
    for query in queries(dashboard):
        assert 'model_name="$model_name"' in query
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_panels_do_not_lie_on_each_other(dashboard: dict) -> None:
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_file_is_what_the_script_writes(dashboard: dict) -> None:
    spec = importlib.util.spec_from_file_location(
        "make_dashboard", ROOT / "scripts/make_dashboard.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.dashboard() == dashboard
