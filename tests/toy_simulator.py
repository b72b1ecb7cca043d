"""A whole simulator: a point in the plane is to reach a place. `tests/test_simulators.py` adds it to the table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gymnasium.spaces import Box

from pi_stepnft import envs


@dataclass(frozen=True)
class ToySpec(envs.Spec):
    speed: float = 0.1

    def create(self, slot: int, num_envs: int) -> Point:
        return Point(self)


class Point(envs.Environment):
    """Succeeds within 0.1 of the goal; in obs_mode "rgb" both are seen, and the state does not tell where the goal is."""

    def __init__(self, spec: ToySpec):
        self.spec, self.task, self.instruction = spec, spec.env_id, spec.instruction or "go to the goal"
        self.action_space = Box(-1, 1, (2,))
        self.cameras = ("above",) if spec.obs_mode == "rgb" else ()
        self.state_dim = 2 if self.cameras else 4
        self.max_episode_steps = spec.max_episode_steps or 30
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.at, self.goal = np.random.default_rng(seed).uniform(-1, 1, (2, 2))
        self.steps, self.success = 0, False

    def step(self, chunk: np.ndarray) -> tuple[float, bool, bool, int]:
        before = self.steps
        for action in chunk:
            self.at = self.at + self.spec.speed * np.clip(action, -1, 1)
            self.steps += 1
            self.success = bool(np.linalg.norm(self.goal - self.at) < 0.1)
            if self.success or self.steps >= self.max_episode_steps:
                break
        return float(self.success), self.success, not self.success and self.steps >= self.max_episode_steps, self.steps - before

    def observe(self, image: np.ndarray, state: np.ndarray) -> None:
        state[:] = self.at if self.cameras else [*self.at, *self.goal]
        if self.cameras:
            image[:] = 0
            for channel, place in enumerate((self.at, self.goal)):
                row, column = ((np.clip(place, -1, 1) + 1) / 2 * (self.spec.image_size - 1)).astype(int)
                image[0, row, column, channel] = 255

    def object_positions(self) -> np.ndarray:
        return np.float32([[*self.goal, 0]])

    def expert(self) -> Straight:
        return Straight(self)


class Straight:
    def __init__(self, env: Point):
        self.env = env

    def reset(self) -> None:
        pass

    def act(self) -> np.ndarray:
        return np.clip((self.env.goal - self.env.at) / self.env.spec.speed, -1, 1).astype(np.float32)


class Toy(envs.Simulator):
    Spec, packages = ToySpec, ("numpy",)

    def knows(self, env_id: str) -> bool:
        return env_id == "Point-v0"

    def expert(self, env_id: str) -> None:
        pass
