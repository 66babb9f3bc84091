"""A folder of files that say what they are: each carries its name and a checksum.

So a file that was cut short, damaged, or put in another's place is known for it before anything in
it is used.
"""

import hashlib
import os
import tempfile
from pathlib import Path

from jaxserve.files.private_files import require_private_file

_MAGIC = b"jaxserve sealed 1"


class BrokenSeal(Exception):
    """A file is not what its name promises; the message says how."""


class SealedFiles:
    """Reads and writes sealed files of one folder.

    Args:
        folder: made when the first file is written, for its owner only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if there is none of that name.

        Raises:
            BrokenSeal: it is damaged, or another file under this name.
            OSError: it cannot be read, or others than this user and root could have written it.
        """
        try:
            with (self._folder / name).open("rb") as file:
                require_private_file(file)
                magic, own_name, checksum = (file.readline().rstrip(b"\n") for _ in range(3))
                content = file.read()
        except FileNotFoundError:
            return None
        if magic != _MAGIC:
            raise BrokenSeal("it does not begin as such a file does")
        if own_name != name.encode():
            raise BrokenSeal(f"it is {own_name.decode(errors='replace')} in another's place")
        if checksum != _checksum(content):
            raise BrokenSeal("its checksum is wrong: it was cut short or damaged")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put a file in place, whole or not at all, whatever had the name before.

        Several processes may write the same file at once: one of theirs is there at the end.

        Raises:
            OSError: the folder cannot be written to, or is full; nothing is left behind.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        header = b"\n".join((_MAGIC, name.encode(), _checksum(content), b""))
        handle, path = tempfile.mkstemp(dir=self._folder, prefix=".")
        try:
            with open(handle, "wb") as file:
                file.write(header)
                file.write(content)
            os.replace(path, self._folder / name)
        except BaseException:
            os.unlink(path)
            raise


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
