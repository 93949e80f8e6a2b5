"""report.html: one page, readable with no network, that says what a run found.

It shows what `result.json` holds, and how far a run has come where only `metrics.jsonl` exists yet. Numbers come from those files; what is
missing there is a dash here. Nothing on the page depends on the clock, so that the same run gives the same bytes. matplotlib is imported
only when a figure is drawn: `import qprune` must not pay for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qprune.errors import CheckpointError
from qprune.files import write_atomically

Result = Mapping[str, Any]

FORMAT = 1
NETWORKS = ("float", "searched", "uniform")
PRUNED, FLOAT = 0, 32

_CSS = """
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
figcaption, .caption { margin: 10px 0 0; color: var(--muted); font-size: 13px; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--muted); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 18px; align-items: start; }
footer { margin-top: 22px; color: var(--muted); font-size: 13px; }
@media print { body { background: none; } section, .tile { break-inside: avoid; } }
"""

# The policy forbids every request: the page stays whole, and private, wherever it is opened.
_PAGE = """<!DOCTYPE html>
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


def get(item: Any, *keys: str) -> Any:
    """item[key][key]..., or None where something on the way is missing or is no mapping."""
    for key in keys:
        item = item.get(key) if isinstance(item, Mapping) else None
    return item


def number(item: Any, *keys: str) -> float | None:
    """The finite number at that place, or None."""
    value = get(item, *keys)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def average(values: Sequence[float | None]) -> float | None:
    """The mean, or None when there is nothing, or something is missing: a mean over fewer seeds than the others would mislead."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """12345678 → "12.3 M" + unit; "–" for a missing value."""
    if value is None:
        return "–"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # From 999.5 up, three digits would round to the next prefix.
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.{digits}g}\u00a0{prefix}{unit}"
    return f"{value:.{digits}g}\u00a0{unit}".strip()


def runs_of(result: Result) -> list[Any]:
    runs = get(result, "runs")
    return list(runs) if isinstance(runs, (list, tuple)) else []


def summary(result: Result, network: str, key: str) -> float | None:
    """A number of the summary ("accuracy_mean", "accuracy_ci95", "bops", "size_bits"); w_bits and a_bits are averaged over the runs."""
    value = number(result, "summary", network, key)
    if value is None and key != "accuracy_ci95":
        name = "accuracy" if key == "accuracy_mean" else key
        value = average([number(run, "networks", network, name) for run in runs_of(result)])
    return value


def budget_label(result: Result) -> str:
    """The budget as it was asked for, for example "budget w3a3"."""
    text = get(result, "budget", "text")
    return f"budget {text}" if text is not None else "budget"


def layers_of(result: Result, run: int = 0) -> list[dict[str, Any]]:
    """The layers in network order, each with what one run chose: w (bits of every filter; None if unknown), a (None if unknown)."""
    rows = []
    policy = get(runs_of(result)[run], "policy") if runs_of(result) else None
    layers = get(result, "layers")
    for layer in layers if isinstance(layers, (list, tuple)) else []:
        chosen = get(policy, str(get(layer, "name")))
        w, a = get(chosen, "w_bits"), number(chosen, "a_bits")
        per_filter = isinstance(w, (list, tuple))
        listed = w if per_filter else [w] * max(1, int(number(layer, "filters") or 1))
        if isinstance(policy, Mapping) and chosen is None:
            listed, a = [FLOAT] * len(listed), float(FLOAT)
        bits = [int(b) for b in listed] if listed and all(number({"b": b}, "b") is not None for b in listed) else None
        rows.append({"name": str(get(layer, "name")), "info": layer, "w": bits, "a": a, "per_filter": per_filter})
    return rows


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; run the search again, or restore the file") from None


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json holds; for an unfinished run {"metrics": [...], "runs": [...]} from metrics.jsonl. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected the folder of a run")
    path, metrics = folder / "result.json", folder / "metrics.jsonl"
    if path.exists():
        result = _read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("runs"), list) or not result["runs"]:
            raise CheckpointError(f"{path} is not the result of a run: expected an object with a list 'runs'")
        if result.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {result.get('format')!r}; this qprune reads format {FORMAT}")
        return result
    if not metrics.exists():
        raise CheckpointError(f"{folder} holds neither result.json nor metrics.jsonl; expected the folder of a run")
    return _read_metrics(metrics)


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            # A line without its newline at the end is one that is being written, or was when the run was killed.
            if index == len(lines) - 1:
                continue
            raise CheckpointError(f"{path}, line {index + 1} is damaged: {error}") from None
        if row is not None and not isinstance(row, dict):
            raise CheckpointError(f"{path}, line {index + 1}: expected an object, got {type(row).__name__}")
        rows += [] if row is None else [row]
    search = [row for row in rows if row.get("phase") == "search"]
    seeds = dict.fromkeys(str(row.get("seed")) for row in search)
    runs = [{"seed": seed, "search_history": [row for row in search if str(row.get("seed")) == seed]} for seed in seeds]
    return {"metrics": rows, "runs": runs}


def _percent(value: float | None, half: float | None = None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f} %" if half is None else f"{100 * value:.{digits}f} ± {100 * half:.{digits}f} %"


def _share(value: float | None, whole: float | None) -> str:
    return "–" if value is None or not whole else f"{100 * value / whole:#.3g}".rstrip(".") + " %"


def _bytes(size_bits: float | None) -> str:
    return si(None if size_bits is None else size_bits / 8, "B")


def _plain(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], numeric: bool = True) -> str:
    """Rows are (class, cells); cells are HTML already. The first column names the row."""
    kind = ' class="n"' if numeric else ' class="text"'
    top = "".join(f'<th scope="col"{kind if i and numeric else ""}>{escape(name)}</th>' for i, name in enumerate(head))
    body = "".join(
        f'<tr class="{name}"><th scope="row">{cells[0]}</th>' + "".join(f"<td{kind}>{cell}</td>" for cell in cells[1:]) + "</tr>\n"
        for name, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _label(result: Result, network: str) -> str:
    label = get(runs_of(result)[0], "networks", network, "label")
    return f'<span class="dot" style="background:var(--{network})"></span>{escape(label if isinstance(label, str) else network)}'


def _results(result: Result) -> str:
    whole, full = summary(result, "float", "bops"), summary(result, "float", "size_bits")
    rows = []
    for network in NETWORKS:
        accuracy, half, bops, size, w, a = (
            summary(result, network, key) for key in ("accuracy_mean", "accuracy_ci95", "bops", "size_bits", "w_bits", "a_bits")
        )
        cells = [_percent(accuracy, half), si(bops), _share(bops, whole), _bytes(size), _share(size, full), _plain(w), _plain(a)]
        rows.append(("main" if network == "searched" else "", [_label(result, network), *cells]))
    head = ("Network", "Test accuracy", "BOPs", "of float", "Size", "of float", "Weight bits", "Activation bits")
    count = len(runs_of(result))
    limits = get(result, "budget", "limits")
    shown = {"bops": lambda value: si(value, "BOPs"), "macs": lambda value: si(value, "MACs"), "size": _bytes, "size_bits": _bytes}
    budget = " and ".join(
        f"at most {shown.get(name, si)(number(limits, name))}" for name in (limits if isinstance(limits, Mapping) else {})
    )
    several = f"Mean over {count} seeds, ± 95 % interval. " if count > 1 else "One seed: no interval can be given. "
    caption = f"{several}BOPs are bit operations per sample; bits are means over weights and over activations."
    caption += f" Budget {escape(str(get(result, 'budget', 'text') or ''))}: {budget}." if budget else ""
    return f'<section><h2>Results</h2>{_table(head, rows)}<p class="caption">{caption}</p>{_seeds(result)}</section>'


def _seeds(result: Result) -> str:
    if len(runs_of(result)) < 2:
        return ""
    rows = [
        ("", [escape(f"seed {get(run, 'seed')}")] + [_percent(number(run, "networks", network, "accuracy")) for network in NETWORKS])
        for run in runs_of(result)
    ]
    return f"<details><summary>Test accuracy of every seed</summary>{_table(('Seed', *NETWORKS), rows)}</details>"


def _tiles(result: Result) -> str:
    accuracy, half, bops, size = (summary(result, "searched", key) for key in ("accuracy_mean", "accuracy_ci95", "bops", "size_bits"))
    reference = " · ".join(f"{name} {_percent(summary(result, name, 'accuracy_mean'))}" for name in ("float", "uniform"))
    limit, times = number(result, "budget", "limits", "bops"), number(result, "summary", "search_in_float_epochs")
    epoch = average([number(run, "seconds", "float_epoch") for run in runs_of(result)])
    within = f" · {_share(bops, limit)} of budget" if bops is not None and limit else ""
    tiles = [
        ("Searched accuracy", _percent(accuracy), "" if half is None else f"± {100 * half:.2f}", reference),
        ("Bit operations", si(bops), "BOPs", f"{_share(bops, summary(result, 'float', 'bops'))} of float{within}"),
        ("Size", _bytes(size), "", f"{_share(size, summary(result, 'float', 'size_bits'))} of float"),
        ("Time of the search", "–" if times is None else f"{times:.1f} ×", "one float epoch", f"a float epoch takes {_seconds(epoch)}"),
    ]
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _tile(name: str, value: str, small: str, sub: str) -> str:
    value = f'<div class="value">{value} <small>{small}</small></div>'
    return f'<div class="tile"><div class="name">{name}</div>{value}<div class="sub">{sub}</div></div>'


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 300 else f"{value / 60:.0f} min"


def _figure(title: str, drawing: Any, prefix: str, caption: str, after: str = "") -> str:
    from qprune.figures import svg

    picture = svg(drawing, prefix).replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return (
        f'<section><h2>{title}</h2><figure><div class="scroll">{picture}</div><figcaption>{caption}</figcaption></figure>{after}</section>'
    )


def _layers(result: Result) -> str:
    rows = []
    for layer in layers_of(result):
        bits, a, info = layer["w"], layer["a"], layer["info"]
        kept = "–" if bits is None else f"{len(bits) - bits.count(PRUNED)} / {len(bits)}"
        used = "–" if bits is None else ", ".join(f"{'float' if b >= FLOAT else b}\u202f×\u202f{bits.count(b)}" for b in sorted(set(bits)))
        activation = "–" if a is None else "float" if a >= FLOAT else f"{a:.0f}"
        kind = escape(str(get(info, "kind") or "–"))
        rows.append(("", [escape(layer["name"]), kind, si(number(info, "macs")), si(number(info, "weights")), kept, used, activation]))
    head = ("Layer", "Kind", "MACs", "Weights", "Filters kept", "Weight bits × filters", "Activation bits")
    return f"<details><summary>The numbers behind these pictures</summary>{_table(head, rows)}</details>" if rows else ""


def _figures(result: Result) -> str:
    from qprune import figures

    runs = runs_of(result)
    first = f"Seed {escape(str(get(runs[0], 'seed')))}, the first of {len(runs)}. " if len(runs) > 1 else ""
    layerwise = not any(layer["per_filter"] for layer in layers_of(result))
    cells = (
        "Choices were made per layer: all filters of a layer have the same bits."
        if layerwise
        else "One cell per filter, sorted by bits; above each column, the filters that are kept."
    )
    gray = " Grey: left in float." if any(FLOAT in (layer["w"] or []) for layer in layers_of(result)) else ""
    faint = "Faint: one point per seed; solid: the mean with its 95 % interval. " if len(runs) > 1 else ""
    others = "Bold line: the first seed; faint lines: the others. " if len(runs) > 1 else ""
    return "\n".join(
        (
            _figure(
                "Accuracy against cost",
                figures.accuracy_cost(result),
                "f1",
                f"{faint}Dashed line: the budget. Up and to the left is better.",
            ),
            _figure(
                "Bits per layer",
                figures.bits_by_layer(result),
                "f2",
                f"{first}Layers in network order; weight bits are means over filters.{gray}",
            ),
            _figure("Bits per filter", figures.bits_by_filter(result), "f3", f"{first}{cells}", _layers(result)),
            _figure(
                "How the choice evolved",
                figures.evolution(result),
                "f4",
                f"{first}{others}Expected values under the gates' probabilities, after every epoch of the search.",
            ),
        )
    )


def _settings(result: Result) -> str:
    seconds = {
        phase: _seconds(average([number(run, "seconds", phase) for run in runs_of(result)]))
        for phase in ("float", "search", "finetune", "uniform")
    }
    parts = []
    for title, table in (("Options", get(result, "options")), ("Time", seconds), ("Environment", get(result, "environment"))):
        rows = (
            [("", [escape(str(key)), escape("–" if value is None else str(value))]) for key, value in table.items()]
            if isinstance(table, Mapping)
            else []
        )
        head = ("Phase", "Mean over seeds") if table is seconds else ("Name", "Value")
        parts.append(f"<section><h2>{title}</h2>{_table(head, rows, numeric=False) if rows else '–'}</section>")
    return f'<div class="pair">{parts[0]}<div>{parts[1]}{parts[2]}</div></div>'


def _unfinished(result: Result) -> str:
    from qprune import figures

    metrics = result["metrics"]
    rows = []
    for seed, phase in dict.fromkeys((str(get(row, "seed")), str(get(row, "phase"))) for row in metrics):
        last = [row for row in metrics if (str(get(row, "seed")), str(get(row, "phase"))) == (seed, phase)][-1]
        epoch = number(last, "epoch")
        cells = ["–" if epoch is None else f"{epoch:.0f}", _plain(number(last, "loss"), 4), _percent(number(last, "accuracy"))]
        rows.append(("", [escape(phase), escape(seed), *cells]))
    note = '<p class="note">This run is unfinished: there is no result yet. The page shows what was recorded so far.</p>'
    table = _table(("Phase", "Seed", "Last epoch", "Loss", "Accuracy"), rows) if rows else "–"
    parts = [note, f"<section><h2>Progress</h2>{table}</section>"]
    parts.append(_figure("Training so far", figures.progress(result), "f1", "Accuracy and loss after every epoch; one line per seed."))
    if runs_of(result):
        parts.append(
            _figure(
                "How the choice evolves", figures.evolution(result), "f4", "Expected values under the gates' probabilities; first seed."
            )
        )
    return "\n".join(parts)


def _page(result: Result) -> str:
    model, data, method = (get(result, "options", key) for key in ("model", "data", "method"))
    title = f"{model or 'network'} on {data}" if data else str(model or "Run")
    title = escape(f"Bit search: {title}" if "metrics" not in result else "Bit search (unfinished)")
    count = len(runs_of(result))
    facts = [budget_label(result), f"method {method}" if method else "", f"{count} seeds" if count > 1 else "1 seed"]
    verdict = get(result, "summary", "verdict")
    if "metrics" in result:
        body = _unfinished(result)
    else:
        body = (
            f'<p class="verdict">{escape(str(verdict or "–"))}</p>{_tiles(result)}{_results(result)}{_figures(result)}{_settings(result)}'
        )
    line = "" if "metrics" in result else f"<p>{escape(' · '.join(filter(None, facts)))}</p>"
    return _PAGE.format(title=title, css=_CSS, line=line, body=body)


def write_report(folder: Path) -> Path:
    """Write folder/report.html from what the run left there, and return its path. Raises CheckpointError on a missing or damaged run."""
    path = Path(folder) / "report.html"
    write_atomically(path, _page(read_result(Path(folder))).encode("utf-8", "replace"))
    return path


def plot(run: Path | str | Result) -> dict[str, Any]:
    """The figures of a finished run, matplotlib Figures by name, from its folder or its result. Raises CheckpointError as write_report."""
    from qprune import figures

    return figures.plot(run if isinstance(run, Mapping) else read_result(Path(run)))


report = write_report
