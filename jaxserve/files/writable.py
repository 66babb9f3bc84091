"""Whether a file can be written, found out before hours of work that end with writing it."""

from pathlib import Path

from jaxserve.core.errors import ConfigError


def require_writable(path: Path, option: str) -> None:
    """Make a file's folder, and see that the file can be made or changed; it stays as it was.

    Args:
        path: the file.
        option: what named it, for the message.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: {path} cannot be written: {reason}") from error
