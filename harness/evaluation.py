"""Success rates with intervals, and videos, for anything that maps observations to action chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pi_stepnft.envs import EVAL_SEED

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


@dataclass
class Comparison:
    """Two policies on the same episodes: difference of success (0 to 1), its 95 % interval, and the p-value of no difference."""

    difference: float
    interval: tuple[float, float]
    p: float


def rate_interval(success: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Mean success and its 95 % interval over environments that share their seeds.

    success: (V, E), of V environments × E seeds; weights: (V,), adding up to 1. Outcomes from the same seed resemble each other, so
    V·E episodes count as fewer: Wilson's interval is taken with the number of independent episodes that would have given the
    observed spread between seeds, at least E and at most V·E. For one environment it is Wilson's interval.
    """
    V, E = success.shape
    scores = weights @ success  # (E,)
    rate = float(scores.mean())
    spread = scores.var(ddof=1) / E if E > 1 else 0.0
    number = float(np.clip(rate * (1 - rate) / spread, E, V * E)) if spread > 0 else E
    return rate, *wilson(rate * number, number)


def compare(success: np.ndarray, baseline: np.ndarray, weights: Sequence[Fraction]) -> Comparison:
    """Paired comparison over V environments × E seeds, (V, E) bool each; weights: V exact fractions that add up to 1.

    The p-value is that of the exact sign-flip test: without a difference, each seed's difference is as likely to have the opposite
    sign. For one environment this is the exact McNemar test. The interval is Agresti and Min's (2005), which adds half an episode
    to each of the four cells of the table, with each seed's weighted difference as one observation.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = np.array([int(weight * scale) for weight in weights]) @ (success.astype(int) - baseline.astype(int))  # (E,), scaled
    unit = max(1, int(np.gcd.reduce(whole)))
    chance = np.ones(1)  # of the sums −n, −n + 1, …, n of randomly signed differences
    for size in np.abs(whole[whole != 0]) // unit:
        chance = (np.pad(chance, (0, 2 * size)) + np.pad(chance, (2 * size, 0))) / 2
    n = len(chance) // 2
    p = float(chance[np.abs(np.arange(-n, n + 1)) >= abs(whole.sum()) // unit].sum())
    V, d = len(weights), whole / scale
    number = len(d) + 2 / V
    centre = float(d.sum()) / number
    half = 1.96 * math.sqrt((float((d**2).sum()) + 1 / V**2) / number - centre**2) / math.sqrt(number)
    return Comparison(float(d.mean()), (max(-1.0, centre - half), min(1.0, centre + half)), min(1.0, p))


def summarise(
    outcomes: dict[str, dict[str, Evaluation]], families: dict[str, str], unrelated: Collection[str] = ()
) -> list[dict]:
    """The rows of a table: one per environment, then each family's mean, then the mean over families ("id" is none).

    outcomes: policy → environment → evaluation, the same environments and seeds for all, the first policy being the baseline;
    families: environment → "id" (in distribution) or the family it belongs to. A family's mean weighs its environments equally, the
    last row its families. unrelated: families whose environments share no more than the numbers of their seeds (the tasks of a
    LIBERO suite): all their episodes count alike, as those of one environment. Each row: name, kind ("environment", "family" or
    "ood"), family, environments, their weights (None: all episodes alike), and by policy success, interval, episodes and, but for
    the first, difference, its interval and p.
    """
    rows = [("environment", name, families[name], [name]) for name in next(iter(outcomes.values()))]
    members: dict[str, list[str]] = {}
    for _, name, family, _ in rows:
        members.setdefault(family, []).append(name)
    members.pop("id", None)
    rows += [("family", family, family, names) for family, names in members.items()]
    if len(members) > 1:
        rows.append(("ood", "mean of suites" if unrelated else "OOD mean", "ood", sum(members.values(), [])))
    table = []
    for kind, name, family, names in rows:
        share = 1 if kind != "ood" else len(members)
        weights = [Fraction(1, share * (len(members[families[n]]) if kind == "ood" else len(names))) for n in names]
        apart = kind == "family" and name in unrelated
        row = dict(name=name, kind=kind, family=family, environments=names, weights=None if apart else list(map(float, weights)))
        policies, baseline = {}, None
        for policy, evaluations in outcomes.items():
            success = np.stack([evaluations[n].success for n in names])
            if apart:
                success, weights = success.reshape(1, -1), [Fraction(1)]
            rate, *interval = rate_interval(success, np.array(weights, float))
            policies[policy] = dict(success=rate, interval=interval, episodes=success.size)
            if baseline is None:
                baseline = success
            else:
                difference = compare(success, baseline, weights)
                policies[policy] |= dict(difference=difference.difference, difference_interval=difference.interval, p=difference.p)
        table.append(row | dict(policies=policies))
    return table


def seed_scores(row: dict, evaluations: dict[str, Evaluation]) -> np.ndarray:
    """A policy's success in a row of `summarise` by seed, weighted over the row's environments, (E,)."""
    success = np.stack([evaluations[name].success for name in row["environments"]])
    return success.reshape(-1).astype(float) if row["weights"] is None else np.array(row["weights"]) @ success


def over_seeds(rows: list[dict], outcomes: dict[str, dict[str, Evaluation]], groups: dict[str, list[str]]) -> list[dict]:
    """The rows of `summarise` with several trainings of an algorithm taken together.

    groups: name → policies, the first group being the baseline. Each row has by group the mean success of its policies with a 95 %
    interval, and but for the first group the difference to it, its interval and p. A single policy keeps what `summarise` says of
    it. Otherwise these are t-intervals and tests in which the variance between trainings and that between seeds of episodes add up,
    as do their degrees of freedom by Welch and Satterthwaite. The episodes' part in the former is counted twice by this, so the
    intervals are a little too wide. None where nothing varies.
    """
    from scipy.stats import t

    def inference(scores: np.ndarray, baseline: np.ndarray | None = None) -> tuple[float, tuple[float, float] | None, float | None]:
        """Mean (less the baseline's), its interval and p-value, of scores of n trainings × E seeds, (n, E)."""
        samples = [scores] if baseline is None else [scores, baseline]
        by_seed = scores.mean(0) - (0 if baseline is None else baseline.mean(0))
        observed = [by_seed, *(sample.mean(1) for sample in samples)]
        shares = np.array([(x.var(ddof=1) / len(x), len(x) - 1) for x in observed if len(x) > 1]).reshape(-1, 2)
        centre, error = float(by_seed.mean()), math.sqrt(shares[:, 0].sum())
        if not error:
            return centre, None, None
        freedom = error**4 / (shares[:, 0] ** 2 / shares[:, 1]).sum()
        half = t.ppf(0.975, freedom) * error
        least = 0.0 if baseline is None else -1.0
        return centre, (max(least, centre - half), min(1.0, centre + half)), float(2 * t.sf(abs(centre) / error, freedom))

    table = []
    for row in rows:
        policies, baseline = {}, None
        for group, members in groups.items():
            scores = np.stack([seed_scores(row, outcomes[member]) for member in members])  # (n, E)
            mean, interval, _ = inference(scores)
            policies[group] = dict(success=mean, interval=interval) if len(members) > 1 else dict(row["policies"][members[0]])
            if baseline is None:
                baseline = scores
            elif len(members) > 1 or len(baseline) > 1:
                difference, interval, p = inference(scores, baseline)
                policies[group] |= dict(difference=difference, difference_interval=interval, p=p)
        table.append(row | dict(policies=policies))
    return table


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


TASK_STRIDE = 1000
"""From the first seed of a task to that of the next, where several are evaluated: a multiple of LIBERO's 50 initial states."""


def evaluate(venv, act: Act, episodes: int, *, execute: int, seed: int = EVAL_SEED, progress: str = "") -> Evaluation:
    """Success (once within the limit) of `act` over `episodes` episodes with seeds seed, seed + 1, …, in rounds of venv.num_envs.

    Where the environments have several tasks, task t counts its own seeds from seed + t·TASK_STRIDE on: in LIBERO, each begins with
    the first of its fixed initial states. execute: how many actions of each chunk are executed before the next observation.
    progress: label of a progress bar, or "".
    """
    tasks = list(dict.fromkeys(venv.tasks))
    place = np.array([tasks.index(task) * TASK_STRIDE + venv.tasks[:i].count(task) for i, task in enumerate(venv.tasks)])
    share = np.array([venv.tasks.count(task) for task in venv.tasks])  # (B,) environments with the same task
    success, steps, seeds = np.zeros(episodes, bool), np.zeros(episodes, int), np.zeros(episodes, int)
    with tqdm(total=episodes, desc=progress, leave=False, disable=not progress) as bar:
        for number, first in enumerate(range(0, episodes, venv.num_envs)):
            count = min(venv.num_envs, episodes - first)
            running = np.arange(venv.num_envs) < count
            begun = seed + place + number * share
            seeds[first : first + count] = begun[:count]
            obs, _ = venv.reset(seed=begun, options={"reset_mask": running})
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
    return Evaluation(success, steps, seeds)


def evaluate_replay(venv, actions: np.ndarray, episodes: int, *, seed: int = EVAL_SEED, progress: str = "") -> Evaluation:
    """The replay baseline: success of one demonstration's actions (T, A), executed blindly from other initial states.

    Afterwards the arm rests until the episode's limit, the gripper as it was. What a policy adds to this, it owes to seeing.
    """
    plan = np.zeros((venv.max_episode_steps, venv.action_dim), np.float32)
    plan[:, -1] = actions[-1, -1]
    plan[: len(actions)] = actions[: len(plan)]
    act = lambda obs, text: np.tile(plan, (len(text), 1, 1))
    return evaluate(venv, act, episodes, execute=len(plan), seed=seed, progress=progress)


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
