"""Profiles on demand: the rules, and JAX's own profiler."""

import asyncio
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from jaxserve.core.errors import ConfigError, InvalidRequest, PermissionDenied
from jaxserve.engine.profiling import ProfileCapture
from jaxserve.server.context import ServerContext
from jaxserve.server.observability import Observability, ObservabilityOptions
from jaxserve.server.profiling import capture_profile
from jaxserve.server.security.admin import make_admin_app
from jaxserve.testing.fake_engine import fake_engine


class Recorder:
    """A profiler that notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, directory: Path) -> None:
        self.calls.append(f"start {directory.name}")

    def stop(self) -> None:
        self.calls.append("stop")


def test_one_at_a_time(tmp_path: Path) -> None:
    recorder = Recorder()
    capture = ProfileCapture(recorder)

    async def main() -> None:
        first = asyncio.create_task(capture.run(0.2, tmp_path / "a"))
        await asyncio.sleep(0.05)
        with pytest.raises(InvalidRequest, match="being taken"):
            await capture.run(0.1, tmp_path / "b")
        await first
        await capture.run(0.01, tmp_path / "c")

    asyncio.run(main())
    assert recorder.calls == ["start a", "stop", "start c", "stop"]


def test_it_stops_if_the_caller_goes_away(tmp_path: Path) -> None:
    recorder = Recorder()
    capture = ProfileCapture(recorder)

    async def main() -> None:
        task = asyncio.create_task(capture.run(30, tmp_path))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await capture.run(0.01, tmp_path)

    asyncio.run(main())
    assert recorder.calls.count("stop") == 2


@pytest.mark.parametrize("seconds", [0, -1, 61, float("nan"), float("inf")])
def test_lengths_that_are_refused(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="seconds"):
        asyncio.run(ProfileCapture(Recorder()).run(seconds, tmp_path))


def test_without_a_profiler_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no profiler"):
        asyncio.run(ProfileCapture(None).run(1, tmp_path))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="file"):
        asyncio.run(ProfileCapture(Recorder()).run(1, file))


def test_the_admin_route(tmp_path: Path) -> None:
    recorder = Recorder()
    engine = fake_engine(profiler=recorder)
    options = ObservabilityOptions(profile_dir=tmp_path / "profiles")
    context = ServerContext(observability=Observability(options))
    context.engine = engine
    client = TestClient(make_admin_app(context, lambda: None), base_url="http://127.0.0.1")
    try:
        for seconds in ("nan", "inf", "-inf", "-1", "0", "1e300", "61", "x"):
            refusal = client.post(f"/admin/profile?seconds={seconds}")
            assert refusal.status_code == 400
            assert refusal.json()["error"]["param"] == "seconds"
        answer = client.post("/admin/profile?seconds=0.01")
    finally:
        engine.shutdown()
    assert answer.json() == {"directory": str(tmp_path / "profiles"), "seconds": 0.01}
    assert recorder.calls == ["start profiles", "stop"]


def test_refused_unless_a_folder_is_given() -> None:
    with pytest.raises(PermissionDenied, match="--profile-dir"):
        asyncio.run(capture_profile(ServerContext()))


def test_jaxs_profiler_writes_files(tmp_path: Path) -> None:
    import jax
    import jax.numpy as jnp

    from jaxserve.runner.profiler import JaxProfiler

    async def main() -> None:
        profile = asyncio.create_task(ProfileCapture(JaxProfiler()).run(0.2, tmp_path))
        await asyncio.sleep(0.1)
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
        await profile

    asyncio.run(main())
    [file] = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert file.stat().st_size > 0
