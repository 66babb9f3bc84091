"""The benchmark's counts of bytes and FLOPs, its command line, and the tuner's choice."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import linear, peers, timing, workloads
from pallas_kernels.bench.workloads import Work, make_inputs, make_workload, work_of
from pallas_kernels.kv_pages import KvPages
from pallas_kernels.paged_attention import Shape, tuning
from pallas_kernels.shapes import MODEL_SHAPES

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = Shape(heads=6, kv_heads=2, head_dim=8, page_size=4, dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def tuner() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "tune_attention.py"
    spec = importlib.util.spec_from_file_location("tune_attention", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_decode_needs_every_context_once():
    # K and V of 2 * 5 tokens, 2 heads of 8 in 2 bytes; q and out of 2 tokens, 6 heads of 8.
    kv, queries = 2 * 10 * 2 * 8 * 2, 2 * 2 * 6 * 8 * 2
    # q.k and weights.v: each 8 multiplications and additions, for 6 heads and 10 positions.
    assert work_of(make_workload("decode", 2, 5), TINY) == Work(kv + queries, 2 * 16 * 6 * 10)


def test_a_prefill_multiplies_what_is_seen_only():
    work = work_of(make_workload("prefill", 1, 5), TINY)
    seen = 1 + 2 + 3 + 4 + 5
    assert work == Work(2 * 5 * 2 * 8 * 2 + 2 * 5 * 6 * 8 * 2, 2 * 16 * 6 * seen)


def test_the_chunk_of_a_mixed_step_sees_what_went_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workloads, "CHUNK", 3)
    workload = make_workload("mixed", 2, 5)
    assert workload.rows == ((1, 5), (1, 5), (3, 5))
    assert work_of(workload, TINY).flops == 2 * 16 * 6 * (5 + 5 + 3 + 4 + 5)
    assert work_of(workload, TINY).bytes == 2 * 15 * 2 * 8 * 2 + 2 * 5 * 6 * 8 * 2


def test_a_kv_write_reads_and_writes_new_tokens():
    workload = make_workload("kv_write", 4, 7)
    assert work_of(workload, TINY) == Work(2 * 11 * 2 * 2 * 8 * 2, 0)


def test_a_quantised_pool_is_read_with_its_scales():
    shape = TINY._replace(dtype=jnp.int8, query_dtype=jnp.float32)
    queries, token = 2 * 6 * 8 * 4, 2 * 2 * (8 + 4)
    assert work_of(make_workload("decode", 3, 7), shape).bytes == 3 * queries + 21 * token
    assert work_of(make_workload("kv_write", 4, 7), shape).bytes == 11 * (2 * 2 * 8 * 4 + token)
    pool = make_inputs(make_workload("decode", 3, 7), shape).kv_pages
    assert isinstance(pool, KvPages) and pool.scales.shape == pool.values.shape[:-1]


def test_the_bound_is_the_larger_of_memory_and_compute():
    assert Work(bytes=100, flops=60).bound(bandwidth=10, rate=20) == (10, "memory")
    assert Work(bytes=100, flops=60).bound(bandwidth=50, rate=20) == (3, "compute")


def test_default_workloads_are_those_of_serving():
    assert make_workload("decode").rows == ((1, 4096),) * 64
    assert make_workload("prefill").rows == ((4096, 4096),) * 4
    assert make_workload("mixed").rows == ((1, 4096),) * 32 + ((512, 4096),)


def test_inputs_are_random_on_pages_of_their_own_in_no_order():
    inputs = make_inputs(make_workload("mixed", 5, 18), TINY)
    pages = np.asarray(inputs.batch.page_table).reshape(-1)
    assert sorted(pages) == list(range(6 * 5)) != list(pages)
    assert inputs.kv_pages.shape == (1, 30, 2, 2, 4, 8)
    for array in (inputs.q, inputs.k, inputs.v, inputs.kv_pages):
        assert np.asarray(array).astype(np.float32).std() == pytest.approx(1, abs=0.2)
    np.testing.assert_array_equal(inputs.batch.query_start, [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(inputs.batch.query_len, [1, 1, 1, 1, 1, 18])


def test_a_time_is_the_median_of_calls_and_covers_their_end(monkeypatch: pytest.MonkeyPatch):
    now, steps = [0.0], iter([9.0, 0.5, 0.5, 1.0, 7.0, 2.0])  # compiles, counts, warms up
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(_: int) -> None:
        now[0] += next(steps)

    seconds = timing.seconds_per_call(lambda state: state + 1, 0, repeats=3, wait=wait)
    assert seconds == 2.0


def test_short_calls_share_a_timing(monkeypatch: pytest.MonkeyPatch):
    now, calls = [0.0], [0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def advance(state: None) -> None:
        now[0] += 0.001
        calls[0] += 1

    seconds = timing.seconds_per_call(advance, None, repeats=2, wait=lambda _: None)
    assert seconds == pytest.approx(0.001)
    assert calls[0] == pytest.approx(2 + 3 * timing.TIMING_SECONDS / 0.001, abs=3)


def test_a_timed_kv_write_leaves_the_inputs():
    inputs = make_inputs(make_workload("kv_write", 2, 8), TINY)
    before = np.asarray(inputs.kv_pages).astype(np.float32)
    write = bench.functools.partial(bench.kv_write, layer=0, implementation="reference")
    assert timing.time_kv_write(write, inputs, repeats=1) > 0
    np.testing.assert_array_equal(np.asarray(inputs.kv_pages).astype(np.float32), before)


def test_the_command_line_reports_every_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "measure_limits", lambda *_, **__: timing.Limits(1e10, 1e11))
    monkeypatch.setattr(timing, "TIMING_SECONDS", 0.0)
    path = tmp_path / "results.json"
    bench.main(
        "--shapes SmolLM2-135M --workloads decode kv_write --batch 1 --context 32 --page-size 16 "
        f"--repeats 1 --dtype float32 --json {path}".split()
    )
    report = json.loads(path.read_text())
    assert (report["platform"], report["dtype"], report["page_size"]) == ("cpu", "float32", 16)
    assert (report["copy_bytes_per_s"], report["matmul_flops_per_s"]) == (1e10, 1e11)
    measured = [(r["workload"], r["implementation"]) for r in report["results"]]
    assert measured == [("decode", "cpu"), ("decode", "xla"), ("kv_write", "xla")]
    for result in report["results"]:
        assert result["model"] == "SmolLM2-135M"
        assert (result["heads"], result["kv_heads"], result["head_dim"]) == (9, 3, 64)
        bound = max(result["bytes"] / 1e10, result["flops"] / 1e11)
        assert result["bound_s"] == bound > 0 and result["bound_of"] in ("memory", "compute")
        assert result["fraction"] == pytest.approx(bound / result["time_s"])
        assert {"rows", "tokens", "context"} < set(result)
    left_out = {(r["workload"], r["implementation"]): r["reason"] for r in report["left_out"]}
    assert "takes a TPU" in left_out["decode", "tpu"]
    assert "takes a GPU" in left_out["decode", peers.CUDNN]
    assert "PyTorch" in left_out["decode", peers.TORCH]
    printed = capsys.readouterr().out
    assert printed.count("\nxla ") == 2 and "torch-sdpa left out: PyTorch" in printed


def test_peers_take_rows_of_one_length_only():
    left_out = peers.time_peers(make_workload("mixed", 2, 5), TINY, repeats=1)
    assert set(left_out) == {peers.CUDNN, peers.TORCH}
    assert all("one length" in str(reason) for reason in left_out.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--implementations xla gpu", "'gpu' cannot run here: it takes an NVIDIA GPU"),
        ("--implementations tpu", "'tpu' cannot run here: it takes a TPU"),
        ("--implementations fast", "invalid choice: 'fast'"),
        ("--shapes GPT-5", "invalid choice: 'GPT-5'"),
        ("--context 0", "must be positive"),
        ("--batch 0", "must be positive"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_the_tuner_chooses_what_is_nearest_to_the_best_in_all_workloads(tuner: ModuleType):
    times = {
        "decodes": {"decode": 1.0, "prefill": 30.0},  # 1 + 3
        "prefills": {"decode": 3.5, "prefill": 10.0},  # 3.5 + 1
        "both": {"decode": 1.5, "prefill": 15.0},  # 1.5 + 1.5
        "prefill fails": {"decode": 0.1},
    }
    assert tuner.best_candidate(times) == "both"
    times["both"]["prefill"] = 26.0
    assert tuner.best_candidate(times) == "decodes"
    with pytest.raises(ValueError, match="no block sizes ran"):
        tuner.best_candidate({"a": {}, "b": {}})
    with pytest.raises(ValueError, match="no block sizes ran"):
        tuner.best_candidate({"a": {"decode": 1.0}, "b": {"prefill": 1.0}})


def test_the_tuner_keeps_other_entries_and_sorts(tuner: ModuleType, tmp_path: Path):
    table = tmp_path / "tuning.json"
    table.write_text('{"m": {"x": 1}, "z": {"x": 1}}')
    tuner.write_entries(table, {"a": {"y": 3, "b": 2}, "z": {"x": 2}})
    entries = json.loads(table.read_text())
    assert entries == {"a": {"b": 2, "y": 3}, "m": {"x": 1}, "z": {"x": 2}}
    assert list(entries) == ["a", "m", "z"] and list(entries["a"]) == ["b", "y"]


def test_the_tuner_refuses_a_machine_without_an_accelerator(tuner: ModuleType):
    with pytest.raises(SystemExit, match=r"takes a TPU or a Hopper GPU.*has cpu only"):
        tuner.main([])


def test_the_tuner_refuses_sizes_that_change_results(tuner: ModuleType):
    ones = jnp.ones((2, 3, 4), jnp.bfloat16)
    tuner.check(ones * 1.01, ones)
    for wrong in (ones * 1.1, ones * jnp.nan):
        with pytest.raises(ValueError, match="differ"):
            tuner.check(wrong, ones)


def test_the_tuner_measures_every_candidate_that_runs(
    tuner: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuner.xla, "paged_attention", lambda q, *_, **__: q)
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(timing, "time_attention", lambda *_, **__: next(seconds))
    options = tuner.argparse.Namespace(batch=1, context=8, repeats=1)

    def attend_with(candidate: str):
        def attend(q, kv_pages, batch):
            if candidate == "fails":
                raise NotImplementedError("too large")
            if candidate == "is wrong":
                return -q
            return q

        return attend

    candidates = ["slow", "fails", "is wrong", "fast"]
    times = tuner.measure(candidates, ("decode",), TINY, options, attend_with)
    assert times == {
        "slow": {"decode": 2.0}, "fails": {}, "is wrong": {}, "fast": {"decode": 1.0}
    }  # fmt: skip
    assert tuner.best_candidate(times) == "fast"


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_there_are_candidates_for_every_model_and_the_heuristic_is_one(
    tuner: ModuleType, page_size: int
):
    for model in MODEL_SHAPES:
        shape = Shape(*model[1:], page_size=page_size, dtype=jnp.bfloat16)
        for chip in ("TPU v4", "TPU v6 lite"):
            candidates = tuner.tpu_candidates(chip, shape)
            assert tuning.heuristic(chip, shape) in candidates
        for workload in ("decode", "prefill"):
            candidates = tuner.gpu_candidates(workload, shape, 132)
            assert tuner.gpu_tiles(shape.head_dim, 132) in candidates
            assert len(candidates) == len(set(candidates))
            # A multiprocessor's registers: what three warpgroups ask for is never there.
            assert all(tiles.prefill_warpgroups <= 2 for tiles in candidates)


def test_linear_layers_are_timed_beside_their_bound(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "measure_limits", lambda *_, **__: timing.Limits(1e6, 1e9))
    command = ["--tokens", "3", "--shapes", "40x24", "17x40", "--layers", "2", "--repeats", "2"]
    linear.main(command)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("4 products")
    assert [row.split()[:4] for row in rows] == [
        ["xla", "float32", "float", "3"],
        ["cpu", "float32", "float", "3"],
    ]
    assert {tuple(row.split()[6:8]) for row in rows} == {("13.1", "memory")}  # 13,120 bytes
    name = "int8-channel-float32"
    linear.main([*command, "--implementations", "xla", "--formats", name])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1:3] for row in rows] == [
        ["float32", "float"],
        [name, "float"],
        [name, "int8"],
    ]
    assert [row.split()[6] for row in rows] == ["13.1", "3.7", "3.7"]  # 3,280 codes, 114 scales
    for bad, message in (
        (["--shapes", "40"], "invalid parse_shape value"),
        (["--shapes", "0x4"], "invalid parse_shape value"),
        (["--tokens", "0"], "must be positive"),
        (["--formats", "int4"], "invalid parse value"),
        (["--shapes", "40x24", "--formats", "int4-g32-float16"], "multiple of 32 inputs, not 24"),
        (["--dtype", "bfloat16", "--implementations", "cpu"], "takes float32, not bfloat16"),
    ):
        with pytest.raises(SystemExit):
            linear.main(bad)
        assert message in capsys.readouterr().err


def test_linear_layers_need_every_weight_once():
    weights = [jnp.zeros(shape) for shape in ((40, 24), (17, 40))]
    assert linear.work_of(weights, 5) == Work(4 * 1640, 2 * 5 * 1640)
