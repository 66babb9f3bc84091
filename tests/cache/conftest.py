"""What the tests of the page store get ready."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.cache.disk_tier import DiskTier
from tests.cache.harness import disk_of


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskTier]:
    """Six pages on disk."""
    tier = disk_of(tmp_path, 6)
    yield tier
    tier.close()
