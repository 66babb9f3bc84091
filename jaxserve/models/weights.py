"""Weights in every form in which a model may hold them, as pytrees.

A weight is an array, or quantised (`pallas_kernels.weights.Quantised`), or `Parts` of which each is
one of these: a parameter that is made of several tensors keeps them apart where their formats
differ. Biases and factors are arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.parameters import Parameter
from jaxserve.parallel.mesh import ShardingRules
from pallas_kernels.weights import Format, Quantised

# How each part of a parameter is held: a format, or None for an array. One entry: all as one.
Storage = tuple[Format | None, ...]
DENSE: Storage = (None,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """A weight [out..., in] in parts that lie one after the other along an axis of outputs.

    Attributes:
        parts: the weights.
        axis: of the outputs, along which they lie.
    """

    parts: tuple[Any, ...]
    axis: int = dataclasses.field(metadata={"static": True})


Weight = jax.Array | Quantised | Parts


def multiply(
    x: jax.Array, weight: Weight, product: Callable[[jax.Array, Any], jax.Array]
) -> jax.Array:
    """x [tokens, in] times a weight [out..., in] -> [tokens, out...].

    Args:
        x: activations.
        weight: in any form.
        product: multiplies by an array or by a quantised weight.
    """
    if not isinstance(weight, Parts):
        return product(x, weight)
    return jnp.concatenate([product(x, part) for part in weight.parts], 1 + weight.axis)


def take_rows(weight: Weight, rows: jax.Array) -> jax.Array:
    """Rows [n, in] of a table [rows, in], in float32 if it is quantised; `rows` is int32 [n]."""
    if isinstance(weight, Parts):
        raise TypeError("a table is in one part")
    count = len(rows)
    if isinstance(weight, Quantised) and count == 1:
        rows = jnp.pad(rows, (0, 1))  # XLA:TPU copies a table of bytes to slice one row out of it
    taken = jax.tree.map(lambda array: jnp.take(array, rows, axis=0, mode="clip"), weight)
    return dense(taken)[:count]


def dense(weight: Any) -> Any:
    """The array that a weight in one part stands for, of NumPy or JAX as it is."""
    return weight.dequantise() if isinstance(weight, Quantised) else weight


def storage_of(weight: Any) -> Storage:
    """How a weight, or the shapes of one, is held."""
    parts = weight.parts if isinstance(weight, Parts) else (weight,)
    return tuple(part.format if isinstance(part, Quantised) else None for part in parts)


def weight_shapes(parameter: Parameter, storage: Storage, dtype: Any = jnp.float32) -> Any:
    """The shapes of a parameter's arrays as it is held: a `Weight` of `jax.ShapeDtypeStruct`.

    Args:
        parameter: its declaration.
        storage: how its parts are held.
        dtype: of arrays that are not quantised.

    Raises:
        ValueError: its inputs cannot be held so.
    """

    def one(shape: tuple[int, ...], format: Format | None) -> Any:
        def array(last: int, kind: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*shape[:-1], last), jnp.dtype(kind))

        inputs = shape[-1]
        if format is None:
            return array(inputs, dtype)
        format.check_inputs(inputs)
        groups = array(format.num_groups(inputs), format.scale)
        values = array(format.value_bytes(inputs), format.value_type)
        return Quantised(values, groups, groups if format.has_minimums else None, format)

    if len(storage) == 1:
        return one(parameter.shape, storage[0])
    axis = parameter.joined
    shapes = [
        (*parameter.shape[:axis], size, *parameter.shape[axis + 1 :])
        for size in parameter.part_sizes
    ]
    return Parts(tuple(one(*pair) for pair in zip(shapes, storage, strict=True)), axis)


def abstract_weight(
    parameter: Parameter, storage: Storage, rules: ShardingRules, dtype: np.dtype
) -> Any:
    """Shapes, types and placements of a parameter as it is held: a `Weight` without values.

    Args:
        parameter: its declaration.
        storage: how its parts are held.
        rules: the mesh, and what is split over it.
        dtype: of arrays that are not quantised.
    """

    def placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = axes_of(array, parameter, parameter.axes)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rules.sharding(*axes))

    return jax.tree.map(placed, weight_shapes(parameter, storage, dtype))


def axes_of(array: Any, weight: Any, axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """Logical axes of one of the arrays that a weight is made of.

    Args:
        array: one of them.
        weight: has the weight's shape.
        axes: of the weight.
    """
    # One scale for all inputs is on every device that has some of them.
    is_shared = array.shape[-1] == 1 != weight.shape[-1]
    return (*axes[:-1], None) if is_shared else tuple(axes)
