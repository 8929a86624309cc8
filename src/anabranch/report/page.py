"""The HTML page: one file that asks for nothing from outside, and follows the reader's light or dark preference."""

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from anabranch import __version__
from anabranch.report.summary import Summary
from anabranch.report.tables import Table, tables
from anabranch.report.words import percent

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Section:
    """One picture with what it shows and how to read it."""

    heading: str
    how_to_read: str
    svg: str


def page(
    title: str, summary: Summary, sentences: Iterable[str], sections: Iterable[Section], extra: Mapping[str, Any]
) -> str:
    """The whole page of a report."""
    return html(
        title,
        extra=extra,
        tiles=_tiles(summary),
        sentences=sentences,
        sections=sections,
        tables=tables(summary),
        facts="summary.json",
    )


def html(
    title: str,
    *,
    extra: Mapping[str, Any],
    tiles: Iterable[tuple[str, str]],
    sentences: Iterable[str],
    sections: Iterable[Section],
    tables: Iterable[Table],
    facts: str,
) -> str:
    """A whole page.

    Args:
        title: its heading.
        extra: shown below it.
        tiles: (number, what it is of), beside each other.
        sentences: what there is to say.
        sections, tables: what there is to see.
        facts: the file that has the same facts.
    """
    return _PAGE.substitute(
        title=escape(title),
        extra=_extra(extra),
        tiles="".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles),
        text="".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        sections="".join(_section(section) for section in sections),
        tables="".join(map(_table, tables)),
        version=escape(__version__),
        facts=escape(facts),
    )


def _section(section: Section) -> str:
    data = base64.b64encode(section.svg.encode()).decode()
    return (
        f"<figure><h2>{escape(section.heading)}</h2><figcaption>{escape(section.how_to_read)}</figcaption>"
        f'<img alt="{escape(section.heading)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _extra(extra: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>" for key, value in extra.items()
    )
    return f"<dl>{items}</dl>" if items else ""


def _tiles(summary: Summary) -> list[tuple[str, str]]:
    layers, worst = summary.layers, summary.worst
    sizes = sorted({layer.num_destinations for layer in layers})
    shape = f"{len(layers)} {TIMES} {sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'}"
    top_k = sorted({layer.top_k for layer in layers})
    idle = sum(layer.idle for layer in layers) / sum(layer.num_destinations for layer in layers)
    tiles = [
        (shape, f"layers {TIMES} experts, top {'/'.join(map(str, top_k))}"),
        (
            f"{max(layer.decisions for layer in layers):,}",
            f"decisions per layer, {summary.items:,} sequences or requests",
        ),
        (_number(worst.max_violation + 1, 1, TIMES), f"fair share on the busiest expert (layer {worst.layer})"),
        (percent(idle), "of experts nearly idle (under a tenth of the fair share)"),
    ]
    reuse = summary.typical("consecutive_reuse")
    if not math.isnan(reuse):
        tiles.append(
            (
                percent(reuse),
                f"of experts shared with the token before ({percent(summary.typical('consecutive_chance'))} by chance)",
            )
        )
    if summary.caches is not None and not summary.caches.is_everything:
        label = f"the active experts: recommended cache (LRU hits {percent(summary.caches.lru)})"
        tiles.append((_number(summary.caches.recommended_ratio, 2, TIMES), label))
    return tiles


def _table(table: Table) -> str:
    kinds = ["text" if column.is_text else "number" for column in table.columns]

    def line(tag: str, values: list[str]) -> str:
        cells = zip(kinds, values, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{kind}">{escape(value)}</{tag}>' for kind, value in cells) + "</tr>"

    head = line("th", [column.heading.replace("\n", " ") for column in table.columns])
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(line("td", list(row)) for row in rows)
    return (
        f"<section><h2>{escape(table.heading)}</h2><p class=note>{escape(table.note)}</p>"
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div></section>'
    )


def _number(value: float, decimals: int, unit: str = "") -> str:
    return DASH if math.isnan(value) else f"{value:.{decimals}f}{unit}"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --page: #fff; --ink: #1f2429; --muted: #5b646d; --line: #dfe3e7; --tile: #f5f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15191d; --ink: #e6e9ec; --muted: #9aa4ae; --line: #343b42; --tile: #1e2429; --accent: #4fb0ec; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 57rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 .3rem; }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.8rem; margin: 0 0 1.5rem; font-size: .9rem; }
dl div { display: flex; gap: .45rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 0 0 1.75rem; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .85rem 1rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { display: block; font-size: .82rem; line-height: 1.35; color: var(--muted); }
.words { border-left: 3px solid var(--accent); padding-left: 1.1rem; margin: 0 0 2.5rem; max-width: 46rem; }
.words p { margin: 0 0 .55rem; }
figure, section { margin: 0 0 2.75rem; }
figcaption, .note { color: var(--muted); font-size: .9rem; margin: 0 0 .9rem; max-width: 46rem; }
img { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.2rem; }
th.text, td.text { text-align: left; }
footer { color: var(--muted); font-size: .82rem; border-top: 1px solid var(--line); padding-top: .9rem; }
@media print { figure { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$extra
<div class="tiles">$tiles</div>
<div class="words">$text</div>
$sections
$tables
<footer>Written by Anabranch $version. The same facts are in $facts, the pictures as PNG beside this page.</footer>
</main>
</body>
</html>
""")
