"""What the benchmarks send: prompts of token ids, how much to answer, and when to arrive.

Synthetic datasets follow `vllm bench` (`random`, `prefix_repetition`). Traces replay recorded
traffic: the Azure LLM inference traces (CSV, https://github.com/Azure/AzurePublicDataset) and
the Mooncake traces (JSONL, https://github.com/kvcache-ai/Mooncake). A trace has lengths, not
texts, so prompts are random tokens; Mooncake's block hashes decide which of them are equal.
"""

import csv
import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxserve.bench.load_settings import WorkloadSpec
from jaxserve.core.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens that one hash id stands for
TRACE_VOCABULARY = 32_000  # which tokens a trace's prompts are made of does not matter


@dataclasses.dataclass(frozen=True, eq=False)
class WorkloadItem:
    """One request.

    Attributes:
        arrival: seconds from the start; None when it has no time of its own.
        prompt_token_ids: int32 [tokens].
        output_len: tokens to generate.
    """

    arrival: float | None
    prompt_token_ids: np.ndarray
    output_len: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, and how many had their lengths cut to fit."""

    items: tuple[WorkloadItem, ...]
    num_cut_inputs: int = 0
    num_cut_outputs: int = 0

    @property
    def num_input_tokens(self) -> int:
        """Prompt tokens over all requests."""
        return sum(len(item.prompt_token_ids) for item in self.items)

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate over all requests."""
        return sum(item.output_len for item in self.items)

    def __str__(self) -> str:
        cut = ""
        if self.num_cut_inputs or self.num_cut_outputs:
            cut = f"\nCut: {self.num_cut_inputs} prompts, {self.num_cut_outputs} answers"
        return (
            f"{len(self.items)} requests, {self.num_input_tokens} tokens in, "
            f"{self.num_output_tokens} out{cut}"
        )


class TokenSource:
    """Draws random tokens that the model knows and that do not mean the end of a text.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        avoid: tokens never drawn, such as EOS.

    Raises:
        ConfigError: no token is left to draw.
    """

    def __init__(self, vocab_size: int, avoid: Collection[int] = ()) -> None:
        self._allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), np.array([*avoid]))
        if not len(self._allowed):
            raise ConfigError(f"a vocabulary of {vocab_size} tokens leaves none to draw")

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` tokens, int32 [count]."""
        return self._allowed[rng.integers(0, len(self._allowed), count)]


def build_workload(
    spec: WorkloadSpec, vocab_size: int, avoid_tokens: Collection[int] = ()
) -> Workload:
    """Make the requests that a spec describes; the same spec and vocabulary, the same requests.

    Raises:
        ConfigError: a trace file cannot be read, or one of its lines is malformed (the message
            has its number).
    """
    source = TokenSource(vocab_size, avoid_tokens)
    builders: dict[str, Callable[[WorkloadSpec, TokenSource], Iterable[WorkloadItem]]] = {
        "random": _random,
        "prefix_repetition": _prefix_repetition,
        "azure": _azure,
        "mooncake": _mooncake,
    }
    items = list(builders[spec.dataset_name](spec, source))
    if not items:
        raise ConfigError(f"{spec.dataset_path} holds no requests")
    max_in, max_out = spec.max_input_len, spec.max_output_len
    cut = [_cut(item, max_in, max_out) for item in items]
    cut.sort(key=lambda item: item.arrival or 0.0)
    return Workload(
        tuple(cut),
        sum(len(i.prompt_token_ids) > max_in for i in items) if max_in else 0,
        sum(i.output_len > max_out for i in items) if max_out else 0,
    )


def _cut(item: WorkloadItem, max_input_len: int | None, max_output_len: int | None) -> WorkloadItem:
    return dataclasses.replace(
        item,
        prompt_token_ids=item.prompt_token_ids[:max_input_len],
        output_len=min(item.output_len, max_output_len or item.output_len),
    )


def load_trace(path: Path | None, num_requests: int, seed: int) -> list[WorkloadItem]:
    """The first requests of a trace, with random prompts of its lengths; its name says its kind.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    if path is None:
        raise ConfigError("give a --trace")
    kind = "mooncake" if path.suffix == ".jsonl" else "azure"
    spec = WorkloadSpec(dataset_name=kind, dataset_path=path, num_prompts=num_requests, seed=seed)
    return list(build_workload(spec, TRACE_VOCABULARY).items)


# ------------------------------------------------------------------------- synthetic


def _random(spec: WorkloadSpec, source: TokenSource) -> Iterator[WorkloadItem]:
    """Lengths uniform in [len * (1 - ratio), len * (1 + ratio)], as in vLLM."""
    rng = np.random.default_rng(spec.seed)
    inputs = _lengths(rng, spec.random_input_len, spec.random_range_ratio, spec.num_prompts)
    outputs = _lengths(rng, spec.random_output_len, spec.random_range_ratio, spec.num_prompts)
    for input_len, output_len in zip(inputs, outputs, strict=True):
        yield WorkloadItem(None, source.draw(rng, int(input_len)), int(output_len))


def _lengths(rng: np.random.Generator, mean: int, ratio: float, count: int) -> np.ndarray:
    low, high = max(1, int(mean * (1 - ratio))), int(mean * (1 + ratio))
    return rng.integers(low, high, count, endpoint=True)


def _prefix_repetition(spec: WorkloadSpec, source: TokenSource) -> Iterator[WorkloadItem]:
    """Every prompt is one of a few prefixes, each used equally often, and a suffix of its own."""
    rng = np.random.default_rng(spec.seed)
    prefixes = [
        source.draw(rng, spec.prefix_repetition_prefix_len)
        for _ in range(spec.prefix_repetition_num_prefixes)
    ]
    for index in rng.permutation(spec.num_prompts):
        suffix = source.draw(rng, spec.prefix_repetition_suffix_len)
        prompt = np.concatenate([prefixes[index % len(prefixes)], suffix])
        yield WorkloadItem(None, prompt, spec.prefix_repetition_output_len)


# ---------------------------------------------------------------------------- traces


@dataclasses.dataclass(frozen=True)
class _TraceLine:
    number: int  # 1 is the file's first line
    seconds: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


def _azure(spec: WorkloadSpec, source: TokenSource) -> Iterator[WorkloadItem]:
    rng = np.random.default_rng(spec.seed)
    lines = _parse(spec, _azure_rows, _azure_line)
    for line, arrival in _arrivals(lines, spec.time_scale):
        yield WorkloadItem(arrival, source.draw(rng, line.input_len), line.output_len)


def _mooncake(spec: WorkloadSpec, source: TokenSource) -> Iterator[WorkloadItem]:
    blocks: dict[int, np.ndarray] = {}

    def block(hash_id: int) -> np.ndarray:
        if hash_id not in blocks:
            rng = np.random.default_rng([spec.seed, hash_id])
            blocks[hash_id] = source.draw(rng, MOONCAKE_BLOCK)
        return blocks[hash_id]

    lines = _parse(spec, _numbered, _mooncake_line)
    for line, arrival in _arrivals(lines, spec.time_scale):
        prompt = np.concatenate([block(i) for i in line.hash_ids])[: line.input_len]
        yield WorkloadItem(arrival, prompt, line.output_len)


def _arrivals(lines: list[_TraceLine], scale: float) -> Iterator[tuple[_TraceLine, float]]:
    first = min((line.seconds for line in lines), default=0.0)
    return ((line, (line.seconds - first) * scale) for line in lines)


def _parse(
    spec: WorkloadSpec,
    rows: Callable[[Iterable[str]], Iterator[tuple[int, object]]],
    parse: Callable[[int, object], _TraceLine],
) -> list[_TraceLine]:
    """The first `num_prompts` requests of a trace file."""
    lines = []
    assert spec.dataset_path is not None  # WorkloadSpec has checked it
    try:
        with spec.dataset_path.open(encoding="utf-8", newline="") as file:
            for number, row in itertools.islice(rows(file), spec.num_prompts):
                try:
                    line = parse(number, row)
                    if line.input_len < 1 or line.output_len < 1:
                        raise ValueError("lengths must be at least 1")
                except (KeyError, TypeError, ValueError) as error:
                    what = f"no field {error}" if isinstance(error, KeyError) else error
                    raise ConfigError(f"{spec.dataset_path}, line {number}: {what}") from error
                lines.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the trace {spec.dataset_path}: {error}") from error
    return lines


def _numbered(file: Iterable[str]) -> Iterator[tuple[int, object]]:
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _azure_rows(file: Iterable[str]) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def _azure_line(number: int, row: object) -> _TraceLine:
    assert isinstance(row, dict)
    time = datetime.datetime.fromisoformat(row["TIMESTAMP"])
    if time.tzinfo is None:  # the 2023 traces have no zone, those of 2024 say UTC
        time = time.replace(tzinfo=datetime.UTC)
    inputs, outputs = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    return _TraceLine(number, time.timestamp(), inputs, outputs)


def _mooncake_line(number: int, text: object) -> _TraceLine:
    row = json.loads(str(text))
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    lengths = [row["input_length"], row["output_length"]]
    hash_ids = row["hash_ids"]
    if not isinstance(hash_ids, list):
        raise ValueError("hash_ids is not a list")
    if any(type(value) is not int for value in [*lengths, *hash_ids]):
        raise ValueError("lengths and hash_ids must be whole numbers")
    if any(hash_id < 0 for hash_id in hash_ids):
        raise ValueError("hash_ids must not be negative")
    if len(hash_ids) * MOONCAKE_BLOCK < lengths[0]:
        raise ValueError(
            f"{len(hash_ids)} hash_ids of {MOONCAKE_BLOCK} tokens do not cover {lengths[0]} tokens"
        )
    seconds = float(row["timestamp"]) / 1000
    if not np.isfinite(seconds):
        raise ValueError("timestamp is not a finite number")
    return _TraceLine(number, seconds, lengths[0], lengths[1], tuple(hash_ids))
