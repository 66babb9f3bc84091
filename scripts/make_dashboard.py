"""Writes the Grafana dashboard, jaxserve/server/dashboards/jaxserve.json.

Its variable `names` says under which names a server's metrics are: `jaxserve`, or `vllm` with
--metrics-compat vllm (and for servers that are vLLM). Run it again after changing a panel.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "jaxserve/server/dashboards/jaxserve.json"
COLUMNS, HEIGHT = 3, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_MODEL = '{model_name="$model_name"}'
INTERVAL = "[$__rate_interval]"

Queries = dict[str, str]  # PromQL by legend


def series(name: str, *, ours: bool = False) -> str:
    """A metric of the chosen model; `ours` are those that only jaxserve has."""
    return f"{'jaxserve' if ours else '${names}'}:{name}{OF_MODEL}"


def rate(name: str, *, by: str = "", ours: bool = False) -> str:
    """How fast a counter rises, in sum or by a label."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({series(name, ours=ours)}{INTERVAL}))"


def quantiles(name: str, *, ours: bool = False) -> Queries:
    """A histogram's median, 95th and 99th percentile, and mean."""
    buckets = rate(f"{name}_bucket", by="le", ours=ours)
    queries = {
        f"p{round(q * 100)}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.95, 0.99)
    }
    return {**queries, "mean": mean(name, ours=ours)}


def mean(name: str, *, ours: bool = False) -> str:
    """A histogram's mean."""
    return f"{rate(f'{name}_sum', ours=ours)} / {rate(f'{name}_count', ours=ours)}"


ROWS: dict[str, list[tuple[str, str, Queries]]] = {
    "Requests": [
        ("Running and waiting", "short", {
            "running": f"sum({series('num_requests_running')})",
            "waiting": f"sum({series('num_requests_waiting')})",
        }),
        ("Ended per second, by reason", "reqps", {
            "{{finished_reason}}": rate("request_success_total", by="finished_reason"),
        }),
        ("Preemptions per second", "ops", {"preemptions": rate("num_preemptions_total")}),
    ],
    "Latency": [
        ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        ("Time between tokens", "s", quantiles("inter_token_latency_seconds")),
        ("End to end", "s", quantiles("e2e_request_latency_seconds")),
        ("Where the time goes (means)", "s", {
            "queue": mean("request_queue_time_seconds"),
            "prefill": mean("request_prefill_time_seconds"),
            "decode": mean("request_decode_time_seconds"),
        }),
        ("Time in the queue", "s", quantiles("request_queue_time_seconds")),
        ("Time per output token", "s", quantiles("request_time_per_output_token_seconds")),
    ],
    "Tokens": [
        ("Tokens per second", "short", {
            "prompts": rate("prompt_tokens_total"),
            "answers": rate("generation_tokens_total"),
        }),
        ("Prompt tokens per request", "short", quantiles("request_prompt_tokens")),
        ("Answer tokens per request", "short", quantiles("request_generation_tokens")),
    ],
    "KV cache": [
        ("In use", "percentunit", {"in use": f"max({series('kv_cache_usage_perc')})"}),
        ("Prefix cache: share of tokens found", "percentunit", {
            "on the device": f"{rate('prefix_cache_hits_total')} / "
            f"{rate('prefix_cache_queries_total')}",
            "in host memory or on disk": f"{rate('external_prefix_cache_hits_total')} / "
            f"{rate('external_prefix_cache_queries_total')}",
        }),
        ("Pages on the device, by state", "short", {
            "{{state}}": f"sum by (state) ({series('kv_pages', ours=True)})",
        }),
    ],
    "Steps and XLA (jaxserve only)": [
        ("Step time", "s", quantiles("step_time_seconds", ours=True)),
        ("Share of a step that is padding", "percentunit", {
            axis: f"{rate(f'step_padding_{axis}_total', ours=True)} / "
            f"({rate(f'step_padding_{axis}_total', ours=True)} + "
            f"{rate(f'step_{axis}_total', ours=True)})"
            for axis in ("tokens", "rows")
        }),
        ("Steps per second, by token bucket", "ops", {
            "{{bucket}}": f"sum by (bucket) (rate(jaxserve:bucket_steps_total"
            f'{{model_name="$model_name", axis="tokens"}}{INTERVAL}))',
        }),
        ("Tokens per step", "short", quantiles("iteration_tokens_total")),
        ("Programs compiled, by phase (serving: none)", "short", {
            "{{phase}}": f"sum by (phase) ({series('compiles_total', ours=True)})",
        }),
        ("KV pages off the device", "short", {
            "{{tier}}": f"sum by (tier) ({series('stored_pages', ours=True)})",
        }),
    ],
}  # fmt: skip


def panel(number: int, title: str, unit: str, queries: Queries, x: int, y: int) -> dict[str, Any]:
    """A chart over time."""
    width = 24 // COLUMNS
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": width, "x": x * width, "y": y},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": query, "legendFormat": name}
            for i, (name, query) in enumerate(queries.items())
        ],
    }


def panels() -> list[dict[str, Any]]:
    """All charts, under a heading per row."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, charts in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": title, "gridPos": place, "panels": []}
        )
        for i, (name, unit, queries) in enumerate(charts):
            at = y + 1 + i // COLUMNS * HEIGHT
            made.append(panel(len(made) + 1, name, unit, queries, i % COLUMNS, at))
        y += 1 + -(-len(charts) // COLUMNS) * HEIGHT
    return made


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana imports it."""
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
        {
            "name": "names",
            "type": "custom",
            "query": "jaxserve,vllm",
            "label": "Names",
            "current": {"text": "jaxserve", "value": "jaxserve"},
        },
        {
            "name": "model_name",
            "type": "query",
            "datasource": SOURCE,
            "query": "label_values(${names}:num_requests_running, model_name)",
            "label": "Model",
            "refresh": 2,
        },
    ]
    return {
        "uid": "jaxserve",
        "title": "jaxserve",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels(),
    }


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
