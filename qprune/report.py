"""report.html: one page, readable with no network, that says what a run found.

It shows what `result.json` holds, and how far a run has come where only `metrics.jsonl` exists yet. Numbers come from those files; what is
missing there is a dash here. Nothing on the page depends on the clock, so that the same run gives the same bytes. matplotlib is imported
only when a figure is drawn: `import qprune` must not pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from qprune.files import write_atomically
from qprune.page import CSS, PAGE, duration, figure_section, html_table, html_tile, percent
from qprune.result import FLOAT, NETWORKS, PRUNED, Result, average, budget_label, get, layers_of, number, read_result, runs_of, si, summary


def _share(value: float | None, whole: float | None) -> str:
    return "–" if value is None or not whole else f"{100 * value / whole:#.3g}".rstrip(".") + " %"


def _bytes(size_bits: float | None) -> str:
    return si(None if size_bits is None else size_bits / 8, "B")


def _plain(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


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
        cells = [percent(accuracy, half), si(bops), _share(bops, whole), _bytes(size), _share(size, full), _plain(w), _plain(a)]
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
    caption += _damaged(result)
    return f'<section><h2>Results</h2>{html_table(head, rows)}<p class="caption">{caption}</p>{_sizes(result)}{_seeds(result)}</section>'


def _damaged(result: Result) -> str:
    """How many images were left out since they could not be read, and the names of the first; nothing where there were none."""
    found: dict[str, list[Any]] = {}
    for run in runs_of(result):
        parts = get(run, "damaged_images")
        for part, images in parts.items() if isinstance(parts, Mapping) else ():
            found.setdefault(str(part), []).append(images)
    told = []
    for part, of_runs in found.items():
        counts = sorted({int(number(images, "count") or 0) for images in of_runs})
        names = get(of_runs[0], "names")
        some = [str(name) for name in names] if isinstance(names, (list, tuple)) else []
        more = "" if counts[-1] <= len(some) else ", …"
        told.append(f"{' to '.join(str(n) for n in counts[:1] + counts[1:][-1:])} of {part or 'the data'} ({', '.join(some)}{more})")
    return f" Images left out, as they could not be read: {escape('; '.join(told))}." if told else ""


def _sizes(result: Result) -> str:
    """Sizes three ways; nothing for a run that did not measure them."""
    full, rows = summary(result, "float", "size_bits"), []
    for network in NETWORKS:
        parts = [summary(result, network, key) for key in ("size_bits", "index_bits", "codebook_bits")]
        sums = [None if None in parts[: i + 1] else sum(part or 0.0 for part in parts[: i + 1]) for i in range(3)]
        cells = [text for value in sums for text in (_bytes(value), "–" if not value or full is None else f"{full / value:.1f} ×")]
        rows.append(("main" if network == "searched" else "", [_label(result, network), *cells]))
    if all(summary(result, network, "index_bits") is None for network in NETWORKS):
        return ""
    head = ("Network", "Weights", "smaller", "+ index", "smaller", "+ codebooks", "smaller")
    caption = (
        "Weights: bits of the weights that remain, as most papers count them. Index: which weights or filters these are, and the widths of "
        "filters that differ. Codebooks: shared values, or the quantizers' ranges, 32 bits each. Biases and normalisation are not counted."
    )
    return f'{html_table(head, rows)}<p class="caption">{caption}</p>'


def _seeds(result: Result) -> str:
    if len(runs_of(result)) < 2:
        return ""
    rows = [
        ("", [escape(f"seed {get(run, 'seed')}")] + [percent(number(run, "networks", network, "accuracy")) for network in NETWORKS])
        for run in runs_of(result)
    ]
    return f"<details><summary>Test accuracy of every seed</summary>{html_table(('Seed', *NETWORKS), rows)}</details>"


def _files(result: Result) -> str:
    """The files that were written besides the network; nothing for a run without any."""
    rows = []
    for run in runs_of(result):
        for file in get(run, "files") or []:
            place = f"seed-{get(run, 'seed')}/" if run is not runs_of(result)[0] else ""
            for program, found in (get(file, "parity") or {}).items():
                cells = [escape(f"{place}{get(file, 'file')}"), si(number(file, "bytes"), "B"), escape(str(program))]
                largest, share = number(found, "largest"), number(found, "share")
                cells += ["–" if largest is None else f"{largest:.2g}", percent(share), percent(number(found, "agreement"))]
                rows.append(("", cells))
    if not rows:
        return ""
    head = ("File", "Size", "Run by", "Largest difference", "Values that differ", "Same class")
    caption = "Outputs on test samples against PyTorch's; a value differs that is further than 1e-5 · max(1, |value|) away."
    return f'<section><h2>Files</h2>{html_table(head, rows)}<p class="caption">{caption}</p></section>'


def _tiles(result: Result) -> str:
    accuracy, half, bops, size = (summary(result, "searched", key) for key in ("accuracy_mean", "accuracy_ci95", "bops", "size_bits"))
    reference = " · ".join(f"{name} {percent(summary(result, name, 'accuracy_mean'))}" for name in ("float", "uniform"))
    limit, times = number(result, "budget", "limits", "bops"), number(result, "summary", "search_in_float_epochs")
    epoch = average([number(run, "seconds", "float_epoch") for run in runs_of(result)])
    within = f" · {_share(bops, limit)} of budget" if bops is not None and limit else ""
    tiles = [
        ("Searched accuracy", percent(accuracy), "" if half is None else f"± {100 * half:.2f}", reference),
        ("Bit operations", si(bops), "BOPs", f"{_share(bops, summary(result, 'float', 'bops'))} of float{within}"),
        ("Size", _bytes(size), "", f"{_share(size, summary(result, 'float', 'size_bits'))} of float"),
        ("Time of the search", "–" if times is None else f"{times:.1f} ×", "one float epoch", f"a float epoch takes {duration(epoch)}"),
    ]
    return '<div class="tiles">' + "".join(html_tile(*tile) for tile in tiles) + "</div>"


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
    return f"<details><summary>The numbers behind these pictures</summary>{html_table(head, rows)}</details>" if rows else ""


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
    widths = {b for layer in layers_of(result) for b in layer["w"] or []} == {PRUNED, FLOAT}
    bits = figure_section(
        "Bits per layer",
        figures.bits_by_layer(result),
        "f2",
        f"{first}Layers in network order; weight bits are means over filters, activation bits those of the layer's input.{gray}",
    )
    return "\n".join(
        (
            figure_section(
                "Accuracy against cost",
                figures.accuracy_cost(result),
                "f1",
                f"{faint}Dashed line: the budget. Up and to the left is better.",
            ),
            "" if widths else bits,
            figure_section(
                "Filters kept" if widths else "Bits per filter", figures.bits_by_filter(result), "f3", f"{first}{cells}", _layers(result)
            ),
            figure_section(
                "How the choice evolved",
                figures.evolution(result),
                "f4",
                f"{first}{others}Expected values under the gates' probabilities, after every epoch of the search.",
            ),
        )
    )


def _settings(result: Result) -> str:
    seconds = {
        phase: duration(average([number(run, "seconds", phase) for run in runs_of(result)]))
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
        parts.append(f"<section><h2>{title}</h2>{html_table(head, rows, numeric=False) if rows else '–'}</section>")
    return f'<div class="pair">{parts[0]}<div>{parts[1]}{parts[2]}</div></div>'


def _unfinished(result: Result) -> str:
    from qprune import figures

    metrics = result["metrics"]
    rows = []
    for seed, phase in dict.fromkeys((str(get(row, "seed")), str(get(row, "phase"))) for row in metrics):
        last = [row for row in metrics if (str(get(row, "seed")), str(get(row, "phase"))) == (seed, phase)][-1]
        epoch = number(last, "epoch")
        cells = ["–" if epoch is None else f"{epoch:.0f}", _plain(number(last, "loss"), 4), percent(number(last, "accuracy"))]
        rows.append(("", [escape(phase), escape(seed), *cells]))
    note = '<p class="note">This run is unfinished: there is no result yet. The page shows what was recorded so far.</p>'
    table = html_table(("Phase", "Seed", "Last epoch", "Loss", "Accuracy"), rows) if rows else "–"
    parts = [note, f"<section><h2>Progress</h2>{table}</section>"]
    parts.append(
        figure_section("Training so far", figures.progress(result), "f1", "Accuracy and loss after every epoch; one line per seed.")
    )
    if runs_of(result):
        parts.append(
            figure_section(
                "How the choice evolves", figures.evolution(result), "f4", "Expected values under the gates' probabilities; first seed."
            )
        )
    return "\n".join(parts)


def _page(result: Result) -> str:
    model, data, method = (get(result, "options", key) for key in ("model", "data", "method"))
    title = f"{model or 'network'} on {data}" if data else str(model or "Run")
    kind = "Width search" if method == "slimmable" else "Bit search"
    title = escape(f"{kind}: {title}" if "metrics" not in result else f"{kind} (unfinished)")
    count = len(runs_of(result))
    facts = [budget_label(result), f"method {method}" if method else "", f"{count} seeds" if count > 1 else "1 seed"]
    verdict = get(result, "summary", "verdict")
    if "metrics" in result:
        body = _unfinished(result)
    else:
        parts = (_tiles, _results, _files, _figures, _settings)
        body = f'<p class="verdict">{escape(str(verdict or "–"))}</p>' + "".join(part(result) for part in parts)
    line = "" if "metrics" in result else f"<p>{escape(' · '.join(filter(None, facts)))}</p>"
    return PAGE.format(title=title, css=CSS, line=line, body=body)


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
