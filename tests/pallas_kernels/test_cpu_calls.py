"""Custom calls on CPUs: products in registers, XLA's threads, and where the code is kept."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from pallas_kernels.cpu_calls.code_cache import code_cache
from pallas_kernels.cpu_calls.handler import (
    begins,
    data,
    does,
    ends,
    make_handler,
    operand,
    register,
    result,
    size,
)
from pallas_kernels.cpu_calls.memory import allocate, ints, words
from pallas_kernels.cpu_calls.products import ROWS, make_dots, make_sums, multiply_add
from pallas_kernels.cpu_calls.tiles import FP8_SCALE, LANES, Kind, vectors_of


@njit
def _multiply_add(out, a, b, rows, count, columns):  # type: ignore[no-untyped-def]
    multiply_add(
        out.ctypes.data, out.shape[1], a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[1],
        rows, count, columns,
    )  # fmt: skip


def on_arrays(product: Any) -> Any:
    """A product of addresses as one of arrays, with something to fetch that is nobody's memory."""

    @njit
    def call(out, a, b, rows, columns, count):  # type: ignore[no-untyped-def]
        product(
            out.ctypes.data, out.shape[1], a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[1],
            rows, columns, count, 64,
        )  # fmt: skip

    return call


KINDS = get_args(Kind)
_dots = {kind: on_arrays(make_dots(kind)) for kind in KINDS}
_sums = {kind: on_arrays(make_sums(kind)) for kind in KINDS}


def split(x: np.ndarray) -> np.ndarray:
    """Of every 2 * LANES columns those at even places come first; what is left over stays."""
    whole = x.shape[1] // (2 * LANES) * 2 * LANES
    pairs = x[:, :whole].reshape(len(x), whole // (2 * LANES), LANES, 2)
    return np.concatenate([pairs.swapaxes(2, 3).reshape(len(x), whole), x[:, whole:]], axis=1)


def held(x: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """The nearest numbers of a kind: as they lie in memory, and as float32 of the products."""
    if kind == "int8":
        codes = np.rint(3 * x).astype(np.int8)
        return codes, codes.astype(np.float32)
    if kind == "fp8":  # subnormal ones among them
        near = np.where(abs(x) < 0.3, x / 64, x).astype(ml_dtypes.float8_e4m3fn)
        return near.view(np.int8), near.astype(np.float32) / FP8_SCALE
    near = x.astype(jnp.bfloat16 if kind == "bfloat16" else np.float32)
    return near.view(np.uint16) if kind == "bfloat16" else near, near.astype(np.float32)


SIZES = st.tuples(st.integers(1, 9), st.integers(0, 37), st.integers(1, 6), st.integers(0, 5))


@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_multiply_add(sizes: tuple[int, int, int, int], seed: int):
    """Also inside wider arrays, whose other numbers are not touched."""
    quads, count, vectors, margin = sizes
    rows, columns = quads * ROWS, vectors * LANES
    draw = np.random.default_rng(seed).standard_normal
    a, b = draw((rows, count + margin), np.float32), draw((count, columns + margin), np.float32)
    out = draw((rows, columns + margin), np.float32)
    expected = out.copy()
    expected[:, :columns] += a[:, :count] @ b[:, :columns]
    _multiply_add(out, a, b, rows, count, columns)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(out[:, columns:], expected[:, columns:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_sums(kind: Kind, sizes: tuple[int, int, int, int], seed: int):
    rows, count, vectors, margin = sizes
    columns = vectors * LANES * vectors_of(kind)
    draw = np.random.default_rng(seed).standard_normal
    a, b = draw((rows, count + margin), np.float32), draw((count, columns + margin), np.float32)
    out = draw((rows, columns + margin), np.float32)
    expected = out.copy()
    given_b, b = held(b, kind)
    if kind == "bfloat16":
        b = split(b)
    expected[:, :columns] += a[:, :count] @ b[:, :columns]
    _sums[kind](out, a, given_b, rows, columns, count)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(out[:, columns:], expected[:, columns:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_dots(kind: Kind, sizes: tuple[int, int, int, int], seed: int):
    rows, columns, vectors, margin = sizes
    count = vectors * LANES * vectors_of(kind)
    draw = np.random.default_rng(seed).standard_normal
    a, b = draw((rows, count + margin), np.float32), draw((columns, count + margin), np.float32)
    out = draw((rows, columns + margin), np.float32)
    given_a = split(a) if kind == "bfloat16" else a
    given_b, b = held(b, kind)
    expected = out.copy()
    expected[:, :columns] = a[:, :count] @ b[:, :count].T
    _dots[kind](out, given_a, given_b, rows, columns, vectors)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(out[:, columns:], expected[:, columns:])


def make_test_call() -> Any:
    """A call that works as long on item i as its operand's number i says, and adds up how much."""

    @begins()
    def _begin(frame, place):  # type: ignore[no-untyped-def]
        count = size(operand(frame, 0), 0)
        ints(data(result(frame, 0)), count)[:] = 0
        memory = allocate(8)
        words(memory, 1)[0] = count
        words(place, 1)[0] = memory
        return count

    @does()
    def _do(frame, memory, item):  # type: ignore[no-untyped-def]
        """Adds, so that an item done twice shows; items take very different times."""
        work = ints(data(operand(frame, 0)), words(memory, 1)[0])[item]
        total = 0
        for i in range(work):
            total += i % 7
        ints(data(result(frame, 0)), item + 1)[item] += total
        return 0

    @ends()
    def _end(frame, memory):  # type: ignore[no-untyped-def]
        count = words(memory, 1)[0]
        ints(data(result(frame, 1)), 1)[0] = ints(data(result(frame, 0)), count).sum()
        return 0

    return make_handler(_begin, _do, _end)


def test_each_item_is_done_once_whoever_calls():
    """Several programs at once, whose calls share XLA's threads; also calls without any item."""
    with code_cache():
        register("jaxserve_test_call", make_test_call())
    counts = (0, 1, 2, 97)

    @jax.jit
    def call(work: jax.Array) -> Sequence[jax.Array]:
        out = [jax.ShapeDtypeStruct(work.shape, jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)]
        return jax.ffi.ffi_call("jaxserve_test_call", out)(work)

    def check(seed: int) -> None:
        random = np.random.default_rng(seed)
        work = random.integers(0, random.choice([3, 4000]), random.choice(counts))
        expected = work // 7 * 21 + (work % 7) * (work % 7 - 1) // 2
        done, total = call(jnp.asarray(work, jnp.int32))
        np.testing.assert_array_equal(done, expected)
        assert int(total) == expected.sum()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(400)))


@pytest.mark.parametrize(("mode", "is_used"), [(0o700, True), (0o755, True), (0o777, False)])
def test_code_is_only_kept_where_nobody_else_can_put_any(
    mode: int, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = tmp_path / ".cache" / "pallas_kernels"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    with code_cache():
        inside = Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]
        assert (inside.parent == folder) == is_used
    assert before == numba.config.CACHE_DIR  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_absolute", [True, False])
def test_code_is_kept_where_the_user_keeps_caches(
    is_absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A base directory that is not absolute is to be ignored, says the specification."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches") if is_absolute else "caches")
    with code_cache():
        inside = Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]
    home = tmp_path / "caches" if is_absolute else tmp_path / "home" / ".cache"
    assert inside.parent == home / "pallas_kernels"
