"""The plot of `dit tune`: distance over evaluations, one colour a sampler; what was measured with many pictures, and what was chosen."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from training.measure import Measured
from training.search import best, front

_SIZE_INCHES, _DOTS_PER_INCH = (8, 5), 110
_HIGHEST = 3.0  # times the best distance: what is worse stands at the upper edge, so that the front can be seen


def plot(tried: Sequence[Measured], finals: Sequence[Measured], chosen: dict[str, Measured]) -> bytes:
    """A PNG. Faint dots are the settings tried, full ones the finals, the line is the finals' front; rings are the chosen."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")  # not pyplot, which keeps figures and may want a screen
    axes = figure.add_subplot()
    highest = _HIGHEST * best(finals).frechet_distance
    for i, sampler in enumerate(sorted({m.setting.sampler for m in [*tried, *finals]})):
        _dots(axes, [m for m in tried if m.setting.sampler == sampler], highest, color=f"C{i}", s=12, alpha=0.35)
        _dots(axes, [m for m in finals if m.setting.sampler == sampler], highest, color=f"C{i}", s=36, label=sampler)
    line = front(finals)
    axes.plot([m.evaluations for m in line], [min(m.frechet_distance, highest) for m in line], color="0.6", linewidth=1, zorder=0)
    _mark(axes, chosen, highest)
    _describe(axes, f"dots: {finals[0].samples} pictures; faint dots: {tried[0].samples}")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()


def _dots(axes: Axes, measured: Sequence[Measured], highest: float, **style: Any) -> None:
    axes.scatter([m.evaluations for m in measured], [min(m.frechet_distance, highest) for m in measured], **style)


def _mark(axes: Axes, chosen: dict[str, Measured], highest: float) -> None:
    """A ring and the names, of which one setting may have several; below and above in turn, since neighbours may be close."""
    for m, height in zip(dict.fromkeys(chosen.values()), (-20, 13, -20), strict=False):
        _dots(axes, [m], highest, facecolors="none", edgecolors="black", s=130)
        names = ", ".join(name for name, other in chosen.items() if other == m)
        axes.annotate(names, (m.evaluations, m.frechet_distance), xytext=(0, height), textcoords="offset points", ha="center")


def _describe(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.margins(y=0.12)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xticks([ticks for ticks in (5, 10, 20, 30, 50, 100, 200, 500) if low <= ticks <= high])
    axes.set(xlabel="network evaluations of a picture (guided ones count twice)", ylabel="Fréchet distance", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
