"""Workloads: lengths, sharing, arrival times, and what is refused."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench.load_settings import WorkloadSpec
from jaxserve.bench.workloads import MOONCAKE_BLOCK, TokenSource, build_workload
from jaxserve.core.errors import ConfigError

VOCAB = 500


@given(
    input_len=st.integers(1, 40),
    output_len=st.integers(1, 40),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_random_lengths_stay_in_range_and_repeat(
    input_len: int, output_len: int, ratio: float, seed: int
) -> None:
    spec = WorkloadSpec(
        num_prompts=20,
        seed=seed,
        random_input_len=input_len,
        random_output_len=output_len,
        random_range_ratio=ratio,
    )
    first, again = (build_workload(spec, VOCAB, avoid_tokens=(0, 499)) for _ in range(2))
    for item, same in zip(first.items, again.items, strict=True):
        assert max(1, int(input_len * (1 - ratio))) <= len(item.prompt_token_ids)
        assert len(item.prompt_token_ids) <= input_len * (1 + ratio)
        assert max(1, int(output_len * (1 - ratio))) <= item.output_len <= output_len * (1 + ratio)
        assert item.arrival is None
        assert item.prompt_token_ids.dtype == np.int32
        assert item.prompt_token_ids.min() > 0 and item.prompt_token_ids.max() < 499
        assert np.array_equal(item.prompt_token_ids, same.prompt_token_ids)
        assert item.output_len == same.output_len


def test_another_seed_gives_other_prompts() -> None:
    one, two = (
        build_workload(WorkloadSpec(num_prompts=1, random_input_len=50, seed=seed), VOCAB)
        for seed in (1, 2)
    )
    assert not np.array_equal(one.items[0].prompt_token_ids, two.items[0].prompt_token_ids)


def test_prefixes_are_shared_evenly_and_suffixes_are_not_shared() -> None:
    spec = WorkloadSpec(
        dataset_name="prefix_repetition",
        num_prompts=21,
        prefix_repetition_prefix_len=16,
        prefix_repetition_suffix_len=12,
        prefix_repetition_num_prefixes=5,
        prefix_repetition_output_len=3,
    )
    items = build_workload(spec, VOCAB).items
    prefixes = Counter(tuple(item.prompt_token_ids[:16]) for item in items)
    assert sorted(prefixes.values()) == [4, 4, 4, 4, 5]
    assert len({tuple(item.prompt_token_ids[16:]) for item in items}) == 21
    assert {(len(item.prompt_token_ids), item.output_len) for item in items} == {(28, 3)}


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,48,10
2023-11-16 18:17:05.4799600,31,8
2023-11-16 18:17:04.9799600,100,300
"""


def test_azure_times_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    spec = WorkloadSpec(
        dataset_name="azure", dataset_path=path, time_scale=0.5, max_input_len=40, max_output_len=20
    )
    workload = build_workload(spec, VOCAB)
    assert [(i.arrival, len(i.prompt_token_ids), i.output_len) for i in workload.items] == [
        (0.0, 40, 10), (pytest.approx(0.5), 40, 20), (pytest.approx(0.75), 31, 8)
    ]  # fmt: skip
    assert (workload.num_cut_inputs, workload.num_cut_outputs) == (2, 1)
    assert (workload.num_input_tokens, workload.num_output_tokens) == (111, 38)


def test_the_zoned_times_of_the_2024_traces(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.009930+00:00,2399,6\n"
    )
    spec = WorkloadSpec(dataset_name="azure", dataset_path=path, num_prompts=2)
    assert [i.arrival for i in build_workload(spec, VOCAB).items] == [0, 1]


def mooncake(*requests: tuple[int, int, list[int]]) -> str:
    return "".join(
        json.dumps({"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": ids}) + "\n"
        for t, n, ids in requests
    )


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=2, max_size=5))
def test_equal_hash_ids_mean_equal_blocks(
    tmp_path_factory: pytest.TempPathFactory, all_ids: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("mooncake") / "trace.jsonl"
    path.write_text(mooncake(*((1000, len(ids) * MOONCAKE_BLOCK - 7, ids) for ids in all_ids)))
    spec = WorkloadSpec(dataset_name="mooncake", dataset_path=path)
    blocks = [
        (hash_id, item.prompt_token_ids[k * MOONCAKE_BLOCK : (k + 1) * MOONCAKE_BLOCK])
        for ids, item in zip(all_ids, build_workload(spec, VOCAB).items, strict=True)
        for k, hash_id in enumerate(ids)
    ]
    for (a, left), (b, right) in itertools.combinations(blocks, 2):
        size = min(len(left), len(right))  # a prompt's last block is not full
        assert np.array_equal(left[:size], right[:size]) == (a == b)


def test_mooncake_times_are_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(mooncake((3000, 5, [1]), (4500, 600, [1, 2])))
    spec = WorkloadSpec(dataset_name="mooncake", dataset_path=path)
    items = build_workload(spec, VOCAB).items
    assert [(i.arrival, len(i.prompt_token_ids)) for i in items] == [(0, 5), (1.5, 600)]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("azure", AZURE + "soon,1,1\n", 5),
        ("azure", AZURE + "2023-11-16 18:17:05,many,1\n", 5),
        ("azure", AZURE + "2023-11-16 18:17:05,3\n", 5),
        ("azure", AZURE + "2023-11-16 18:17:05,0,4\n", 5),
        ("azure", "TIME,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05,1,1\n", 2),
        ("mooncake", mooncake((0, 5, [1])) + "{oops\n", 2),
        ("mooncake", mooncake((0, 5, [1])) + "\n[1]\n", 3),
        ("mooncake", '{"timestamp": 0}\n', 1),
        ("mooncake", mooncake((0, 5, [-1])), 1),
        ("mooncake", mooncake((0, 600, [1])), 1),
        ("mooncake", mooncake((0, 5, [1])).replace(": 5", ": 5.5"), 1),
        ("mooncake", mooncake((0, 5, [1])).replace('timestamp": 0', 'timestamp": NaN'), 1),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, name: str, text: str, line: int) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"line {line}: "):
        build_workload(WorkloadSpec(dataset_name=name, dataset_path=path), VOCAB)


def test_unreadable_and_empty_traces_are_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (empty, binary, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=str(path)):
            build_workload(WorkloadSpec(dataset_name="mooncake", dataset_path=path), VOCAB)


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset_name": "sonnet"},
        {"dataset_name": "azure"},
        {"dataset_path": Path("x")},
        {"num_prompts": 0},
        {"random_input_len": 0},
        {"max_output_len": 0},
        {"prefix_repetition_num_prefixes": 0},
        {"random_range_ratio": 1.0},
        {"random_range_ratio": float("nan")},
        {"time_scale": -1.0},
        {"seed": -1},
    ],
)
def test_bad_specs_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        WorkloadSpec(**fields)


def test_a_vocabulary_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError):
        TokenSource(2, avoid=(0, 1))
