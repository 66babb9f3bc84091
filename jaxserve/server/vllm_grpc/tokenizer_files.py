"""The served tokenizer's files as one ZIP archive, for gateways that tokenize themselves."""

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from smg_grpc_proto.generated import common_pb2

from jaxserve.tokenizers.base import Tokenizer

CHUNK_BYTES = 64 * 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that ZIP knows; equal files make equal archives


def tokenizer_archive(tokenizer: Tokenizer) -> bytes:
    """A ZIP archive of the files that a tokenizer is saved as (tokenizer.json and so on)."""
    buffer = io.BytesIO()
    with (
        tempfile.TemporaryDirectory(prefix="jaxserve-tokenizer-") as folder,
        zipfile.ZipFile(buffer, "w") as archive,
    ):
        tokenizer.save(Path(folder))
        for path in sorted(Path(folder).iterdir()):
            member = zipfile.ZipInfo(path.name, _EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, path.read_bytes())
    return buffer.getvalue()


def archive_chunks(archive: bytes) -> Iterator[common_pb2.GetTokenizerChunk]:
    """An archive in pieces, the last of which has the SHA-256 of the whole."""
    for start in range(0, len(archive), CHUNK_BYTES):
        data = archive[start : start + CHUNK_BYTES]
        is_last = start + CHUNK_BYTES >= len(archive)
        digest = hashlib.sha256(archive).hexdigest() if is_last else ""
        yield common_pb2.GetTokenizerChunk(data=data, sha256=digest)
