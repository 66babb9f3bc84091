"""Keeps what a predictor learned over a restart: one npz file per model and kind, no pickles."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

MAX_BYTES = 2**28  # in memory: packed zeros take little room in a file
FORMAT = "1"  # part of the fingerprint: another format is another file


def state_path(directory: Path, name: str, fingerprint: str) -> Path:
    """Where the state of the predictor `name` of one model is kept."""
    digest = hashlib.sha256(f"{FORMAT} {fingerprint}".encode()).hexdigest()[:24]
    return directory / f"{name}-{digest}.npz"


def save_state(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name; the file is whole or the old one. A failure is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)
    except OSError as error:
        log.warning("could not keep what the length predictor learned: %s", error)


def load_state(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays by name; None if there is no such file.

    Raises:
        Exception: the file is corrupt. zipfile and numpy raise all kinds, so catch them all.
    """
    try:
        # Opened here: np.load forgets to close what it cannot read.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if sum(entry.file_size for entry in file.zip.infolist()) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES} bytes")
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
