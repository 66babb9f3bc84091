"""Where jaxserve keeps things between starts, if no option says otherwise."""

import os
from pathlib import Path


def cache_home(folder: str) -> Path:
    """`$XDG_CACHE_HOME/jaxserve/<folder>`, or under `~/.cache`, as where that is not absolute."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "jaxserve" / folder
