"""How pictures look: quiet axes, colours that colour-blind readers can tell apart, one drawing for light and dark pages.

Pictures are drawn in a few fixed colours. As PNG they stay so, on white; as SVG these colours become CSS variables that follow
the reader's preference for light or dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, LogFormatterSciNotation

INK, MUTED, GRID = "#1f2429", "#69727b", "#dfe3e7"
# Okabe and Ito (2008), in the order of how well neighbours in a plot can be told apart.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DARK = {
    INK: "#e6e9ec",
    MUTED: "#9aa4ae",
    GRID: "#343b42",
    **dict(
        zip(
            SERIES,
            ("#4fb0ec", "#ff8c42", "#2fc99a", "#e59bc4", "#f0b429", "#8fd0f5", "#c2a36b", "#a9a9a9"),
            strict=True,
        )
    ),
}
_SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
LESS, MORE = "#2f78c4", "#d9601a"


def _colormap(name: str, stops: list[tuple[float, tuple[str, float]]]) -> Colormap:
    made = LinearSegmentedColormap.from_list(name, [(at, to_rgba(*colour)) for at, colour in stops])
    return made.with_extremes(bad=to_rgba(MUTED, 0.35))


# Nothing is transparent, so it is white on a light page and dark on a dark one.
DIVERGING = _colormap("less-more", [(0.0, (LESS, 1)), (0.5, (LESS, 0)), (0.5, (MORE, 0)), (1.0, (MORE, 1))])
SEQUENTIAL = _colormap("more", [(0.0, (MORE, 0)), (1.0, (MORE, 1))])
STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.interpolation": "nearest",
    "text.parse_math": False,  # a name or a title is what it is, dollar signs and all
    "svg.hashsalt": "anabranch",  # the same picture is the same file
}


@contextmanager
def figure(width: float, height: float, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of ``width`` x ``height`` inches and its axes, in our style; no global state of pyplot is touched."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        yield made, made.subplots(**subplots)


def to_png(made: Figure, dpi: int = 160) -> bytes:
    """On white."""
    made.set_dpi(dpi)
    return _print(made, FigureCanvasAgg(made).print_png, facecolor="white")


def to_svg(made: Figure) -> str:
    """On nothing, in the reader's light or dark colours."""
    text = _print(made, FigureCanvasSVG(made).print_svg, facecolor="none", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    for number, colour in enumerate(_DARK):
        text = re.sub(colour, f"var(--c{number})", text, flags=re.IGNORECASE)
    light, dark = (
        "".join(f"--c{number}:{value};" for number, value in enumerate(values)) for values in (_DARK, _DARK.values())
    )
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return text.replace("<defs>", f"{style}<defs>", 1)


def _print(made: Figure, write: Any, facecolor: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    made.set_facecolor(facecolor)
    for axes in made.axes:
        for axis in (axes.xaxis, axes.yaxis):
            _write_powers_plainly(axis)
    with matplotlib.rc_context(STYLE):
        write(stream, **options)
    made.set_layout_engine("none")  # it is laid out now, which takes longer than drawing
    return stream.getvalue()


class _Powers(LogFormatterSciNotation):
    """Labels of logarithmic axes as plain text: 10³, 2×10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        text = re.sub(r"\$\\mathdefault\{(.*)\}\$", r"\1", super().__call__(x, pos)).replace(r"\times", "\u00d7")
        return re.sub(r"\^\{(-?\d+)\}", lambda power: power[1].translate(_SUPERSCRIPT), text)


def _write_powers_plainly(axis: Axis) -> None:
    for level, change in ((axis.major, axis.set_major_formatter), (axis.minor, axis.set_minor_formatter)):
        old: Any = level.formatter
        if isinstance(old, LogFormatterMathtext) and not isinstance(old, _Powers):
            base = axis.get_transform().base  # type: ignore[attr-defined]
            change(_Powers(base=base, labelOnlyBase=old.labelOnlyBase))


def horizontal_grid(axes: Axes) -> None:
    """Faint lines to read values by, and no box."""
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
