"""Checks a scrape as `promtool check metrics` does, and reads its samples."""

import re
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

_NAME = re.compile(r"[a-z][a-z0-9_]*:?[a-z0-9_]+")
_LABEL = re.compile(r"[a-z][a-z0-9_]*")
# What the base units of Prometheus rule out: milliseconds, percent and the like.
_OTHER_UNITS = re.compile(r"_(ms|milliseconds|us|minutes|hours|mib|gib|kb|mb|gb|percent)(_|$)")
_VLLMS_OWN = {"iteration_tokens_total"}  # a histogram of that name: boards ask for it
_HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")


def check_exposition(text: str) -> list[str]:
    """What is wrong with a scrape in Prometheus' text format; empty if nothing is."""
    problems: list[str] = []
    helps, types = _comments(text, problems)
    for name in sorted(types.keys() | helps.keys()):
        problems += _check_family(name, types.get(name), helps.get(name))
    problems += _check_samples(text, types)
    return problems


def _comments(text: str, problems: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    found: dict[str, dict[str, str]] = {"HELP": {}, "TYPE": {}}
    for line in text.splitlines():
        if line.startswith("# "):
            _, kind, name, rest = line.split(" ", 3)
            if name in found[kind]:
                problems.append(f"{name}: {kind} twice")
            found[kind][name] = rest
    return found["HELP"], found["TYPE"]


def _check_family(name: str, kind: str | None, help: str | None) -> list[str]:
    problems = []
    suffix = name.rpartition(":")[2]
    if kind is None:
        problems.append(f"{name}: no TYPE")
    if not help or not help.strip():
        problems.append(f"{name}: no HELP")
    if not _NAME.fullmatch(name):
        problems.append(f"{name}: not a name like others")
    if (kind == "counter") != name.endswith("_total") and suffix not in _VLLMS_OWN:
        problems.append(f"{name}: a {kind}; counters and only they end in _total")
    if name.endswith(_HISTOGRAM_PARTS):
        problems.append(f"{name}: ends like a part of a histogram")
    if _OTHER_UNITS.search(name):
        problems.append(f"{name}: not in base units")
    if kind is not None and kind in suffix.split("_"):
        problems.append(f"{name}: names its type")
    return problems


def _check_samples(text: str, types: Mapping[str, str]) -> list[str]:
    problems, seen = [], set()
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        series = line.rpartition(" ")[0]
        if series in seen:
            problems.append(f"{series}: twice")
        seen.add(series)
        name, _, labels = series.partition("{")
        family = next(
            (n for n in (name, *(name.removesuffix(p) for p in _HISTOGRAM_PARTS)) if n in types),
            None,
        )
        if family is None:
            problems.append(f"{series}: belongs to no family")
        for label in re.findall(r'(\w+)="', labels):
            if not _LABEL.fullmatch(label):
                problems.append(f"{series}: label {label}")
            if label == "le" and types.get(family or "") != "histogram":
                problems.append(f"{series}: le outside a histogram")
    return problems + _check_histograms(text)


def _check_histograms(text: str) -> list[str]:
    problems = []
    for family in text_string_to_metric_families(text):
        if family.type != "histogram":
            continue
        counts = [s.value for s in family.samples if s.name.endswith("_bucket")]
        total = next(s.value for s in family.samples if s.name.endswith("_count"))
        if counts != sorted(counts) or counts[-1] != total:
            problems.append(f"{family.name}: buckets do not add up")
    return problems


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels, those aside that every metric of an engine has."""
    return {
        (s.name, *(v for k, v in s.labels.items() if k not in ("model_name", "engine"))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
