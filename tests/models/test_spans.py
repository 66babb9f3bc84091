"""Cutting a model's layers: which spans there are, what belongs to them, which are alike."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxserve.models.backend import KernelBackend
from jaxserve.models.config_readers import from_preset
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.models.spans import choose_num_spans, cut
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_jobs import backbone_jobs
from jaxserve.runner.step_program import StepProgram
from pallas_kernels.weights import Format


@pytest.mark.parametrize("num_spans", [1, 4, 18])
def test_every_parameter_of_a_layer_is_in_one_span(num_spans: int):
    graph = ModelGraph(from_preset("gemma3-270m"))
    names = {name: name for name in graph.parameters}
    spans = cut(graph, num_spans)
    own = [span.own(names) for span in spans]
    assert [name for part in own for name in part.values()] == [
        name for name in names if name.startswith("layers.")
    ]
    windows: tuple[int | None, ...] = ()
    for span, part in zip(spans, own, strict=True):
        config = span.graph.config
        assert span.first == len(windows)
        assert set(part) == {n for n in span.graph.parameters if n.startswith("layers.")}
        windows += config.sliding_window
    assert windows == graph.config.sliding_window


def test_layers_without_rotation_keep_their_places():
    config = dataclasses.replace(from_preset("smollm2-135m"), no_rope_layers=(3, 7, 11))
    kinds = [kind for span in cut(ModelGraph(config), 4) for kind in span.graph.config.rope_kinds]
    assert tuple(kinds) == config.rope_kinds and kinds.count("none") == 3


@pytest.mark.parametrize("num_spans", [0, 31])
def test_no_span_is_empty(num_spans: int):
    with pytest.raises(ValueError, match=f"30 layers cannot be cut into {num_spans} spans"):
        cut(ModelGraph(from_preset("smollm2-135m")), num_spans)


def lowering(preset: str, num_spans: int, storage: dict) -> StepLowering:
    config, rules = shard_model(from_preset(preset), make_mesh(""))
    buckets = Buckets((8,), (8,), max_rows=8, max_pages=8)
    program = StepProgram(ModelGraph(config), KernelBackend(rules, "xla"), buckets, num_spans)
    return StepLowering(program, jnp.dtype("float32"), 64, 8, jnp.dtype("float32"), storage)


INT8 = Format("int8")


@pytest.mark.parametrize(
    ("preset", "num_spans", "storage", "kinds"),
    [
        ("smollm2-135m", 5, {}, (0, 0, 0, 0, 0)),
        ("smollm2-135m", 4, {}, (0, 1, 0, 1)),  # of 7 and 8 layers
        ("gemma3-270m", 3, {}, (0, 0, 0)),  # five local layers and a full one each
        ("gemma3-270m", 6, {}, (0, 1, 0, 1, 0, 1)),
        ("gemma3-27b", 11, {}, (0,) * 10 + (10,)),  # of 62 layers: ten of six, and one of two
        ("smollm2-135m", 5, {"layers.7.down": (INT8,), "embed": (INT8,)}, (0, 1, 0, 0, 0)),
    ],
)
def test_spans_alike_share_a_program(
    preset: str, num_spans: int, storage: dict, kinds: tuple[int, ...]
):
    lowered = lowering(preset, num_spans, storage)
    assert lowered.span_kinds == kinds
    assert [*backbone_jobs(lowered, 8)] == [
        "embed-8", *(f"span-{kind}-8" for kind in sorted(set(kinds))), "finish-8"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "gib", "num_spans"),
    [
        ("smollm2-135m", 0.25, 1),  # a launch would take longer than a span
        ("llama-3.1-8b", 8, 4),
        ("llama-3.1-8b", 1.2, 2),  # of a GiB and a bit, two
        ("llama-3.3-70b", 5, 10),
        ("gemma3-27b", 7, 6),  # five of twelve layers, and one of two
    ],
)
def test_large_models_are_cut_into_spans_that_are_alike(preset: str, gib: float, num_spans: int):
    assert choose_num_spans(from_preset(preset), int(gib * 2**30)) == num_spans
