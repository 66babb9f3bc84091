"""Tiles of bytes: every kind of instructions that this CPU has, against integers."""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import njit

from pallas_kernels.cpu_calls.integer_tiles import (
    SEGMENT,
    byte_dot_tile,
    is_unsigned,
    segment_bytes,
)

ROWS, COLUMNS, SEGMENTS = 2, 4, 3
FEATURES = llvm.get_host_cpu_features()
KINDS: list[Any] = [
    pytest.param("any", 8, ""),
    pytest.param("avx2", 8, "avx2"),
    pytest.param("vnni", 8, "avx512vnni"),
    pytest.param("vnni", 16, "avx512vnni"),
]


def lay_out(codes: np.ndarray, scales: np.ndarray, sums: np.ndarray, parts: int) -> np.ndarray:
    """Rows as tiles take them: codes [rows, inputs], scales of each block's parts, 16 sums."""
    rows = len(codes)
    size = segment_bytes(parts)
    out = np.zeros((rows, SEGMENTS * size + sums.shape[1] * 4), np.uint8)
    halves = codes.reshape(rows, SEGMENTS, 4, 2, 16).swapaxes(2, 3).reshape(rows, SEGMENTS, -1)
    lanes = np.repeat(scales.reshape(rows, SEGMENTS, 4, parts).swapaxes(2, 3), 4, axis=-1)
    segments = out[:, : SEGMENTS * size].reshape(rows, SEGMENTS, size)
    segments[:, :, :SEGMENT] = halves.view(np.uint8)
    segments[:, :, SEGMENT:] = lanes.reshape(rows, SEGMENTS, -1).view(np.uint8)
    out[:, SEGMENTS * size :] = sums.view(np.uint8)
    return out


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("instructions", "lanes", "feature"), KINDS)
def test_tile(instructions: Any, lanes: int, feature: str, parts: int) -> None:
    if feature and not FEATURES.get(feature, False):
        pytest.skip(f"this CPU has no {feature}")
    random = np.random.default_rng(parts)
    inputs, blocks = SEGMENTS * SEGMENT, SEGMENTS * 4 * parts
    x = random.integers(-127, 128, (ROWS, inputs)).astype(np.int8)
    kind = np.uint8 if is_unsigned(instructions) else np.int8
    limits = np.iinfo(kind)
    weights = random.integers(limits.min, limits.max + 1, (COLUMNS, inputs)).astype(kind)
    x[0, :64], weights[0, :64] = 127, limits.max  # what two products together come to at most
    x[1, :64], weights[1, :64] = -127, limits.min
    x_scales, scales = (random.random((n, blocks), np.float32) for n in (ROWS, COLUMNS))
    x_sums, minimums = (random.random((n, 16), np.float32) for n in (ROWS, COLUMNS))
    a = lay_out(x, x_scales, x_sums, parts)
    b = lay_out(weights, scales, minimums, parts)
    tile = byte_dot_tile(ROWS, COLUMNS, parts, instructions, lanes)
    to_sums, registers = SEGMENTS * segment_bytes(parts), 16 // lanes

    @njit
    def call(out, a, b):  # type: ignore[no-untyped-def]
        x, w = a.ctypes.data, b.ctypes.data
        tile(
            out.ctypes.data, COLUMNS, x, a.shape[1], x + to_sums, w, b.shape[1], w + to_sums,
            SEGMENTS, registers,
        )  # fmt: skip

    out = np.zeros((ROWS, COLUMNS), np.float32)
    call(out, a, b)

    def numbers(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
        return codes * np.repeat(factors.astype(np.float64), 32 // parts, axis=1)

    expected = numbers(x, x_scales) @ numbers(weights, scales).T + x_sums @ minimums.T
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * abs(expected).max())
