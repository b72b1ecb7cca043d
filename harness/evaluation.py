"""Success, episode by episode, of anything that maps observations to action chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pi_stepnft import policies
from pi_stepnft.envs import EVAL_SEED, EnvError
from pi_stepnft.harness import ranks
from pi_stepnft.harness.statistics import wilson

Act = Callable[[dict[str, np.ndarray], list[str], np.ndarray], np.ndarray]
"""obs {"image": (b, cameras, H, W, 3), "state": (b, S)}, b instructions, turns (b, 2) int: each episode's seed and how many chunks
it has had → action chunks (b, n, A)."""


def by_ode(policy: policies.Pi0, num_steps: int) -> Act:
    """The policy without exploration. The noise that a chunk starts from follows from the episode's seed and the turn alone: it
    is the same for every policy, and whatever other episodes are played beside it."""
    shape, device = (policy.config.horizon, policy.config.action_dim), next(policy.parameters()).device

    def act(obs: dict[str, np.ndarray], instructions: list[str], turns: np.ndarray) -> np.ndarray:
        noise = np.stack([np.random.default_rng(turn).standard_normal(shape, np.float32) for turn in turns])
        return policy.act(obs, instructions, num_steps, torch.from_numpy(noise).to(device))

    return act


@dataclass
class Evaluation:
    """Outcomes of E episodes."""

    success: np.ndarray  # (E,) bool
    steps: np.ndarray  # (E,) int, control steps taken
    seeds: np.ndarray  # (E,)
    actions: np.ndarray | None = None  # (E, limit, A) float32, zeros after an episode's end
    repeated: int = 0
    """how often an episode was played again because its worker had died"""
    broken: int = 0
    """episodes that ended, as failures, with actions that were not finite numbers"""

    @property
    def rate(self) -> float:
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.success.sum(), len(self.success))

    @property
    def outcome(self) -> dict:
        """What results and the meta of policies tell of it."""
        return dict(success=self.rate, interval=self.interval, episodes=len(self.success))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {len(self.success)} episodes"


TASK_STRIDE = 1000
"""From the first seed of a task to that of the next, where several are evaluated: a multiple of LIBERO's 50 initial states."""


LIVES = 3
"""How often an episode is begun, whose worker dies each time, before the evaluation gives up."""


def evaluate(
    venv, act: Act, episodes: int, *, execute: int, seed: int = EVAL_SEED, progress: str | tqdm = ""
) -> Evaluation:
    """Success (once within the limit) of `act` over `episodes` episodes with seeds seed, seed + 1, …, in rounds of venv.num_envs.

    Where the environments have several tasks, task t counts its own seeds from seed + t·TASK_STRIDE on: in LIBERO, each begins with
    the first of its fixed initial states. An episode that is lost with its worker is played again, from its seed: only what was
    played to its end counts. Each rank plays the episodes of its environments, and has the outcomes of all. execute: how many
    actions of each chunk are executed before the next observation. progress: label of a progress bar, "" for none, or a bar to
    move. Raises EnvError where workers die again and again, or no action is a number.
    """
    tasks_of_all: list[str] = sum(ranks.gather(venv.tasks), [])
    B, all_B, tasks = venv.num_envs, len(tasks_of_all), list(dict.fromkeys(tasks_of_all))
    place = np.array([tasks.index(task) * TASK_STRIDE + tasks_of_all[:i].count(task) for i, task in enumerate(tasks_of_all)])
    share = np.array([tasks_of_all.count(task) for task in tasks_of_all])  # (all_B,) environments with the same task
    number = np.arange(episodes)
    seeds = seed + place[number % all_B] + number // all_B * share[number % all_B]  # (E,)
    success, steps, begun = np.zeros(episodes, bool), np.zeros(episodes, int), np.zeros(episodes, int)
    actions = np.zeros((episodes, venv.max_episode_steps, venv.action_dim), np.float32)
    broken = np.zeros(episodes, bool)
    waiting = [deque(range(ranks.RANK * B + slot, episodes, all_B)) for slot in range(B)]  # what each environment has yet to play
    hidden, mine = not progress or ranks.RANK > 0, sum(map(len, waiting))
    bar = progress if isinstance(progress, tqdm) else tqdm(total=mine, desc=progress, leave=False, disable=hidden)
    while any(waiting):
        running = np.array([bool(queue) for queue in waiting])  # (B,)
        playing = np.array([queue.popleft() if queue else 0 for queue in waiting])  # (B,) the episode of each
        begun[playing[running]] += 1
        obs, _ = venv.reset(seed=np.where(running, seeds[playing], seed), options={"reset_mask": running})
        turn = 0
        while running.any():
            index = np.flatnonzero(running)
            chunk = np.zeros((B, execute, venv.action_dim), np.float32)
            seen, told = {name: value[index] for name, value in obs.items()}, [venv.instructions[i] for i in index]
            turns = np.stack([seeds[playing[index]], np.full(len(index), turn)], 1)
            chunk[index] = act(seen, told, turns)[:, :execute]
            turn += 1
            bad = ~np.isfinite(chunk).all((1, 2))  # played again they would be no better
            broken[playing[bad]] = True
            chunk[bad] = 0
            obs, _, terminated, truncated, info = venv.step(chunk)
            ended = running & (terminated | truncated | bad)
            for slot in index:
                episode, count = playing[slot], info["steps"][slot]
                actions[episode, steps[episode] : steps[episode] + count] = chunk[slot, :count]
                steps[episode] += count
                success[episode] = info["success"][slot] and not bad[slot]
                if info["lost"][slot] and not bad[slot]:
                    if begun[episode] == LIVES:
                        raise EnvError(f"seed {seeds[episode]} lost its worker {LIVES} times: try fewer --num-envs")
                    waiting[slot].append(episode)
                    steps[episode], success[episode], ended[slot], running[slot] = 0, False, False, False
                    actions[episode] = 0
            running &= ~ended
            bar.update(int(ended.sum()))
    if bar is not progress:
        bar.close()
    success, steps, actions, begun, broken = map(ranks.total, (success, steps, actions, begun, broken))
    if broken.all():
        raise EnvError("the policy's actions are not finite numbers: it has diverged, go back to an earlier one")
    return Evaluation(success, steps, seeds, actions, int(begun.sum()) - episodes, int(broken.sum()))


def evaluate_replay(venv, actions: np.ndarray, episodes: int, *, seed: int = EVAL_SEED, progress: str = "") -> Evaluation:
    """The replay baseline: success of one demonstration's actions (T, A), executed blindly from other initial states.

    Afterwards the arm rests until the episode's limit, the gripper as it was. What a policy adds to this, it owes to seeing.
    """
    plan = np.zeros((venv.max_episode_steps, venv.action_dim), np.float32)
    plan[:, -1] = actions[-1, -1]
    plan[: len(actions)] = actions[: len(plan)]
    act = lambda obs, text, turns: np.tile(plan, (len(text), 1, 1))
    return evaluate(venv, act, episodes, execute=len(plan), seed=seed, progress=progress)
