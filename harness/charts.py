"""Charts of success with 95 % intervals: SVG for a page that is light or dark, PNG for a file. Only numbers and names."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np

from pi_stepnft.harness.statistics import wilson

if TYPE_CHECKING:  # a second, which a program should not take before it has looked at its arguments
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Of the policies, in order (Okabe and Ito's, which colour-blind readers can tell apart)."""
THEME = dict(ink="#1d2126", soft="#5d6670", line="#dfe3e7", page="#ffffff", card="#f6f7f9")
THEME |= {f"c{i}": colour for i, colour in enumerate(COLOURS)}
"""The colours of a page in light mode, by the names of its CSS variables."""
DARK = dict(ink="#e4e7ea", soft="#9aa4ae", line="#333a41", page="#15181b", card="#1d2125", c0="#3d9bd8")
"""Those that differ in dark mode."""
WIDTH = 400
"""Of an SVG in px, with text of 12 px. Its page stretches or shrinks both: 358 px on a phone, 480 px at most."""


class Bar(NamedTuple):
    """name: its tooltip; colour: the number of one; rate: 0 to 1; text: the number in words, on the right."""

    name: str
    colour: int
    rate: float
    interval: tuple[float, float] | None
    text: str


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def rgb(number: int) -> tuple[int, int, int]:
    """A policy's colour, for films."""
    return tuple(bytes.fromhex(colour(number)[1:]))


def canvas(height: float, left: float, right: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of WIDTH × height px, and bare axes in it with these margins; 8 px are left above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + 8) / height))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=5, labelsize=11, labelcolor=THEME["soft"])
    axes.grid(color=THEME["line"], linewidth=1)
    axes.set_axisbelow(True)
    axes.patch.set_gid("plot|")
    return figure, axes


def svg(figure: Figure, label: str) -> str:
    """An <svg> to put into a page whose CSS has THEME as variables, so that it follows the page's light and dark.

    Text stays text, in the page's font. An artist's gid "kind|name" becomes a class and, with a name, a tooltip. Nothing has an id,
    and nothing is clipped: several charts in a page cannot get at each other.
    """
    from matplotlib import rc_context

    file, variables = io.StringIO(), {colour: f"var(--{name})" for name, colour in THEME.items()}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pi-stepnft"}):
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    for definitions in root.findall("{*}defs"):
        root.remove(definitions)
    root.attrib = {"class": "chart", "role": "img", "aria-label": label, "viewBox": root.attrib["viewBox"]}
    for element in root.iter("*"):
        element.tag = element.tag.rpartition("}")[2]  # HTML knows SVG without its name space
        element.attrib.pop("clip-path", None)
        style = re.sub("font-family: [^;]*; ?", "", element.attrib.pop("style", ""))
        if style:
            element.set("style", re.sub("#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), style))
        kind, named, name = element.attrib.pop("id", "").partition("|")
        if named:
            element.set("class", kind)
        if name:
            element.insert(0, ElementTree.Element("title"))
            element[0].text = name
    return ElementTree.tostring(root, encoding="unicode")


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], label: str = "success in %") -> str:
    """Groups of horizontal bars with their intervals, each group under its name, as an SVG."""
    thick, step, title = 13, 19, 20
    height = sum(title + step * len(group) + 8 for _, group in groups)
    figure, axes = canvas(height + 28, left=1, right=118, bottom=20)
    axes.set(xlim=(0, 100), ylim=(height, 0), xticks=range(0, 101, 25), yticks=[])
    ink, beside, y = THEME["ink"], axes.get_yaxis_transform(), 0
    for name, group in groups:
        axes.text(1, y + 14, name, color=ink, fontsize=12, parse_math=False)
        y += title
        for bar in group:
            middle = y + thick / 2
            axes.barh(middle, 100 * bar.rate, thick, color=colour(bar.colour), gid=f"bar|{bar.name}")
            if bar.interval:
                whisker = np.repeat(bar.interval, 3) * 100, middle + np.array((-3.5, 3.5, 0, 0, 3.5, -3.5))
                axes.plot(*whisker, color=ink, linewidth=1.5, solid_capstyle="butt")
            axes.text(1 + 117 / (WIDTH - 119), middle + 4, bar.text, color=ink, fontsize=12, ha="right", transform=beside)
            y += step
        y += 8
    return svg(figure, label)


def curves(lines: Sequence[tuple[str, int, list[dict]]], label: str = "success over environment steps") -> str:
    """Success over environment steps with Wilson intervals, as an SVG. lines: name, number of its colour, and the curve:
    a dict per evaluation with "env_steps", "success" (0 to 1) and "episodes"."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(240, left=28, right=22, bottom=40)
    for name, number, curve in lines:
        paint, (x, rates, low, high) = colour(number), curve_points(curve, "env_steps")
        axes.fill(np.concatenate((x, x[::-1])), np.concatenate((low, high[::-1])), color=paint, alpha=0.18, linewidth=0)
        axes.plot(x, rates, color=paint, linewidth=2, gid=f"curve|{name}")
        for place in zip(x, rates):
            axes.plot(*([value] * 2 for value in place), color=paint, linewidth=6, solid_capstyle="round")  # a dot, without an id
    end = max(point["env_steps"] for *_, curve in lines for point in curve) or 1
    axes.set(xlim=(0, end), ylim=(0, 100), yticks=range(0, 101, 25))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("environment steps", loc="right", color=THEME["soft"], fontsize=11)
    return svg(figure, label)


def curve_points(curve: list[dict], key: str) -> np.ndarray:
    """x, and success with the ends of its Wilson interval in %, (4, n)."""
    ends = [wilson(point["success"] * point["episodes"], point["episodes"]) for point in curve]
    return np.array([(point[key], 100 * point["success"], 100 * low, 100 * high) for point, (low, high) in zip(curve, ends)]).T


def plot_curve(curve: list[dict], path: str | Path, title: str) -> None:
    """Success with its 95 % interval over environment steps, and over minutes of training, as a PNG.

    curve: one dict per evaluation with "env_steps", "minutes", "success" (0 to 1) and "episodes".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(axes, ("env_steps", "minutes"), ("environment steps", "minutes of training"), strict=True):
        x, rates, low, high = curve_points(curve, key)
        axis.fill_between(x, low, high, alpha=0.2, linewidth=0)
        axis.plot(x, rates, marker="o", markersize=3)
        axis.set(xlabel=label, ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success, %")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
