"""What pages of results are made of: style sheet, outermost markup, tables, tiles, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

CSS = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --ink: #1f2a37; --muted: #5d6875; --grid: #dde3ea; --empty: #f0f2f5;
  --float: #7a8594; --searched: #d55e00; --uniform: #0072b2; --note: #fff6df; --note-ink: #6b4b00;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --page: #10151c; --card: #1a212b; --ink: #e3e8ee; --muted: #9aa6b4; --grid: #323c49;
  --empty: #252e3a;  --float: #a3aebb; --searched: #f08a3c; --uniform: #56b4e9; --note: #3a2f14; --note-ink: #f3d99a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 48px; }
header p { margin: 4px 0 0; color: var(--muted); }
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 17px; }
.verdict { margin: 18px 0 0; padding-left: 14px; border-left: 4px solid var(--searched); font-size: 18px; line-height: 1.45; }
.note { margin: 18px 0 0; padding: 10px 14px; border-radius: 8px; background: var(--note); color: var(--note-ink); }
section, .tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
section { margin-top: 18px; padding: 20px 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(235px, 1fr)); gap: 14px; margin-top: 22px; }
.tile { padding: 14px 18px; }
.tile .name, .tile .sub { color: var(--muted); font-size: 13px; }
.tile .value { font-size: 25px; font-weight: 600; line-height: 1.35; }
.tile .value small { font-size: 15px; font-weight: 400; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px 7px 0; text-align: left; border-bottom: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--muted); font-size: 13px; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.n { text-align: right; padding-left: 12px; }
td.text { white-space: normal; overflow-wrap: anywhere; }
tr.main > * { font-weight: 650; }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 9px; border-radius: 50%; }
@media (max-width: 800px) { main { padding: 20px 14px; } section { padding: 16px; } table, thead th { font-size: 12px; }
  th, td { padding-right: 6px; } .n { padding-left: 2px; } thead th { white-space: normal; } }
figure { margin: 0; }
figure svg { display: block; width: 100%; min-width: 600px; height: auto; }
figure svg text { font-family: inherit !important; }
.caption + .scroll { margin-top: 22px; }
figcaption, .caption { margin: 10px 0 0; color: var(--muted); font-size: 13px; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--muted); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 18px; align-items: start; }
footer { margin-top: 22px; color: var(--muted); font-size: 13px; }
@media print { body { background: none; } section, .tile { break-inside: avoid; } }
"""

# The policy forbids every request: the page stays whole, and private, wherever it is opened.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{line}</header>
{body}
<footer>Written by qprune.</footer>
</main>
</body>
</html>
"""


def percent(value: float | None, half: float | None = None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f} %" if half is None else f"{100 * value:.{digits}f} ± {100 * half:.{digits}f} %"


def html_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], numeric: bool = True) -> str:
    """Rows are (class, cells); cells are HTML already. The first column names the row."""
    kind = ' class="n"' if numeric else ' class="text"'
    top = "".join(f'<th scope="col"{kind if i and numeric else ""}>{escape(name)}</th>' for i, name in enumerate(head))
    body = "".join(
        f'<tr class="{name}"><th scope="row">{cells[0]}</th>' + "".join(f"<td{kind}>{cell}</td>" for cell in cells[1:]) + "</tr>\n"
        for name, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def html_tile(name: str, value: str, small: str, sub: str) -> str:
    value = f'<div class="value">{value} <small>{small}</small></div>'
    return f'<div class="tile"><div class="name">{name}</div>{value}<div class="sub">{sub}</div></div>'


def duration(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 300 else f"{value / 60:.0f} min"


def figure_section(title: str, drawing: Any, prefix: str, caption: str, after: str = "") -> str:
    from qprune.drawing import svg

    picture = svg(drawing, prefix).replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return (
        f'<section><h2>{title}</h2><figure><div class="scroll">{picture}</div><figcaption>{caption}</figcaption></figure>{after}</section>'
    )
