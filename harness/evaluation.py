"""Success, episode by episode, of anything that maps observations to action chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.harness.charts import plot_curve  # noqa: F401  to be removed: import it from harness.charts
from pi_stepnft.harness.films import record  # noqa: F401  to be removed: import it from harness.films
from pi_stepnft.harness.statistics import wilson

Act = Callable[[dict[str, np.ndarray], list[str]], np.ndarray]
"""obs {"image": (b, cameras, H, W, 3), "state": (b, S)}, b instructions → action chunks (b, n, A)."""


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
