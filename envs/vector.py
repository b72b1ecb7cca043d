"""`ChunkEnv`: a gymnasium VectorEnv over action chunks, what every back end has in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from pi_stepnft.envs.base import EnvError, Spec


class ChunkEnv(gym.vector.VectorEnv):
    """Several environments stepped by action chunks: what every back end has in common.

    - `reset(seed=…, options=…)`: `seed` an int (environment i gets seed + i), an array of one seed per environment, or None (drawn
      from the vector's own generator). The same seed gives the same initial state, so equal seeds make a group.
      `options={"reset_mask": (B,) bool}` resets only some.
    - `step(chunk (B, n, A))`, within the bounds of the action space, executes up to n actions in each environment that is still
      running. An environment stops at success, failure or its limit; from then on stepping it does nothing until it is reset
      (gymnasium's AutoresetMode.DISABLED).
    - Observation: `{"image": uint8 (B, cameras, H, W, 3), "state": float32 (B, S)}` after the last executed action.
    - `info`: "success" (B,) bool, whether the episode has succeeded; "steps" (B,) int, actions executed in this chunk; "lost" (B,)
      bool, whether the episode was cut off because its worker process died (the worker is replaced) or its actions were no finite
      numbers; it counts as truncated and should be dropped.

    Attributes: `instructions`, one per environment, which a task may change at every reset; `tasks`, the id of each; `cameras`,
    their names in the order of the pictures; `action_dim`, `max_episode_steps`, `spec`.

    Errors: EnvError, in one line, for all that is wrong with the task, its arguments, or the Vulkan driver.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED, "render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    overlaps = False
    """Whether some environments can be under way while others are waited for."""

    def __init__(self, spec: Spec, num_envs: int, seed: int):
        self.spec, self.num_envs = spec, num_envs
        self._rng = np.random.default_rng(seed)
        self._running = np.zeros(num_envs, bool)
        self._success = np.zeros(num_envs, bool)
        self._asked: deque = deque()  # resets and steps that are under way

    # What is asked by the _async methods is answered by the _wait methods, in order.

    def reset_async(self, *, seed: int | Iterable[int] | None = None, options: dict | None = None) -> None:
        self._asked.append(partial(self.reset, seed=seed, options=options))

    def reset_wait(self) -> tuple[dict, dict]:
        return self._asked.popleft()()

    def step_async(self, chunk: np.ndarray, mask: np.ndarray) -> None:
        """mask: (B,) bool, the environments to step; where nothing overlaps, all that are running."""
        self._asked.append(partial(self.step, chunk))

    def step_wait(self) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        return self._asked.popleft()()

    def __repr__(self) -> str:  # gymnasium's expects a spec of its own kind
        return f"{type(self).__name__}({self.spec.env_id!r}, num_envs={self.num_envs})"

    def _describe(
        self,
        chunk: int,
        tasks: list[tuple[str, str]],
        *,
        action_space: gym.spaces.Box,
        state_dim: int,
        cameras: tuple[str, ...],
        max_episode_steps: int,
    ) -> None:
        """Set the spaces and the attributes that learners read. tasks: id and instruction of each environment's."""
        if not 1 <= chunk <= max_episode_steps:
            raise EnvError(f"a chunk of {chunk} actions does not fit an episode of {max_episode_steps} steps")
        self.tasks, self.instructions = map(list, zip(*tasks))
        self.max_episode_steps, self.action_dim, self.cameras = max_episode_steps, action_space.shape[0], tuple(cameras)
        size = self.spec.image_size if cameras else 0
        low, high = (np.tile(bound, (chunk, 1)) for bound in (action_space.low, action_space.high))
        self.single_action_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.single_observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (len(cameras), size, size, 3), np.uint8),
            state=gym.spaces.Box(-np.inf, np.inf, (state_dim,), np.float32),
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)

    @property
    def instruction(self) -> str:
        """The first environment's."""
        return self.instructions[0]

    def _check_open(self) -> None:
        if self.closed:
            raise EnvError("the environments are closed: make them again")

    def _reset_arguments(self, seed: int | Iterable[int] | None, options: dict | None) -> tuple[np.ndarray, np.ndarray]:
        """One seed per environment (B,) int, and which are to be reset (B,) bool."""
        self._check_open()
        if seed is None:
            seeds = self._rng.integers(2**31, size=self.num_envs)
        elif np.ndim(seed) == 0:
            seeds = np.array([seed + i for i in range(self.num_envs)], object)
        else:
            seeds = np.array(seed, object)  # which numbers of any size fit
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)), bool)
        for name, array in (("seed", seeds), ("reset_mask", mask)):
            if array.shape != (self.num_envs,):
                raise EnvError(f"reset takes one {name} per environment ({self.num_envs}), got an array of shape {array.shape}")
        check_seeds(seeds[mask])
        seeds = np.where(mask, seeds, 0).astype(int)
        return seeds, mask

    def _step_argument(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chunk as float32 (B, n, A), no longer than an episode, and which running environments cannot be given theirs (B,)
        bool, as it holds what is no finite number."""
        self._check_open()
        chunk = numbers(chunk)
        if chunk.ndim != 3 or chunk.shape[0] != self.num_envs or chunk.shape[2] != self.action_dim:
            raise EnvError(f"step takes a chunk of shape ({self.num_envs}, n, {self.action_dim}), got {chunk.shape}")
        chunk = chunk[:, : self.max_episode_steps]
        broken = ~np.isfinite(chunk).all((1, 2))
        return np.where(broken[:, None, None], 0, chunk), broken & self._running


def numbers(actions: Any) -> np.ndarray:
    """Actions as float32, of whatever shape. Raises EnvError for what is none, text or rows of different lengths."""
    try:
        return np.asarray(actions, np.float32)
    except (TypeError, ValueError) as error:
        raise EnvError(f"actions must be an array of numbers: {error}") from None


def check_seeds(seeds: Iterable[Any]) -> None:
    """Raise EnvError for what is no seed."""
    for seed in seeds:
        if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
            raise EnvError(f"a seed must be a whole number from 0 to 2^32 - 1, got {seed!r}")
