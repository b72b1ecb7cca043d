"""Statistics of evaluations: success rates with intervals, paired comparisons, tables over environments and trainings."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def wilson(successes: float, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a success rate, both ends in [0, 1]; z = 1.96 covers 95 %."""
    p, n = successes / episodes, episodes
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


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


Outcomes = dict[str, dict[str, np.ndarray]]
"""Policy → environment → success of its episodes, (E,) bool: the same environments and seeds for all, the first the baseline."""


def summarise(outcomes: Outcomes, families: dict[str, str], unrelated: Collection[str] = ()) -> list[dict]:
    """The rows of a table: one per environment, then each family's mean, then the mean over families ("id" is none).

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
        for policy, found in outcomes.items():
            success = np.stack([found[name] for name in names])
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


def seed_scores(row: dict, found: dict[str, np.ndarray]) -> np.ndarray:
    """A policy's success in a row of `summarise` by seed, weighted over the row's environments, (E,)."""
    success = np.stack([found[name] for name in row["environments"]])
    return success.reshape(-1).astype(float) if row["weights"] is None else np.array(row["weights"]) @ success


def over_seeds(rows: list[dict], outcomes: Outcomes, groups: dict[str, list[str]]) -> list[dict]:
    """The rows of `summarise` with several trainings of an algorithm taken together.

    groups: name → policies, the first group being the baseline. Each row has by group the mean success of its policies with a 95 %
    interval, and but for the first group the difference to it, its interval and p. A single policy keeps what `summarise` says of
    it. Otherwise these are t-intervals and tests in which the variance between trainings and that between seeds of episodes add up,
    as do their degrees of freedom by Welch and Satterthwaite. The episodes' part in the former is counted twice by this, so the
    intervals are a little too wide. None where nothing varies.
    """
    from scipy.stats import t  # a second that no training should wait for

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
