import pytest

from jaxserve.bench.tables import format_table


def test_columns_fit_their_widest_cell() -> None:
    text = format_table(("side", "ms"), [("a", "1.5"), ("longer", "10000")])
    assert text.splitlines() == [
        "side       ms",
        "-------------",
        "a         1.5",
        "longer  10000",
    ]


def test_a_row_must_have_all_cells() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        format_table(("a", "b"), [("1",)])
