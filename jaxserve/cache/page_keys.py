"""What a KV page is called wherever it is kept: a hash of all the tokens up to its end.

A page's key is a hash of its parent's key and its own tokens (chained page hashes, as in vLLM's
automatic prefix caching), and the first parent is a hash of a salt. So equal keys mean equal KV:
the same tokens after the same tokens, for a tenant with whom they may be shared.
"""

import hashlib
import struct
from collections.abc import Sequence

from jaxserve.core.service_params import ServiceParams

KEY_BYTES = 16


def root_key(salt: str = "") -> bytes:
    """The parent of every first page.

    Args:
        salt: all that must not share pages with others: tenant secret, adapter, and the like.
    """
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, person=b"jaxserve.root").digest()


def root_of(service: ServiceParams) -> bytes:
    """The parent of a request's first page: tenants share pages only by a common salt."""
    return root_key(f"salt:{service.cache_salt}" if service.cache_salt else f"of:{service.tenant}")


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as little-endian int32, the same on every machine.

    Raises:
        ValueError: a token is no int32.
    """
    try:
        return struct.pack(f"<{len(tokens)}i", *tokens)  # half the time of numpy's way
    except struct.error as error:
        raise ValueError(f"tokens must be int32: {error}") from error


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds `tokens`, after the page (or root) of key `parent`."""
    data = token_bytes(tokens)
    return hashlib.blake2b(data, digest_size=KEY_BYTES, key=parent).digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], page_size: int) -> None:
    """Append the keys of the full pages that `tokens` fill.

    Args:
        keys: keys of the pages before; extended in place.
        root: the parent of the first page.
        tokens: the tokens from position `len(keys) * page_size` on.
        page_size: tokens per page.
    """
    parent = keys[-1] if keys else root
    data = token_bytes(tokens)  # all at once: page by page takes a sixth longer
    page_bytes = 4 * page_size
    for first in range(0, len(data) - page_bytes + 1, page_bytes):
        page = data[first : first + page_bytes]
        parent = hashlib.blake2b(page, digest_size=KEY_BYTES, key=parent).digest()
        keys.append(parent)
