"""The server's own programs, compiled by the real TPU and GPU compilers for chips not there.

Weights and pool are shapes only. Most models are cut to two layers, one of each kind of
attention, because compilers take seconds per layer; what is said of memory is said of the
whole model, whose weights and pool need no compiler.
"""

import dataclasses
import functools
import importlib.util
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from jax.stages import Compiled

from jaxserve.checkpoints.storage import named
from jaxserve.core.errors import ConfigError
from jaxserve.core.sampling_params import MAX_LOGPROBS
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_readers import from_preset
from jaxserve.models.registry import parameters_of
from jaxserve.parallel.chips import abstract_tpu_devices, hbm_bytes
from jaxserve.parallel.mesh import bytes_per_device, make_mesh
from jaxserve.runner.ahead_of_time import StepBytes, compile_step, lower_step
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.collectives import Collective, collectives
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_jobs import backbone_jobs
from tests.aot.gpu import h100_topology, needs_cuda_compiler

pytestmark = pytest.mark.slow

BFLOAT16 = jnp.dtype("bfloat16")
PAGE_SIZE, MAX_ROWS = 64, 64
SERVED_PAGES = 1024  # 64 requests of 1024 tokens, to see whether a model fits
CUT_PAGES = 8192  # so many that a copy of the pool of two layers cannot be overlooked
USABLE = 0.9  # of a device's memory: the server leaves the rest alone, too
# Slices by number of devices; the two halves of a TPU7x are two devices.
SLICES = {
    "v5e": {4: "v5e:2x2", 8: "v5e:2x4"},
    "v6e": {4: "v6e:2x2", 8: "v6e:2x4"},
    "v5p": {4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "tpu7x": {8: "tpu7x:2x2x1"},
}


class Case(NamedTuple):
    """A model on a mesh of one kind of chip."""

    chip: str
    preset: str
    tensor: int
    layers: int | None = 2  # None: all
    num_pages: int = CUT_PAGES
    dtype: str = "bfloat16"  # of the weights; the pool is bfloat16
    quantization: str = "none"
    num_spans: int | None = 1
    served_pages: int = SERVED_PAGES

    @property
    def platform(self) -> str:
        return "gpu" if self.chip == "h100" else "tpu"


def case(*args: Any, tokens: int | None = None, **fields: Any):
    """A parameter of a test that is skipped where the compiler is not installed."""
    made = Case(*args, **fields)
    no_libtpu = pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu, TPUs' compiler"
    )
    held = "" if made.quantization == "none" else f"-{made.quantization}"
    name = f"{made.chip}-{made.preset}{held}-tensor{made.tensor}"
    values = (made,) if tokens is None else (made, tokens)
    mark = needs_cuda_compiler if made.platform == "gpu" else no_libtpu
    return pytest.param(*values, marks=mark, id=name if tokens is None else f"{name}-{tokens}")


def devices_for(chip: str, count: int):
    if chip == "h100":
        return h100_topology().devices
    return abstract_tpu_devices(SLICES[chip][min(n for n in SLICES[chip] if n >= count)])


def model(preset: str, layers: int | None) -> ModelConfig:
    """A preset, all of it or its first layers of each kind in turn."""
    config = from_preset(preset)
    if layers is None:
        return config
    kinds = tuple(dict.fromkeys(config.sliding_window))
    windows = tuple(kinds[i % len(kinds)] for i in range(layers))
    return dataclasses.replace(config, num_layers=layers, sliding_window=windows)


def lower(case: Case) -> StepLowering:
    config, storage = model(case.preset, case.layers), {}
    if case.quantization != "none":
        storage = named(case.quantization, parameters_of(config))
    return lower_step(
        config,
        make_mesh(f"tensor={case.tensor}", devices_for(case.chip, case.tensor)),
        buckets=Buckets(
            tokens=(64, 512), sampled=(MAX_ROWS,), max_rows=MAX_ROWS, max_pages=8192 // PAGE_SIZE
        ),
        dtype=jnp.dtype(case.dtype),
        kv_dtype=BFLOAT16,
        num_pages=case.num_pages,
        page_size=PAGE_SIZE,
        implementation=case.platform,  # its kernel
        storage=storage,
        num_spans=case.num_spans,
    )


@functools.cache
def backbone(case: Case, tokens: int):
    lowering = lower(case)
    return compile_step(lowering, backbone_jobs(lowering, tokens))


def assert_in_place(compiled: Compiled, pool: int, hidden: int) -> None:
    """The pool goes in and comes out as one piece of memory, and nothing like it is made.

    What else comes out are `hidden` bytes of all tokens' hidden states, and small things.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < hidden + 2**20
    assert memory.temp_size_in_bytes < pool / 10


def assert_reduces_once_per_sum(compiled: Compiled, config: ModelConfig, tokens: int) -> None:
    """One sum over devices for the embedding and two for every layer, and nothing else moves."""
    found = collectives(compiled)
    assert set(found) == {Collective("all-reduce", "bf16", (tokens, config.hidden_size), True)}
    assert len(found) == 1 + 2 * config.num_layers


# Every chip, both kinds of attention, whole and split, few and many tokens: each at least once. The
# compilers take up to half a minute for one, so what two would show alike is compiled once.
BACKBONES = [
    case("v5e", "smollm2-135m", 1, tokens=512),
    case("v5e", "llama-3.1-8b", 4, tokens=64),
    case("v6e", "gemma3-27b", 8, tokens=64),
    case("v5p", "smollm2-135m", 1, tokens=64, layers=6),
    case("tpu7x", "llama-3.1-8b", 8, tokens=64),
    case("h100", "smollm2-135m", 1, tokens=64),
    case("h100", "llama-3.1-8b", 1, tokens=512),
]


@pytest.mark.parametrize(("case", "tokens"), BACKBONES)
def test_backbone(case: Case, tokens: int):
    compiled = backbone(case, tokens)
    program, used = compiled.programs[f"backbone-{tokens}"], compiled.bytes
    config = model(case.preset, case.layers)
    assert_in_place(program, used.kv_pages, tokens * config.hidden_size * BFLOAT16.itemsize)
    if case.tensor > 1:
        assert_reduces_once_per_sum(program, config, tokens)
    else:
        assert not collectives(program)
    assert_fits(case, used)


def assert_fits(case: Case, cut: StepBytes) -> None:
    """The whole model fits the device, as far as the cut one can tell."""
    whole = lower(case._replace(layers=None, num_pages=case.served_pages, num_spans=1))
    weights, pool = bytes_per_device(whole.params), bytes_per_device(whole.kv_pages)
    # What layouts add, they add to every layer.
    padding = cut.padding / (cut.weights + cut.kv_pages) * (weights + pool)
    room = hbm_bytes(whole.rules.mesh.devices.flat[0]) * USABLE
    assert weights + pool + padding + cut.temporaries < room


# Two layers of each, in two spans that are one program.
QUANTISED = [
    case("v5e", "llama-3.1-8b", 1, quantization="int8", num_spans=2, served_pages=512),
    case("v5e", "llama-3.1-8b", 1, quantization="int4", num_spans=2),
    case("v5e", "llama-3.3-70b", 8, quantization="int4", num_spans=2),
    case("h100", "qwen3-32b", 1, quantization="fp8", num_spans=2),
]


@pytest.mark.parametrize("case", QUANTISED)
def test_spans_of_quantised_weights(case: Case):
    """They fit, the pool is handed on from span to span, and a layer costs two sums."""
    tokens = 64
    lowering, config = lower(case), model(case.preset, case.layers)
    embed, span, finish = backbone_jobs(lowering, tokens).items()
    # What is before and after the spans differs from what it always is only where it is split.
    compiled = compile_step(lowering, dict([embed, span, finish] if case.tensor > 1 else [span]))
    programs = compiled.programs
    hidden = tokens * config.hidden_size * BFLOAT16.itemsize
    memory, used = programs[span[0]].memory_analysis(), compiled.bytes
    assert memory is not None
    assert memory.alias_size_in_bytes >= used.kv_pages + hidden
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**20
    # XLA writes the numbers of groups out before it multiplies, those of a weight at a time.
    largest = max(param.size for param in parameters_of(config).values()) / case.tensor
    is_grouped = case.quantization == "int4"
    assert memory.temp_size_in_bytes < (4 * largest if is_grouped else used.kv_pages / 10)
    sums = collectives(programs[span[0]])
    assert len(sums) == (2 if case.tensor > 1 else 0)
    assert {(c.kind, c.shape) for c in sums} <= {("all-reduce", (tokens, config.hidden_size))}
    if case.tensor > 1:
        looked_up = collectives(programs[embed[0]])
        assert {c.kind for c in looked_up} == {"all-reduce"}
        assert len(looked_up) == 2, "not codes and scales"
        assert not collectives(programs[finish[0]])
    assert_fits(case, used)


@pytest.mark.parametrize("case", [QUANTISED[0]])
def test_a_quantised_embedding_is_not_copied_for_one_row(case: Case):
    memory = lower(case).embed(1).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.parametrize("case", [case("v5e", "llama-3.1-8b", 1, dtype="float32")])
def test_a_tpu_takes_float32_weights_and_bfloat16_kv(case: Case):
    compiled = backbone(case, 64)
    hidden = 2 * 64 * model(case.preset, case.layers).hidden_size * 4  # and that of all rows
    assert lower(case).kv_pages.dtype == BFLOAT16
    assert_in_place(compiled.programs["backbone-64"], compiled.bytes.kv_pages, hidden)


@pytest.mark.parametrize(
    "case",
    [
        case("v5e", "smollm2-135m", 1),
        case("v5p", "llama-3.1-8b", 8),
        case("h100", "llama-3.1-8b", 1),
    ],
)
def test_sampler(case: Case):
    """What it exchanges is a few numbers for each row, of the vocabulary nothing."""
    config = model(case.preset, case.layers)
    lowering = lower(case)
    program = lowering.sampler(MAX_ROWS).compile()
    found = collectives(program)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    assert all(c.size <= case.tensor * MAX_ROWS for c in found)
    if case.tensor > 1:
        assert any(c.kind == "all-gather" and c.dtype == "f32" for c in found), "no maximum"
    else:
        assert not found
    memory = program.memory_analysis()
    assert memory is not None
    logits = MAX_ROWS * config.vocab_size * 4 // case.tensor
    assert memory.temp_size_in_bytes < 6 * logits


@pytest.mark.parametrize("case", [case("v5e", "llama-3.1-8b", 4), case("h100", "llama-3.1-8b", 1)])
@pytest.mark.parametrize("kind", ["late_logits", "edit_logits", "late_draw", "token_logprobs"])
def test_late_programs(case: Case, kind: str):
    """Between them logits stay where they are: what devices exchange is some numbers per row."""
    lowering = lower(case)
    program = getattr(lowering, kind)(MAX_ROWS).compile()
    found = collectives(program)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    assert all(c.size <= case.tensor * MAX_ROWS * MAX_LOGPROBS for c in found)
    assert bool(found) == (case.tensor > 1 and kind in ("late_draw", "token_logprobs"))
    memory = program.memory_analysis()
    assert memory is not None
    logits = MAX_ROWS * model(case.preset, 2).vocab_size * 4 // case.tensor
    assert memory.temp_size_in_bytes < 6 * logits


@pytest.mark.parametrize("case", [case("v5e", "gemma3-27b", 4), case("h100", "gemma3-27b", 1)])
def test_what_does_not_fit_is_seen_without_compiling(case: Case):
    whole = lower(case._replace(layers=None, num_pages=SERVED_PAGES))
    room = hbm_bytes(whole.rules.mesh.devices.flat[0]) * USABLE
    assert bytes_per_device((whole.params, whole.kv_pages)) > room


@pytest.mark.parametrize("topology", ["v5e:2x3", "v99:2x2"])
def test_no_such_slice(topology: str):
    pytest.importorskip("libtpu", reason="needs libtpu, TPUs' compiler")
    with pytest.raises(ConfigError, match=f"there is no TPU slice '{topology}'"):
        abstract_tpu_devices(topology)
