"""Charts of success with 95 % intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pi_stepnft.harness.statistics import wilson


def plot_curve(curve: list[dict], path: str | Path, title: str) -> None:
    """Success with its 95 % interval over environment steps, and over minutes of training, as a PNG.

    curve: one dict per evaluation with "env_steps", "minutes", "success" (0 to 1) and "episodes".
    """
    rates = np.array([100 * point["success"] for point in curve])
    bounds = np.array([wilson(point["success"] * point["episodes"], point["episodes"]) for point in curve]) * 100
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(axes, ("env_steps", "minutes"), ("environment steps", "minutes of training"), strict=True):
        x = [point[key] for point in curve]
        axis.fill_between(x, bounds[:, 0], bounds[:, 1], alpha=0.2, linewidth=0)
        axis.plot(x, rates, marker="o", markersize=3)
        axis.set(xlabel=label, ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success, %")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
