"""What a benchmark came to, and tables for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Row = TypeVar("Row")


class Result:
    """Base of what benchmarks return: dataclasses whose text are their tables.

    Their fields, as `dataclasses.asdict` gives them, are what `--output-json` writes.
    """

    @property
    def failed(self) -> bool:
        """Whether the command is to end with 1."""
        return False


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first to the left, the others to the right.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"rows must have {len(header)} cells, as the header has")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def tabulate(
    corner: str, rows: Mapping[str, Row], columns: Mapping[str, Callable[[Row], object]]
) -> str:
    """`format_table` of things by name.

    Args:
        corner: heads the names.
        rows: what each row shows, by its name.
        columns: what a cell says of its row, by the column's heading.
    """
    cells = [(name, *(str(cell(row)) for cell in columns.values())) for name, row in rows.items()]
    return format_table((corner, *columns), cells)
