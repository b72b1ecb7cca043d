"""Success rates with intervals, and videos, for anything that maps observations to action chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from envs import EVAL_SEED

Act = Callable[[dict[str, np.ndarray], list[str]], np.ndarray]
"""obs {"image": (b, cameras, H, W, 3), "state": (b, S)}, b instructions → action chunks (b, n, A)."""


def wilson(successes: float, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a success rate, both ends in [0, 1]; z = 1.96 covers 95 %."""
    p, n = successes / episodes, episodes
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


@dataclass
class Evaluation:
    """Outcomes of E episodes: success (E,) bool, steps (E,) int (control steps taken), seeds (E,)."""

    success: np.ndarray
    steps: np.ndarray
    seeds: np.ndarray

    @property
    def rate(self) -> float:
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.success.sum(), len(self.success))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {len(self.success)} episodes"


def plot_curve(curve: list[dict], path: str | Path, title: str) -> None:
    """Success with its 95 % interval over environment steps, and over minutes of training, as a PNG.

    curve: one dict per evaluation with "env_steps", "minutes", "success" (0 to 1) and "episodes".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = np.array([100 * point["success"] for point in curve])
    bounds = np.array([wilson(point["success"] * point["episodes"], point["episodes"]) for point in curve]) * 100
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("env_steps", "minutes"), ("environment steps", "minutes of training"), strict=True):
        x = [point[key] for point in curve]
        axis.fill_between(x, bounds[:, 0], bounds[:, 1], alpha=0.2, linewidth=0)
        axis.plot(x, rates, marker="o", markersize=3)
        axis.set(xlabel=label, ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success, %")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def evaluate(venv, act: Act, episodes: int, *, execute: int, seed: int = EVAL_SEED, progress: str = "") -> Evaluation:
    """Success (once within the limit) of `act` over `episodes` episodes with seeds seed, seed + 1, …, in rounds of venv.num_envs.

    execute: how many actions of each chunk are executed before the next observation. progress: label of a progress bar, or "".
    """
    success, steps = np.zeros(episodes, bool), np.zeros(episodes, int)
    with tqdm(total=episodes, desc=progress, leave=False, disable=not progress) as bar:
        for first in range(0, episodes, venv.num_envs):
            count = min(venv.num_envs, episodes - first)
            running = np.arange(venv.num_envs) < count
            obs, _ = venv.reset(seed=seed + first, options={"reset_mask": running})
            while running.any():
                index = np.flatnonzero(running)
                chunk = np.zeros((venv.num_envs, execute, venv.action_dim), np.float32)
                chunk[index] = act({k: v[index] for k, v in obs.items()}, [venv.instructions[i] for i in index])[:, :execute]
                obs, _, terminated, truncated, info = venv.step(chunk)
                steps[first : first + count] += info["steps"][:count]
                success[first : first + count] = info["success"][:count]
                ended = running & (terminated | truncated)
                running &= ~ended
                bar.update(int(ended.sum()))
    return Evaluation(success, steps, seed + np.arange(episodes))


def record(
    venv, act: Act, path: str | Path, *, execute: int, episodes: int = 8, seed: int = EVAL_SEED, fps: int = 20
) -> list[bool]:
    """A tiled video of the first evaluation episodes at `path` (.mp4), a frame per control step; a green or red frame tells
    success or failure once an episode has ended. Returns the outcomes."""
    import imageio.v3 as iio

    episodes = min(episodes, venv.num_envs)
    running = np.arange(venv.num_envs) < episodes
    obs, _ = venv.reset(seed=seed, options={"reset_mask": running})
    tiles, films = venv.render(range(episodes)), []
    success = np.zeros(venv.num_envs, bool)

    def film() -> None:
        for i, frame in enumerate(tiles):
            if not running[i]:
                for edge in (np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:]):
                    frame[edge] = (40, 200, 80) if success[i] else (220, 50, 40)
        columns = math.ceil(math.sqrt(len(tiles) * 4 / 3))
        blanks = [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
        rows = [np.concatenate((tiles + blanks)[r : r + columns], axis=1) for r in range(0, len(tiles), columns)]
        films.append(np.concatenate(rows, axis=0))

    film()
    while running.any():
        index = np.flatnonzero(running)
        chunk = np.zeros((venv.num_envs, execute, venv.action_dim), np.float32)
        chunk[index] = act({k: v[index] for k, v in obs.items()}, [venv.instructions[i] for i in index])[:, :execute]
        for i in range(execute):
            obs, _, terminated, truncated, info = venv.step(chunk[:, i : i + 1])
            success = info["success"]
            moved = np.flatnonzero(running)
            running &= ~(terminated | truncated)
            for slot, frame in zip(moved, venv.render(moved), strict=True):
                tiles[slot] = frame
            film()
            if not running.any():
                break
    films += films[-1:] * fps  # hold the last picture for a second
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, np.stack(films), fps=fps, codec="libx264")
    return success[:episodes].tolist()
