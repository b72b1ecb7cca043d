"""lerobot's EnvHub: a repository of the hub whose `env.py` makes environments that lerobot's evaluation runs its policies in.

    # env.py
    from pi_stepnft.envs.envhub import hub

    make_env = hub("PickCube-v1", image_size=96)

    # lerobot: make_env("me/pickcube", n_envs=8, trust_remote_code=True), then lerobot.scripts.lerobot_eval.eval_policy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space

from pi_stepnft import envs
from pi_stepnft.envs.vector import ChunkEnv

CAMERAS = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"


class SingleActionEnv(gym.vector.VectorEnv):
    """A `ChunkEnv` as lerobot knows vector environments: one action a step, and its names for what is observed.

    Observation: "pixels" {camera: uint8 (B, H, W, 3)}, "agent_pos" float32 (B, S). `info["is_success"]` (B,) bool.
    An environment that has ended stays as it is until the next reset, which is what lerobot wraps its own environments for.
    """

    metadata = {**ChunkEnv.metadata, "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(self, venv: ChunkEnv, cameras: Sequence[str] | None = None):
        """cameras: what the pictures are called, in their order; default: openpi's names. Raises EnvError for too few names."""
        self.venv, self.num_envs = venv, venv.num_envs
        self.cameras = tuple(CAMERAS if cameras is None else cameras)[: len(venv.cameras)]
        if len(self.cameras) < len(venv.cameras):
            raise envs.EnvError(f"cameras are {', '.join(self.cameras)}; expected names for {', '.join(venv.cameras)}")
        inner, state = venv.single_action_space, venv.single_observation_space["state"]
        picture = gym.spaces.Box(0, 255, venv.single_observation_space["image"].shape[1:], np.uint8)
        pictures = {"pixels": gym.spaces.Dict({name: picture for name in self.cameras})} if self.cameras else {}
        self.single_action_space = gym.spaces.Box(inner.low[0], inner.high[0], dtype=np.float32)
        self.single_observation_space = gym.spaces.Dict(agent_pos=state, **pictures)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin an episode in every environment. options: lerobot's own mean nothing here."""
        obs, _ = self.venv.reset(seed=seed)
        return self._named(obs), {}

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One action (B, A) in each environment that has not ended."""
        obs, reward, terminated, truncated, info = self.venv.step(np.asarray(actions)[:, None])
        return self._named(obs), reward, terminated, truncated, {"is_success": info["success"]}

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """What lerobot asks of each environment: `task_description`, `task`, `_max_episode_steps`, `render`."""
        if name == "render":
            return tuple(self.venv.render())
        return self.get_attr(name)

    def get_attr(self, name: str) -> tuple:
        """One value for each environment. Raises AttributeError for a name that lerobot does not ask for."""
        limits = [self.venv.max_episode_steps] * self.num_envs
        told = dict(task_description=self.venv.instructions, task=self.venv.tasks, _max_episode_steps=limits)
        if name not in told:
            raise AttributeError(f"{type(self).__name__} has no {name!r}, only {', '.join(told)}")
        return tuple(told[name])

    def render(self) -> tuple:
        return self.call("render")

    def close_extras(self, **kwargs: Any) -> None:
        self.venv.close()

    def _named(self, obs: dict[str, np.ndarray]) -> dict:
        named: dict[str, Any] = {"agent_pos": obs["state"]}
        if self.cameras:
            named["pixels"] = {name: obs["image"][:, index] for index, name in enumerate(self.cameras)}
        return named


def hub(env_id: str, cameras: Sequence[str] | None = None, **options: Any) -> Callable[..., dict[str, dict[int, SingleActionEnv]]]:
    """`make_env(n_envs, use_async_envs)` for an `env.py`: {env_id: {0: the environments}}.

    cameras: as of SingleActionEnv; options: as of `envs.make`. The environments always run in worker processes: several where
    use_async_envs is set (it is lerobot's default), else one.
    """

    def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None) -> dict[str, dict[int, SingleActionEnv]]:
        workers = {} if use_async_envs else {"num_workers": 1}
        venv = envs.make(env_id, n_envs, chunk=1, **{**workers, **options})
        try:
            return {env_id: {0: SingleActionEnv(venv, cameras)}}
        except envs.EnvError:
            venv.close()
            raise

    return make_env
