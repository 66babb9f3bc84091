"""Programs come from disk at the second start, and surprises after READY are noticed."""

import errno
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.errors import CompileAfterReady, ConfigError
from jaxserve.files.sealed_files import SealedFiles
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.program_cache import CompileWatch, ProgramCache

X = np.arange(7, dtype=np.float32)


def lower(factor: int = 3) -> jax.stages.Lowered:
    def multiply(x: jax.Array) -> jax.Array:  # a new one each time: JAX remembers functions
        return x * factor

    return jax.jit(multiply).lower(X)


def programs(directory: Path) -> list[Path]:
    """The files of programs, without the notes that name them."""
    return list(directory.glob("*.xla"))


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    counter = CompileCounter()
    watch = CompileWatch(counter)
    yield counter
    watch.close()


def test_the_second_start_compiles_nothing(tmp_path: Path, counter: CompileCounter):
    first = ProgramCache(tmp_path, {"size": 1}).get("triple", lower)
    assert counter.before_ready == 1
    lowered = []
    second = ProgramCache(tmp_path, {"size": 1}).get("triple", lambda: lowered.append(1) or lower())
    assert counter.before_ready == 1 and not lowered
    np.testing.assert_array_equal(np.asarray(first(X)), X * 3)
    np.testing.assert_array_equal(np.asarray(second(X)), X * 3)
    assert counter.before_ready == 1


def test_what_settings_do_not_change_is_compiled_once(tmp_path: Path, counter: CompileCounter):
    for name, size, compiled in (("triple", 1, 1), ("other", 1, 2), ("triple", 2, 2)):
        program = ProgramCache(tmp_path, {"size": size}).get(name, lower)
        np.testing.assert_array_equal(np.asarray(program(X)), X * 3)
        assert counter.before_ready == compiled == len(programs(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2 + 3
    for name, size in (("triple", 1), ("other", 1), ("triple", 2)):
        ProgramCache(tmp_path, {"size": size}).get(name, pytest.fail)  # nothing is traced


def test_another_program_of_the_same_name_is_another(tmp_path: Path, counter: CompileCounter):
    ProgramCache(tmp_path, {"factor": 3}).get("multiply", lower)
    program = ProgramCache(tmp_path, {"factor": 5}).get("multiply", lambda: lower(5))
    np.testing.assert_array_equal(np.asarray(program(X)), X * 5)
    assert counter.before_ready == 2 == len(programs(tmp_path))


def test_large_constants_tell_programs_apart(tmp_path: Path):
    """A printer that leaves them out would make one program of these."""
    zeros = np.zeros(10_007, np.float32)

    def get(constant: np.ndarray, changed: int) -> jax.stages.Compiled:
        cache = ProgramCache(tmp_path, {"changed": changed})
        return cache.get("add", lambda: jax.jit(lambda x: x + constant).lower(zeros))

    for changed in (0, 5_003, 10_006):
        constant = zeros.copy()
        constant[changed] = 1
        program = get(constant, changed)
        np.testing.assert_array_equal(np.asarray(program(zeros)), constant)


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_the_compiler_s_flags_are_part_of_what_is_asked_for(
    name: str, tmp_path: Path, counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
):
    ProgramCache(tmp_path, {}).get("triple", lower)
    monkeypatch.setenv(name, "--xla_of_another_mind")
    ProgramCache(tmp_path, {}).get("triple", lower)
    assert counter.before_ready == 2
    monkeypatch.undo()
    ProgramCache(tmp_path, {}).get("triple", lower)
    assert counter.before_ready == 2


def test_the_same_program_on_other_devices_is_another(tmp_path: Path):
    def get(ids: list[int]) -> jax.stages.Compiled:
        mesh = jax.sharding.Mesh([jax.devices()[i] for i in ids], ("tensor",))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
        x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)
        cache = ProgramCache(tmp_path, {"devices": ids}, ids)
        return cache.get("double", lambda: jax.jit(lambda x: x * 2).lower(x))

    for ids in ([0, 1], [2, 3], [1, 0]):
        (sharding,), _ = get(ids).input_shardings
        assert [device.id for device in sharding.mesh.devices] == ids
    assert len(programs(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_recompiled_and_replaced(
    damage: str, tmp_path: Path, counter: CompileCounter, caplog: pytest.LogCaptureFixture
):
    ProgramCache(tmp_path, {}).get("triple", lower)
    (file,) = programs(tmp_path)
    whole = file.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "garbage": b"x" * 99, "empty": b""}
    file.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        program = ProgramCache(tmp_path, {}).get("triple", lower)
    np.testing.assert_array_equal(np.asarray(program(X)), X * 3)
    assert counter.before_ready == 2
    assert "ignoring the cached program triple" in caplog.text
    assert len(programs(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 2
    ProgramCache(tmp_path, {}).get("triple", pytest.fail)


def test_files_in_each_other_s_place_are_recompiled_and_replaced(
    tmp_path: Path, counter: CompileCounter, caplog: pytest.LogCaptureFixture
):
    """Programs swapped, then the notes that name them: each is whole, and wrong."""
    factors = {"triple": 3, "quintuple": 5}

    def get(name: str) -> np.ndarray:
        cache = ProgramCache(tmp_path, {})
        return np.asarray(cache.get(name, lambda: lower(factors[name]))(X))

    for suffix, compiled in ((".xla", 4), (".note", 4)):
        for name in factors:
            get(name)
        one, other = tmp_path.glob(f"*{suffix}")
        one.rename(tmp_path / "aside")
        other.rename(one)
        (tmp_path / "aside").rename(other)
        caplog.clear()
        for _ in range(2):
            for name, factor in factors.items():
                np.testing.assert_array_equal(get(name), X * factor)
        assert counter.before_ready == compiled
        assert caplog.text.count("in another's place") == 2, "said once per file: it is replaced"


def test_a_file_of_another_jax_is_recompiled_and_replaced(
    tmp_path: Path, counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
):
    """Neither taken for this version's, nor fatal where its insides are not what they seem."""
    with monkeypatch.context() as patched:
        patched.setattr(jax, "__version__", "0.0.1")
        ProgramCache(tmp_path, {}).get("triple", lower)
    ProgramCache(tmp_path, {}).get("triple", lower)
    assert counter.before_ready == 2 == len(programs(tmp_path))
    for file in programs(tmp_path):
        SealedFiles(tmp_path).write(file.name, pickle.dumps(([0], b"another form")))
    program = ProgramCache(tmp_path, {}).get("triple", lower)
    np.testing.assert_array_equal(np.asarray(program(X)), X * 3)
    ProgramCache(tmp_path, {}).get("triple", pytest.fail)


def test_programs_of_equal_text_are_told_apart_by_how_they_are_called(
    tmp_path: Path, counter: CompileCounter
):
    """As of a tied and an untied model: what is not used is not in the text."""
    tied = {"embed": X}
    untied = {"embed": X, "lm_head": np.zeros(3, np.float32)}
    longer = {"embed": X, "lm_head": np.zeros(4, np.float32)}

    def double(params: dict, name: str) -> dict:
        return {name: params["embed"] * 2}

    asked = [(tied, "a"), (untied, "a"), (longer, "a"), (tied, "b")]
    for i, (params, name) in list(enumerate(asked)) * 2:
        fresh = jax.jit(lambda given, name=name: double(given, name))
        cache = ProgramCache(tmp_path, {"asked": i})
        program = cache.get("double", lambda fresh=fresh, given=params: fresh.lower(given))
        np.testing.assert_array_equal(np.asarray(program(params)[name]), X * 2)
    assert counter.before_ready == len(asked)


def test_without_a_directory_nothing_is_kept(counter: CompileCounter):
    for _ in range(2):
        ProgramCache(None, {}).get("triple", lower)
    assert counter.before_ready == 2


def test_a_directory_that_cannot_be_written_costs_only_time(
    tmp_path: Path, counter: CompileCounter, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("not a directory")
    program = ProgramCache(tmp_path / "file", {}).get("triple", lower)
    np.testing.assert_array_equal(np.asarray(program(X)), X * 3)
    assert "cannot keep compiled programs (triple" in caplog.text


def test_a_full_disk_costs_only_time_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    cache = ProgramCache(tmp_path, {})

    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for name in ("triple", "other"):
        np.testing.assert_array_equal(np.asarray(cache.get(name, lower)(X)), X * 3)
    assert caplog.text.count("No space left on device") == 1 == len(caplog.records)
    assert not list(tmp_path.iterdir()), "a piece of a file was left behind"


def test_the_directory_is_private_and_holds_whole_files_only(tmp_path: Path):
    ProgramCache(tmp_path / "new", {}).get("triple", lower)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert sorted(f.suffix for f in (tmp_path / "new").iterdir()) == [".note", ".xla"]


class Boom:
    """What an attacker would put into a pickle."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a foreign pickle was run",))


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to"):
        ProgramCache(tmp_path, {})


def test_a_file_that_others_may_write_to_is_never_unpickled(
    tmp_path: Path, counter: CompileCounter, caplog: pytest.LogCaptureFixture
):
    ProgramCache(tmp_path, {}).get("triple", lower)
    (file,) = programs(tmp_path)
    file.write_bytes(pickle.dumps(Boom()))
    file.chmod(0o666)
    ProgramCache(tmp_path, {}).get("triple", lower)
    assert counter.before_ready == 2
    assert "others than this user may write to it" in caplog.text


def test_a_program_over_several_devices_survives_the_disk(tmp_path: Path, counter: CompileCounter):
    mesh = jax.sharding.Mesh(jax.devices()[2:6], ("tensor",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    x = jax.device_put(np.arange(8, dtype=np.float32), split)

    def make() -> jax.stages.Lowered:
        return jax.jit(lambda x: jnp.cumsum(x), out_shardings=split).lower(x)

    ProgramCache(tmp_path, {}).get("sum", make)
    before = counter.before_ready
    loaded = ProgramCache(tmp_path, {}).get("sum", make)
    assert counter.before_ready == before
    out = loaded(x)
    assert out.sharding == split
    np.testing.assert_array_equal(np.asarray(out), np.cumsum(np.arange(8)))


@pytest.mark.parametrize("strict", [True, False])
def test_a_compile_after_ready(strict: bool):
    counter = CompileCounter(strict=strict)
    watch = CompileWatch(counter)
    try:
        jax.jit(lambda x: x + 1)(X)
        before = counter.before_ready
        assert before >= 1
        counter.ready()
        if strict:
            with pytest.raises(CompileAfterReady, match="after READY"):
                jax.jit(lambda x: x + 2)(X)
        else:
            jax.jit(lambda x: x + 2)(X)
        assert counter.after_ready == 1 and counter.before_ready == before
    finally:
        watch.close()
    watch.close()
    jax.jit(lambda x: x + 3)(X)
    assert counter.after_ready == 1, "a closed watch still listens"
