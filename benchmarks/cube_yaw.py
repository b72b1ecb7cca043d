"""Where policies fail on PickCube-v1, and what their features see: python benchmarks/cube_yaw.py

Of each checkpoint that ships for the task: success by how far the cube is turned from the gripper (0° to 45°; a cube looks the same
every 90°), and how much the policy turns its hand with it. Of those that see pictures: what a ridge regression reads of the cube's
place and of its turn in the keys and values of the prefix, which the expert sees, on the first pictures of episodes. Of those that
are given states: success if these hide the turn, or say that the cube is some millimetres from where it is. Writes
benchmarks/results/exploration/cube_yaw.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from scipy.spatial.transform import Rotation

from pi_stepnft import envs, policies
from pi_stepnft.envs import TUNING_SEED
from pi_stepnft.harness.evaluation import Act, by_ode, evaluate
from pi_stepnft.harness.run import commit
from pi_stepnft.harness.statistics import wilson

TASK = "PickCube-v1"
CUBE = slice(29, 36)  # of the states of state mode: position in m, quaternion with w first
FROM_HAND, TO_GOAL = slice(36, 39), slice(39, 42)  # from the hand to the cube, and from the cube to the goal
MISLED = (0, False), (0, True), (2, False), (4, False), (6, False)  # mm that a state is wrong by; whether it hides the turn
BINS = 0, 9, 18, 27, 36, 45  # degrees
OUT = Path(__file__).parent / "results" / "exploration" / "cube_yaw.json"


@dataclass
class Args:
    checkpoints: tuple[str, ...] = tuple(f"{policy}-tiny-pickcube-{mode}{of}" for mode in ("rgb", "state")
                                         for policy in ("pi0", "pi05") for of in ("", "-stepnft"))
    """bundled names or folders"""
    episodes: int = 512
    """tuning episodes per checkpoint"""
    pictures: int = 3072
    """first pictures for the regression, of which a sixth tests it"""
    out: Path = OUT
    """where the JSON file goes"""


def cubes(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the cubes of episodes begin: position (N, 2) in m, and turn from the nearest quarter (N,), -45 to 45 degrees."""
    venv = envs.make(TASK, 32, obs_mode="state")
    states = np.concatenate([venv.reset(seed=part)[0]["state"][:, CUBE] for part in seeds.reshape(-1, 32)])
    venv.close()
    yaw = Rotation.from_quat(np.roll(states[:, 3:], -1, 1)).as_euler("xyz", degrees=True)[:, 2]
    return states[:, :2], (yaw + 45) % 90 - 45


def features(policy: policies.Pi0, seeds: np.ndarray) -> torch.Tensor:
    """Keys and values of the prefix of first pictures, each of them scaled (N, D)."""
    venv, rows = envs.make(TASK, 32, obs_mode="rgb", image_size=policy.config.image_size), []
    for part in seeds.reshape(-1, 32):
        *inputs, _ = policy.processor(venv.reset(seed=part)[0], venv.instructions)
        with torch.no_grad():
            prefix = policy.encode_prefix(*inputs)
        rows.append(torch.cat([prefix.keys, prefix.values]).transpose(0, 1).flatten(1))
    venv.close()
    rows = torch.cat(rows)
    rows = rows[:, rows.std(0) > 1e-4]
    return (rows - rows.mean(0)) / rows.std(0)


def read(x: torch.Tensor, y: np.ndarray) -> np.ndarray:
    """The errors (n, d) of a ridge regression on the last sixth, with the penalty that leaves least of them."""
    n = len(x) * 5 // 6
    y = torch.from_numpy(y).float()
    kernel, mean = x @ x[:n].T / x.shape[1], y[:n].mean(0)
    errors = [kernel[n:] @ torch.linalg.solve(kernel[:n] + penalty * torch.eye(n), y[:n] - mean) + mean - y[n:]
              for penalty in (1e-4, 1e-3, 1e-2, 1e-1)]
    return min(errors, key=lambda error: float(error.square().mean())).numpy()


def misled(act: Act, mm: float, hidden: bool) -> Act:
    """`act` on states that have the cube elsewhere, by mm in x and in y (a standard deviation; an episode keeps its draw), and, if
    hidden, not turned."""

    def on_changed(obs: dict[str, np.ndarray], instructions: list[str], turns: np.ndarray) -> np.ndarray:
        state = obs["state"].copy()
        error = np.stack([np.random.default_rng(seed).standard_normal(2) for seed in turns[:, 0]]) * mm / 1000
        for place, sign in ((CUBE.start, 1), (FROM_HAND.start, 1), (TO_GOAL.start, -1)):
            state[:, place : place + 2] += (sign * error).astype(state.dtype)
        if hidden:
            state[:, CUBE.start + 3 : CUBE.stop] = 1, 0, 0, 0
        return act(obs | {"state": state}, instructions, turns)

    return on_changed


def by_turn(turn: np.ndarray, success: np.ndarray) -> list[dict]:
    """Success of the episodes of each of the BINS."""
    rows = []
    for low, high in zip(BINS, BINS[1:]):
        inside = (abs(turn) >= low) & (abs(turn) <= high)
        rows.append(dict(degrees=[low, high], episodes=int(inside.sum()), success=float(success[inside].mean()),
                         interval=wilson(success[inside].sum(), inside.sum())))
    return rows


def main(args: Args) -> None:
    results = dict(command=" ".join(["python benchmarks/cube_yaw.py", *sys.argv[1:]]), commit=commit(), policies={})
    seeds = TUNING_SEED + np.arange(args.episodes)
    _, turn = cubes(seeds)
    pictured = np.arange(args.pictures)
    places, turns = cubes(pictured)
    for name in args.checkpoints:
        policy = policies.load(name)
        mode, execute = policy.meta["obs_mode"], policy.meta.get("execute", policy.config.horizon)
        act, cases, outcomes = by_ode(policy, policy.config.num_steps), MISLED if mode == "state" else MISLED[:1], []
        for mm, hidden in cases:
            venv = envs.make(TASK, 64, obs_mode=mode, chunk=execute, image_size=policy.config.image_size)
            shown = misled(act, mm, hidden) if mode == "state" else act
            outcomes.append(evaluate(venv, shown, args.episodes, execute=execute, seed=TUNING_SEED, progress=name))
            venv.close()
        outcome = outcomes[0]
        turned = outcome.actions[:, :, 5].sum(1)  # in parts of the controller's largest turn, about the vertical
        follows = float(np.corrcoef(turned, turn)[0, 1])
        results["policies"][name] = one = dict(outcome.outcome, by_turn=by_turn(turn, outcome.success), turns_with_the_cube=follows)
        if mode == "state":
            one["misled"] = [dict(each.outcome, mm=mm, turn_hidden=hidden, by_turn=by_turn(turn, each.success))
                             for (mm, hidden), each in zip(cases, outcomes)][1:]
        if mode == "rgb" and not name.endswith("-stepnft"):  # the VLM stays as it is in training
            seen, angle = features(policy, pictured), np.radians(4 * turns)
            round_ = np.stack([np.cos(angle), np.sin(angle)], 1)
            one["place_error_mm"] = (1000 * np.sqrt((read(seen, places) ** 2).mean(0))).tolist()
            one["turn_r2"] = float(1 - (read(seen, round_) ** 2).mean() / round_.var(0).mean())
        print(name, one)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
