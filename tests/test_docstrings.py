"""A docstring's first line names its subject; it needs no neighbour to be understood."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A line that begins with three quotes begins a docstring, which is cheaper to find than by parsing.
POINTS_ELSEWHERE = re.compile(
    r'^ *r?"""(?:The same|Likewise|See|Nothing is kept)\b.*', re.MULTILINE
)


@pytest.mark.parametrize("package", ["jaxserve", "pallas_kernels"])
def test_no_docstring_begins_by_pointing_elsewhere(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for line in POINTS_ELSEWHERE.findall(file.read_text("utf-8"))
    ]
    assert not found, "\n".join(["say what it is and does:", *found])
