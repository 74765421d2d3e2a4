"""Rows as an aligned text table: the one table printer of the commands."""
from typing import Any


def format_cell(value: Any) -> str:
    """Numbers to three digits or more, thousands with separators; a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def format_table(rows: list[dict]) -> str:
    """Rows as text, with a column for each key that any row has. The first is aligned left."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        lines.append([format_cell(row.get(name)) for name in names])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(format_line(line, widths) for line in lines)


def format_line(cells: list[str], widths: list[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
    return "  ".join(padded).rstrip()
