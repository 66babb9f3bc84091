"""Profiles on demand, for whoever administers the server."""

from pathlib import Path

from fastapi import APIRouter

from jaxserve.core.errors import PermissionDenied
from jaxserve.server.context import ServerContext

DEFAULT_SECONDS = 3.0


async def capture_profile(context: ServerContext, seconds: float = DEFAULT_SECONDS) -> Path:
    """Profile the running engine into the server's `profile_dir`.

    Args:
        context: the server's.
        seconds: how long.

    Returns:
        The folder under which the files are.

    Raises:
        PermissionDenied: the server has no folder for profiles.
        Draining: there is no engine yet.
        InvalidRequest, ConfigError: as `AsyncEngine.profile`.
    """
    directory = context.observability.options.profile_dir
    if directory is None:
        raise PermissionDenied(
            "this server takes no profiles: it was started without --profile-dir"
        )
    engine = context.engine_for()
    await engine.profile(seconds, directory)
    return directory


def profile_router(context: ServerContext) -> APIRouter:
    """`POST /admin/profile?seconds=3`; for the admin surface only."""
    router = APIRouter()

    @router.post("/admin/profile")
    async def post_profile(seconds: float = DEFAULT_SECONDS) -> dict[str, object]:
        """Take a profile; answers when its files are written."""
        directory = await capture_profile(context, seconds)
        return {"directory": str(directory), "seconds": seconds}

    return router
