"""The look of all figures, and how one becomes part of a page. pyplot and the user's matplotlib settings are neither used nor changed."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qprune.result import Result

# The page's style sheet gives each of these colours a light and a dark value: svg() writes them as CSS variables.
THEME = {"ink": "#1f2a37", "muted": "#66717f", "grid": "#dde3ea", "card": "#fffffe", "empty": "#f0f2f5"}
SERIES = {"float": "#7a8594", "searched": "#d55e00", "uniform": "#0072b2"}
WIDTH = 8.4

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qprune",
    "text.parse_math": False,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "image.interpolation": "none",
    "figure.facecolor": THEME["card"],
    "axes.facecolor": THEME["card"],
    "grid.color": THEME["grid"],
    "axes.edgecolor": THEME["muted"],
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), THEME["ink"]),
    **dict.fromkeys(("xtick.color", "ytick.color"), THEME["muted"]),
}


class _style:
    """matplotlib's own defaults plus ours, for the length of a `with`: a user's matplotlibrc must not change a report."""

    def __enter__(self) -> None:
        self._context = matplotlib.rc_context()
        self._context.__enter__()
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(None, None, None)


def styled(draw: Callable[[Result], Figure]) -> Callable[[Result], Figure]:
    @functools.wraps(draw)
    def drawn(result: Result) -> Figure:
        with _style():
            return draw(result)

    return drawn


def nothing(text: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.0))
    figure.text(0.5, 0.5, text, ha="center", va="center", color=THEME["muted"])
    return figure


def at_most_100(axis: Any, name: str = "y") -> None:
    """Let the x or y axis, of accuracies in %, end just above 100 where it went further: markers there are whole, intervals are cut."""
    low, high = getattr(axis, f"get_{name}lim")()
    if high > 100 > low:
        getattr(axis, f"set_{name}lim")(low, 100 + 0.04 * (100 - low))


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element to put inside a page: ids begin with prefix, theme colours are CSS variables, the same every time."""
    buffer = io.StringIO()
    with _style(), warnings.catch_warnings():
        # The browser has fonts for what DejaVu Sans lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # names that are longer than the figure
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :]).replace("xlink:href=", "href=")
    text = re.sub(r'\sid="(?=[^"])', f' id="{prefix}-', text).replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for name, color in (THEME | SERIES).items():
        text = text.replace(color, f"var(--{name})")
    head, _, body = text.partition(">")
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + body
