"""Collectives are found in a program's text, wherever XLA put them and however it split them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.collectives import Collective, collectives


class Program:
    """Text in the place of a compiled program."""

    def __init__(self, text: str) -> None:
        self._text = text

    def as_text(self) -> str:
        return self._text


def test_a_compiled_program():
    def function(x: jax.Array) -> jax.Array:
        total = lax.psum(x, "tensor")
        gathered = lax.all_gather(x, "tensor", tiled=True)
        turned = lax.fori_loop(
            0, x.astype(jnp.int32)[0], lambda _, y: lax.ppermute(y, "tensor", [(0, 1), (1, 0)]), x
        )
        return total[0] + gathered[-1] + turned

    mesh, spec = make_mesh("tensor=2"), PartitionSpec("tensor")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((14,), jnp.float32)).compile()
    assert set(collectives(compiled)) == {
        Collective("all-reduce", "f32", (7,), True),
        Collective("all-gather", "f32", (14,), True),
        Collective("collective-permute", "f32", (7,), False),
    }


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "%r = (bf16[3,5]{1,0:T(8,128)(2,1)}, f32[7]{0}) all-reduce(%a, %b), to_apply=%add",
            [("all-reduce", "bf16", (3, 5)), ("all-reduce", "f32", (7,))],
        ),
        (
            "%s = bf16[3]{0:T(8,128)S(1)} all-reduce-start(%a), to_apply=%add",
            [("all-reduce", "bf16", (3,))],
        ),
        ("%d = bf16[3]{0} all-reduce-done(%s)", []),
        (
            "%g = (bf16[3,5]{1,0}, bf16[6,5]{1,0}) all-gather-start(%a), dimensions={0}",
            [("all-gather", "bf16", (6, 5))],
        ),
        (
            "%p = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%a)",
            [("collective-permute", "f32", (3,))],
        ),
        ("ROOT %r.1 = f32[] reduce-scatter(%a), to_apply=%add", [("reduce-scatter", "f32", ())]),
        ("%all-reduce.7 = f32[3]{0} fusion(%all-gather.1), calls=%fused", []),
    ],
)
def test_forms(line: str, found: list[tuple]):
    text = f"ENTRY %main (a: f32[3]) -> f32[3] {{\n  {line}\n}}\n"
    program: Program = Program(text)
    assert collectives(program) == [Collective(*array, True) for array in found]  # type: ignore


def test_what_another_core_runs_counts_as_once():
    """TPU7x gives its all-reduces to SparseCores: an asynchronous call of a computation."""
    text = """
%called (p: bf16[3]) -> bf16[3] {
  ROOT %all-reduce.1 = bf16[3]{0} all-reduce(%p), to_apply=%add
}, execution_thread="sparsecore"

%body (p: bf16[5]) -> bf16[5] {
  ROOT %all-reduce.2 = bf16[5]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main (a: bf16[3]) -> bf16[3] {
  %s = ((bf16[3]{0}), bf16[3]{0}) call-start(%a), to_apply=%called
  %w = bf16[5]{0} while(%b), condition=%condition, body=%body
}
"""
    assert collectives(Program(text)) == [  # type: ignore
        Collective("all-reduce", "bf16", (3,), True),
        Collective("all-reduce", "bf16", (5,), False),
    ]
