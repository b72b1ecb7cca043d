"""Is an episode a function of its seed and its actions? python benchmarks/replays.py

Plays episodes of each task by its scripted expert with noise, then the same seeds and actions again in the same environment, which
other episodes have used meanwhile, and in new ones, and compares every state (poses, joint positions and velocities) to the last
bit. Once with resets as they are, once without the new physics engine that they put the scene into. Writes results/replays.json.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import tyro

from pi_stepnft import envs, harness
from pi_stepnft.envs.maniskill import env as maniskill

OUT = Path(__file__).parent / "results" / "replays.json"


@dataclass
class Args:
    tasks: tuple[str, ...] = ("PickCube-v1", "PushCube-v1", "StackCube-v1", "LiftPegUpright-v1", "PlaceSphere-v1", "PullCube-v1")
    """tasks with a scripted expert"""
    episodes: int = 48
    """of each task"""
    steps: int = 40
    """control steps of an episode"""
    fresh: int = 4
    """how many of them are played in new environments too"""


def states(base) -> np.ndarray:
    """Of all that moves: poses, joint positions and velocities."""
    bodies = [part for actor in base.scene.actors.values() for part in (actor._objs[0].pose.p, actor._objs[0].pose.q)]
    joints = [part for robot in base.scene.articulations.values() for part in (robot._objs[0].qpos, robot._objs[0].qvel)]
    return np.concatenate([np.ravel(part) for part in (*bodies, *joints)])


def play(env, seed: int, steps: int, actions: list | None = None) -> tuple[list, np.ndarray]:
    """An episode by the expert with noise, or by the actions given; what all states were after each step."""
    env.reset(seed)
    expert, rng, told, seen = env.expert(), np.random.default_rng(seed), [], [states(env.base)]
    expert.reset()
    for t in range(steps):
        action = actions[t] if actions else np.clip(expert.act() + rng.normal(0, 0.2, 7), -1, 1).astype(np.float32)
        env.step(action[None])
        told.append(action)
        seen.append(states(env.base))
    return told, np.stack(seen)


def replays(task: str, args: Args) -> dict:
    """How many episodes ended elsewhere, by how much at most, and what a reset takes."""
    make = lambda: envs.simulator(task).spec(task, obs_mode="state", max_episode_steps=args.steps + 1).create(0, 1)
    env = make()
    played = {seed: play(env, seed, args.steps) for seed in range(args.episodes)}
    differences = {}
    for seed in np.random.default_rng(0).permutation(args.episodes):
        told, seen = played[seed]
        differences[seed] = np.abs(play(env, int(seed), args.steps, told)[1] - seen).max()
    fresh = [np.abs(play(make(), seed, args.steps, played[seed][0])[1] - played[seed][1]).max() for seed in range(args.fresh)]
    begun = time.perf_counter()
    for seed in range(20):
        env.reset(seed)
    return dict(
        episodes=args.episodes, different=sum(bool(d) for d in differences.values()), by_up_to=float(max(differences.values())),
        in_new_environments=len(fresh), of_these_different=sum(map(bool, fresh)), reset_ms=50 * (time.perf_counter() - begun),
    )


def main(args: Args) -> None:
    renew, found = maniskill.renew_physics, {}
    for way, function in (("as it is", renew), ("without a new physics engine", lambda base: None)):
        maniskill.renew_physics = function
        found[way] = {}
        for task in args.tasks:
            found[way][task] = replays(task, args)
            print(way, task, found[way][task], flush=True)
    OUT.write_text(json.dumps(dict(commit=harness.commit(), steps=args.steps, **found), indent=2) + "\n")
    if any(task["different"] or task["of_these_different"] for task in found["as it is"].values()):
        sys.exit("an episode ended elsewhere when it was played again")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
