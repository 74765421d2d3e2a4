"""TODO."""
from typing import Any


def format_cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def format_table(rows: list[dict]) -> str:
    """Rows as text, a column for each key that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[format_cell(row.get(name)) for name in names] for row in rows]
    wide = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide))).rstrip() for line in cells)
