"""The parts of a self-contained HTML page: sortable tables, charts in SVG, and the document.

A page opens from disk and needs no network: its style, its script and its images are inside it. A
Content-Security-Policy refuses everything else, also a script that text from the data would bring.
All text is escaped here, so callers pass plain strings.
"""
import base64
import hashlib
import html
import math
from collections.abc import Iterable
from typing import Any

from runtime import plots
from runtime.tables import format_cell

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1b1b1b; max-width: 1000px; margin: 0 auto;
       padding: 0 16px 48px; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin: 1.8em 0 .5em; }
p { max-width: 44em; } img, svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9em; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td { overflow-wrap: anywhere; min-width: 5em; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0;
            text-align: left; cursor: pointer; }
th button::after { content: " \\2195"; color: #999; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #000; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #000; }
tr.differs td { background: #fff6d8; }
button:focus-visible { outline: 2px solid #1f5ab4; }
.key { display: inline-block; margin-right: 1.2em; }
.key i { display: inline-block; width: 1.4em; border-top: 3px solid; vertical-align: middle; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }
.samples p { margin: 4px 0; font-size: .9em; }
.sheet { position: absolute; }
.right { color: #176d32; } .wrong { color: #1f4fa0; }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const column = head.cellIndex, rising = head.getAttribute("aria-sort") !== "ascending";
    const key = row => row.cells[column].dataset.number ?? row.cells[column].textContent;
    const compare = (a, b) => key(a).localeCompare(key(b), "en", {numeric: true});
    const number = row => row.cells[column].dataset.number;
    const order = (a, b) => {
      if (number(a) === undefined || number(b) === undefined) return compare(a, b);
      return Number(number(a)) - Number(number(b));
    };
    const rows = [...body.rows].sort((a, b) => rising ? order(a, b) : order(b, a));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    body.append(...rows);
  });
}
"""


def escape(text: Any) -> str:
    """Text for an element or an attribute. What cannot be encoded becomes a question mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def source_hash(text: str) -> str:
    """A script or a style as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(title: str, body: Iterable[str]) -> str:
    """A complete page, from parts that are HTML already."""
    policy = (f"default-src 'none'; img-src data:; script-src {source_hash(SCRIPT)}; "
              "style-src 'unsafe-inline'")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n" + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n")


# ----------------------------------------------------------------------------------- tables
def cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="number" data-number="{value}">{format_cell(value)}</td>'
    return f"<td>{escape('–' if value is None else value)}</td>"


def table(rows: list[dict[str, Any]], mark_differences: bool = False) -> str:
    """Rows as a table that a click on a heading sorts, with a column for each key that any row has.
    mark_differences: colors the rows whose cells after the first are not all equal."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    heads = [f'<th scope="col"><button type="button">{escape(name)}</button></th>'
             for name in names]
    lines = []
    for row in rows:
        values = [row.get(name) for name in names]
        differs = mark_differences and len({str(value) for value in values[1:]}) > 1
        lines.append(f'<tr{" class=differs" * differs}>{"".join(map(cell, values))}</tr>')
    return (f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>'
            + "\n".join(lines) + "</tbody></table></div>")


# ----------------------------------------------------------------------------------- charts
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 64, 12, 22, 40  # pixels


def chart(title: str, lines: dict[str, plots.Line], colors: dict[str, str], x_label: str,
          events: dict[float, str] | None = None, dashed: Iterable[str] = (),
          height: int = 340) -> str:
    """Lines by name over one axis, as SVG. events: vertical lines, {x: text}."""
    lines = {name: finite(line) for name, line in lines.items()}
    lines = {name: line for name, line in lines.items() if line.x}
    if not lines:
        return f"<p>{escape(title)}: no figures yet.</p>"
    x_max = max(max(line.x) for line in lines.values()) or 1
    y_min, y_max = plots.y_limits(list(lines.values()), [])

    def x_pixel(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / x_max, 1)

    def y_pixel(y: float) -> float:
        up = (min(y, y_max) - y_min) / (y_max - y_min)
        return round(TOP + (height - TOP - BOTTOM) * (1 - up), 1)

    def text(x: float, y: float, words: str, anchor: str) -> str:
        return (f'<text x="{x}" y="{y}" font-size="13" fill="#555" text-anchor="{anchor}">'
                f"{escape(words)}</text>")
    parts = [text(0, 13, title, "start")]
    tick = plots.tick_distance(y_max - y_min)
    for n in range(math.ceil(y_min / tick), math.ceil(y_max / tick)):
        y = y_pixel(n * tick)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#e6e6e6"/>')
        parts.append(text(LEFT - 6, y + 4, f"{n * tick:.4g}", "end"))
    tick = plots.tick_distance(x_max)
    for n in range(math.floor(x_max / tick) + 1):
        x = x_pixel(n * tick)
        anchor = "end" if x > WIDTH - 3 * RIGHT else "middle"
        parts.append(text(x, height - BOTTOM + 17, f"{round(n * tick, 9):,.7g}", anchor))
    parts.append(text(WIDTH - RIGHT, height - 5, x_label, "end"))
    for x, name in (events or {}).items():
        if x <= x_max:
            parts.append(f'<path d="M{x_pixel(x)} {TOP}V{height - BOTTOM}" stroke="#999"/>')
            parts.append(text(x_pixel(x) + 4, TOP + 12, name, "start"))
    for name, line in lines.items():
        parts.append(draw_line(name, line, colors[name], name in dashed, x_pixel, y_pixel))
    keys = []
    for name in lines:
        style = "dashed" if name in dashed else "solid"
        keys.append(f'<span class="key"><i style="border-color:{colors[name]};border-top-style:'
                    f'{style}"></i> {escape(name)}</span>')
    return (f'<figure style="margin:1em 0"><svg viewBox="0 0 {WIDTH} {height}" role="img" '
            f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
            f"<figcaption>{' '.join(keys)}</figcaption></figure>")


def rgb(color: tuple[int, int, int], pale: bool = False) -> str:
    """A color as a page names it. pale: a third of it on white."""
    if pale:
        color = tuple((channel + 2 * 255) // 3 for channel in color)
    return "#{:02x}{:02x}{:02x}".format(*color)


def finite(line: plots.Line) -> plots.Line:
    points = [(x, y) for x, y in zip(line.x, line.y) if y is not None and math.isfinite(y)]
    return plots.Line([x for x, _ in points], [y for _, y in points], line.marked)


def draw_line(name: str, line: plots.Line, color: str, dashed: bool, x_pixel: Any,
              y_pixel: Any) -> str:
    """A line. Where it is marked, or has only one point, each point is a dot with its figures
    as tooltip."""
    points = [(x_pixel(x), y_pixel(y)) for x, y in zip(line.x, line.y)]
    path = " ".join(f"{x},{y}" for x, y in points)
    dashes = ' stroke-dasharray="6 5"' if dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>']
    if line.marked or len(points) == 1:
        for (x, y), true_x, true_y in zip(points, line.x, line.y):
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"><title>{escape(name)}: '
                         f"{true_y:.4g} at {true_x:,.0f}</title></circle>")
    return "".join(parts)
