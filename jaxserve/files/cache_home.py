"""Where jaxserve keeps things between starts, if no option says otherwise."""

import os
from pathlib import Path


def cache_home(folder: str) -> Path:
    """`$XDG_CACHE_HOME/jaxserve/<folder>`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxserve" / folder
