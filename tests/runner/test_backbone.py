"""Which programs make a token bucket, and what each of them is given."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.backend import KernelBackend
from jaxserve.models.config_readers import from_preset
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.backbone import Backbone
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_program import StepProgram


class Recorder:
    """Stands for a compiled program: remembers what it is called with."""

    def __init__(self, *results: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._results = results

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        [*results] = self._results
        return results if len(results) > 1 else results.pop()


@pytest.fixture(scope="module")
def lowering() -> StepLowering:
    """Six layers in spans of two, two and two, for 8 and for 16 tokens."""
    config, rules = shard_model(from_preset("smollm2-135m").layers(0, 6), make_mesh(""))
    buckets = Buckets((8, 16), (8,), max_rows=8, max_pages=8)
    program = StepProgram(ModelGraph(config), KernelBackend(rules, "xla"), buckets, 3)
    return StepLowering(program, jnp.dtype("float32"), 64, 8, jnp.dtype("float32"))


def weights(lowering: StepLowering, version: str) -> dict[str, Any]:
    return {name: f"{name} of {version}" for name in lowering.params}


def test_a_bucket_is_there_once_all_its_programs_are(lowering: StepLowering):
    backbone = Backbone(lowering, weights(lowering, "A"))
    program: Any = Recorder(None)
    for name, buckets in {
        "embed-16": (), "span-0-8": (), "span-0-16": (), "finish-16": (16,), "finish-8": (16,),
        "sampler-8": (16,), "embed-8": (8, 16),
    }.items():  # fmt: skip
        backbone.use({name: program})
        assert backbone.buckets == buckets


def test_each_program_gets_its_own_weights_and_those_held_last(lowering: StepLowering):
    embed, span, finish = Recorder("x"), Recorder("x", "pool"), Recorder("rows", "how", "all")
    backbone = Backbone(lowering, weights(lowering, "A"))
    programs: dict[str, Any] = {"embed-8": embed, "span-0-8": span, "finish-8": finish}
    backbone.use(programs)
    packed = np.zeros(lowering.packed(8).shape, np.int32)
    kv_pages: Any = "pool"
    last_tokens: Any = "last"
    for version in "AB":
        backbone.hold(weights(lowering, version))
        out = backbone.run(8, kv_pages, last_tokens, packed)
        assert tuple(out) == ("pool", "rows", "how", "all")
        assert embed.calls.pop()[0] == {"embed": f"embed of {version}"}
        assert finish.calls.pop()[0] == {"final_norm": f"final_norm of {version}"}
        assert [int(first) for _, first, *_ in span.calls] == [0, 2, 4]
        downs = [(one["layers.0.down"], one["layers.1.down"]) for one, *_ in span.calls]
        names = [f"layers.{n}.down of {version}" for n in range(6)]
        assert downs == list(zip(names[::2], names[1::2], strict=True))
        span.calls.clear()
