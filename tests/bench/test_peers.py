"""The comparison: its bound, its processes and its table, with stand-ins for the engines."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.bench.peers import compare
from jaxserve.bench.peers.compare import PeersResult, SideResult
from jaxserve.bench.peers.f32_gguf import write_f32_gguf
from jaxserve.bench.peers.peer_sides import Side, Weights
from jaxserve.bench.roofline import (
    Machine,
    ModelCost,
    head_params,
    layer_params,
    output_throughput_bound,
)
from jaxserve.bench.settings import CompareSpec
from jaxserve.bench.sides import Sides
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.models.config import ModelConfig

CONFIG = ModelConfig(
    family="llama", name="tiny", vocab_size=101, hidden_size=7, intermediate_size=11,
    num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, max_model_len=64, norm_eps=1e-5,
    rope_theta=1e4, tie_embeddings=True,
)  # fmt: skip


def test_weights_are_counted_by_hand() -> None:
    qkv, out, mlp = (6 + 2 + 2) * 4 * 7, 6 * 4 * 7, 3 * 7 * 11
    assert layer_params(CONFIG) == 3 * (qkv + out + mlp)
    assert head_params(CONFIG) == 707


def test_the_bound_is_memory_at_one_row_and_arithmetic_at_many() -> None:
    machine = Machine(bandwidth=1e6, matmul=1e6)
    model = ModelCost.of(CONFIG, 3 * layer_params(CONFIG), 500)
    read = (3 * layer_params(CONFIG) + 500) / 1e6
    assert model.step_seconds(machine, 1, 1) == pytest.approx(read)
    compute = 2 * (50 * layer_params(CONFIG) + 5 * 707) / 1e6
    assert model.step_seconds(machine, 50, 5) == pytest.approx(compute)
    prefill = 2 * (30 * layer_params(CONFIG) + 707) / 1e6
    bound = output_throughput_bound(model, machine, concurrency=1, input_len=30, output_len=4)
    assert bound == pytest.approx(4 / (prefill + 3 * read))


HARNESS = f"import sys; sys.path.insert(0, {str(compare.SCRIPTS)!r}); import harness\n"
ECHO = (
    HARNESS
    + """
class Echo:
    version = "echo 1"
    def __init__(self, spec): self.n = spec["output_len"]
    def generate(self, prompts):
        print("noise")
        return [prompt[:self.n] for prompt in prompts]
harness.main(Echo)
"""
)


def run(tmp_path: Path, spec: CompareSpec, **programs: str) -> dict[str, SideResult]:
    work = {"threads": 1, "output_len": spec.output_len,
            "cases": compare.make_cases(spec, vocab_size=90, avoid=(0,))}  # fmt: skip
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(work))
    commands = {
        name: [sys.executable, "-c", program, str(path)] for name, program in programs.items()
    }
    return compare.run_sides(commands, spec, Sides())


SPEC = CompareSpec(concurrency=(1, 3), input_len=6, output_len=2, threads=1, repeats=2)


def test_a_side_runs_in_a_process_and_reports_every_run(tmp_path: Path) -> None:
    result = run(tmp_path, SPEC, echo=ECHO)["echo"]
    assert result.version == "echo 1" and result.error is None and result.missing is None
    assert {n: len(runs) for n, runs in result.output_throughput.items()} == {1: 2, 3: 2}
    assert min(min(runs) for runs in result.output_throughput.values()) > 0
    batch = compare.make_cases(SPEC, 90, (0,))[1]["batches"][1]  # after the warm-up
    assert result.tokens[3] == [prompt[:2] for prompt in batch]


def test_sides_take_turns(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    writing = 'print("noise")'
    sides = {
        name: ECHO.replace(writing, f"open({str(diary)!r}, 'a').write({name!r})") for name in "ab"
    }
    run(tmp_path, SPEC, **sides)
    assert diary.read_text() == "ab" + "ba" + "ab" + "ba" + "ab" + "ba"


def test_a_missing_module_and_a_crash_are_told_apart_and_stop_nobody_else(tmp_path: Path) -> None:
    results = run(
        tmp_path,
        SPEC,
        absent=HARNESS + "harness.main(lambda spec: __import__('no_such_module'))",
        crash=HARNESS + "harness.main(lambda spec: 1 / 0)",
        short=ECHO.replace("[:self.n]", "[:1]"),
        echo=ECHO,
    )
    assert list(results) == ["absent", "crash", "short", "echo"]
    assert results["absent"] == SideResult(missing="no_such_module")
    assert "ZeroDivisionError" in (results["crash"].error or "")
    assert "asked for 2 tokens" in (results["short"].error or "")
    assert results["echo"].error is None and len(results["echo"].output_throughput[3]) == 2


def test_prompts_are_distinct_and_every_side_gets_the_same() -> None:
    cases = compare.make_cases(SPEC, 90, (0,))
    assert cases == compare.make_cases(SPEC, 90, (0,))
    prompts = [tuple(p) for case in cases for batch in case["batches"] for p in batch]
    assert len(prompts) == len(set(prompts)) == 3 * (1 + 3)
    assert {len(p) for p in prompts} == {6} and all(0 not in p for p in prompts)


def test_the_table_and_its_notes() -> None:
    results = {
        "jaxserve": SideResult(
            "jaxserve 1", {1: [31.0, 29.0, 30.0], 3: [60.0]}, tokens={1: [[1]], 3: [[2], [3]]}
        ),
        "jaxserve@int8": SideResult(
            "jaxserve 1", {1: [26.0], 3: [90.0]}, tokens={1: [[1]], 3: [[2], [9]]}
        ),
        "llama.cpp@file": SideResult(
            "llama 5", {1: [13.04], 3: [50.0]}, tokens={1: [[1]], 3: [[2], [9]]}
        ),
        "llama.cpp@Q8_0": SideResult(
            "llama 5", {1: [10.0], 3: [60.0]}, tokens={1: [[1]], 3: [[2], [3]]}
        ),
        "llama.cpp": SideResult(missing="llama_cpp"),
        "transformers": SideResult(error="boom"),
    }
    bound = {"jaxserve": {1: 40.0, 3: 240.0}, "llama.cpp@file": {1: 26.08, 3: 100.0}}
    result = PeersResult.of(SPEC, Machine(20e9, 170e9), bound, results)
    assert result.differing_answers == {
        "jaxserve@int8": 1, "llama.cpp@file": 1, "llama.cpp@Q8_0": 0,
    }  # fmt: skip
    assert result.num_answers == 3
    assert not any(side.tokens for side in result.results.values())
    table, _, notes = str(result).partition("\n\n")
    table = table.splitlines()
    assert table[0] == "| Concurrent requests | 1 | of bound | 3 | of bound |"
    assert table[2:4] == [
        "| jaxserve | 30.0 (29 to 31) | 75% | 60.0 | 25% |",
        "| jaxserve@int8 | 26.0 | – | 90.0 | – |",  # noqa: RUF001
    ]
    assert table[4] == "| llama.cpp@file | 13.0 | 50% | 50.0 | 50% |"
    assert table[6] == "| llama.cpp | not installed | – | not installed | – |"  # noqa: RUF001
    assert table[7] == "| transformers | failed | – | failed | – |"  # noqa: RUF001
    assert "20.0 GB/s" in notes and "170 GFLOP/s" in notes and "1 threads" in notes
    assert "jaxserve / the best of llama.cpp's: 2.30, 1.00" in notes
    assert "jaxserve@int8 / the best of llama.cpp's: 1.99, 1.50" in notes
    assert "llama.cpp@file: llama 5; 2 of 3 answers equal our first side's" in notes
    assert "llama.cpp: no module llama_cpp; pip install llama-cpp-python" in notes
    assert "transformers failed:\nboom" in notes


def test_sides_are_engines_and_forms_of_weights(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    weights = Weights(source, tmp_path / "model-f32.gguf")
    config = EngineConfig(page_size=32)
    plain, auto = Side.of("jaxserve"), Side.of("jaxserve@auto:int8")
    assert plain.work(weights, config)["model"] == str(weights.float32)
    work = auto.work(weights, config)
    assert work["model"] == str(source)
    assert work["jaxserve_options"] | {"quantization": "auto", "page_size": 32} == (
        work["jaxserve_options"] | {"activation_dtype": "int8"}
    )
    assert auto.multiplies_integers and not plain.multiplies_integers
    given = Side.of("llama.cpp@file")
    assert given.work(weights, config) == {"model": str(source)} and given.multiplies_integers
    made = Side.of("llama.cpp@Q4_0").work(weights, config)
    assert made["quantise"] == {"source": str(weights.float32), "type": "Q4_0"}
    assert made["model"] == str(tmp_path / "model-f32-Q4_0.gguf")
    for wrong in ("vllm", "transformers@int8", "jaxserve@int3", "jaxserve@auto:a:b:c"):
        with pytest.raises(ConfigError):
            Side.of(wrong)


def test_bytes_are_those_of_the_weights_as_they_are_held(smollm2_gguf: Path) -> None:
    weights = Weights(smollm2_gguf, smollm2_gguf)
    auto = Side.of("jaxserve@auto").weight_bytes(weights)
    assert auto == pytest.approx(Side.of("llama.cpp@file").weight_bytes(weights), rel=0.02)
    layers, head = Side.of("jaxserve@none").weight_bytes(weights)
    assert layers == pytest.approx(4 * 106_168_320, rel=1e-3) and head == 4 * 49152 * 576
    assert Side.of("jaxserve@int8").weight_bytes(weights)[0] == pytest.approx(layers / 4, rel=0.01)


def test_f32_copies_hold_the_dequantised_numbers_and_the_metadata(tmp_path: Path) -> None:
    source, target = tmp_path / "q.gguf", tmp_path / "f.gguf"
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    packed = gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(5)
    writer.add_token_list(["a", "é"])
    writer.add_add_bos_token(False)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm", rows[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    write_f32_gguf(source, target)
    reader = gguf.GGUFReader(target)
    tensors = {t.name: t for t in reader.tensors}
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(tensors["w"].data, expected)
    np.testing.assert_array_equal(tensors["norm"].data, rows[0])
    contents = {name: field.contents() for name, field in reader.fields.items()}
    assert contents["general.architecture"] == "llama" and contents["llama.block_count"] == 5
    assert contents["tokenizer.ggml.tokens"] == ["a", "é"]
    assert contents["tokenizer.ggml.add_bos_token"] is False
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_what_is_not_a_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model at all, and long enough to be read as a header" * 4)
    with pytest.raises(CheckpointError):
        write_f32_gguf(path, tmp_path / "y.gguf")


def test_the_better_of_two_measurements_counts() -> None:
    assert Machine(2.0, 3.0).better(Machine(1.0, 4.0)) == Machine(2.0, 4.0)


def test_bad_specs_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"concurrency": ()}, {"concurrency": (0,)}, {"threads": 0}, {"repeats": 0}
    ]  # fmt: skip
    for fields in bad:
        with pytest.raises(ConfigError):
            CompareSpec(**fields)
