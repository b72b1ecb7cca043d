"""The simulators as other frameworks know environments: `Single` is what `gym.make` returns, `Vector` what `gym.make_vec` does.

Both are faces of the same `ChunkEnv`. What they add is Gymnasium's letter: a single action per step where it is wanted, autoreset,
infos with masks, and one generator of episode seeds per environment, so that an environment's episodes do not depend on its
neighbours'. `pi_stepnft.registration` has the ids. Options are those of `envs.make`, and so are the defaults.

- `chunk=n`: a step takes n actions (n, A). `chunk=None`: it takes a single one (A,).
- Observations: where there are pictures `{"image": (cameras, H, W, 3) uint8, "state": (S,) float32}`, else the state alone.
- Infos: "success" bool, "steps" int, "lost" bool, as of `ChunkEnv`.
- A reset without a seed draws one below `TRAIN_SEEDS`, so no training sees the initial states of an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

from pi_stepnft import envs
from pi_stepnft.envs.base import TRAIN_SEEDS, EnvError
from pi_stepnft.envs.vector import ChunkEnv, check_seeds, numbers

METADATA = {"render_modes": ["rgb_array"], "render_fps": 20}


def _spaces(venv: ChunkEnv, chunk: int | None) -> tuple[gym.Space, gym.Space]:
    """Of one environment: what a step takes, and what it shows."""
    action, observation = venv.single_action_space, venv.single_observation_space
    if chunk is None:
        action = gym.spaces.Box(action.low[0], action.high[0], dtype=np.float32)
    return action, observation if venv.cameras else observation["state"]


def _shown(venv: ChunkEnv, obs: dict[str, np.ndarray]) -> Any:
    return obs if venv.cameras else obs["state"]


def _row(shown: Any, i: int) -> Any:
    """Environment i's."""
    return {name: rows[i] for name, rows in shown.items()} if isinstance(shown, dict) else shown[i]


def _chunk(actions: Any, space: gym.Space, chunk: int | None) -> np.ndarray:
    """Actions of the space's shape as float32; a chunk may be longer or shorter than the space's, but not empty."""
    actions = numbers(actions)
    wanted = [*space.shape[:-2], "n", space.shape[-1]] if chunk is not None else space.shape
    fits = actions.ndim == len(wanted) and all(size in ("n", given) for size, given in zip(wanted, actions.shape))
    if not fits or not actions.size:
        raise EnvError(f"step takes actions of shape ({', '.join(map(str, wanted))}), got {actions.shape}")
    return actions


def _draw(generator: np.random.Generator) -> int:
    return int(generator.integers(TRAIN_SEEDS))


class Single(gym.Env):
    """One environment, in this process. Attributes: `instruction`, of the current episode; `max_episode_steps`, in actions.

    Errors: EnvError, in one line, for what is wrong with the arguments, and for a step after the end of an episode.
    """

    metadata = METADATA

    def __init__(self, env_id: str, *, chunk: int | None = 8, render_mode: str | None = None, **options: Any):
        if refused := sorted({"backend", "num_workers"} & options.keys()):
            raise EnvError(f"a single environment lives in this process and takes no {' or '.join(refused)}: use make_vec")
        self.render_mode, self._chunk = render_mode, chunk
        self._venv = envs.make(env_id, 1, chunk=1 if chunk is None else chunk, backend="cpu", num_workers=0, **options)
        self.action_space, self.observation_space = _spaces(self._venv, chunk)
        self.max_episode_steps = self._venv.max_episode_steps
        self._over = True

    @property
    def instruction(self) -> str:
        return self._venv.instruction

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        obs, info = self._venv.reset(seed=[_draw(self.np_random) if seed is None else seed])
        self._over = False
        return _row(_shown(self._venv, obs), 0), {name: rows[0].item() for name, rows in info.items()}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        if self._over:
            raise EnvError("the episode is over, or has not begun: call reset() before step()")
        action = _chunk(action, self.action_space, self._chunk)
        obs, reward, terminated, truncated, info = self._venv.step(action[None, None] if self._chunk is None else action[None])
        self._over = bool(terminated[0] or truncated[0])
        info = {name: rows[0].item() for name, rows in info.items()}
        return _row(_shown(self._venv, obs), 0), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:
        """A picture for people (H, W, 3) uint8, from the task's render camera."""
        return self._venv.render()[0] if self.render_mode else None

    def close(self) -> None:
        self._venv.close()


class Vector(gym.vector.VectorEnv):
    """Several environments, in the processes or on the GPU that `envs.make` chooses.

    autoreset: one of gymnasium's `AutoresetMode`, or its name in small letters. "disabled": an environment whose episode has ended
        rests until `reset(options={"reset_mask": (B,) bool})`. "next_step": the next step resets it, whatever its action.
        "same_step": the same step resets it, and `info["final_obs"]` and `info["final_info"]` hold what the episode ended with.

    Attributes: `instructions`, one per environment and of its current episode; `tasks`; `max_episode_steps`, in actions.
    Errors: EnvError, in one line, for all that is wrong with the arguments, and for a step before every environment was reset.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        *,
        autoreset: str | AutoresetMode = "disabled",
        chunk: int | None = 8,
        render_mode: str | None = None,
        **options: Any,
    ):
        modes = {mode.name.lower(): mode for mode in AutoresetMode}
        if not isinstance(autoreset, str | AutoresetMode) or modes.get(autoreset, autoreset) not in modes.values():
            raise EnvError(f"autoreset must be {', '.join(map(repr, modes))}, got {autoreset!r}")
        self.autoreset_mode = modes.get(autoreset, autoreset)  # where gymnasium's own vectors have it too
        self.metadata, self.render_mode = METADATA | {"autoreset_mode": self.autoreset_mode}, render_mode
        self._venv, self.num_envs = envs.make(env_id, num_envs, chunk=1 if chunk is None else chunk, **options), num_envs
        self._chunk = chunk
        self.single_action_space, self.single_observation_space = _spaces(self._venv, chunk)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.tasks, self.max_episode_steps = self._venv.tasks, self._venv.max_episode_steps
        self._generators = [seeding.np_random()[0] for _ in range(num_envs)]
        self._begun, self._over = np.zeros(num_envs, bool), np.zeros(num_envs, bool)  # ever reset; ended since

    @property
    def instructions(self) -> list[str]:
        return self._venv.instructions

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """seed: an int (environment i gets seed + i), one per environment, of which some may be None, or None.
        options: `reset_mask` (B,) bool, which environments to reset (default: all)."""
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise EnvError(f"reset_mask takes one bool per environment ({self.num_envs}), got {mask.dtype} of shape {mask.shape}")
        if seed is not None and np.ndim(seed) == 0:
            check_seeds([seed])
            seed = range(int(seed), int(seed) + self.num_envs)
        obs, info = self._begin(mask, [None] * self.num_envs if seed is None else list(seed))
        self._over &= ~mask
        return _shown(self._venv, obs), _masked(info, mask)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict]:
        if not self._begun.all():
            raise EnvError("some environments have not begun an episode: call reset() before step()")
        actions = _chunk(actions, self.action_space, self._chunk)
        obs, reward, terminated, truncated, info = self._venv.step(actions[:, None] if self._chunk is None else actions)
        over, extra = terminated | truncated, {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            again = self._over
            terminated, truncated, over = terminated & ~again, truncated & ~again, over & ~again
        else:
            again = over if self.autoreset_mode == AutoresetMode.SAME_STEP else np.zeros(self.num_envs, bool)
        if again.any():
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                final_obs = np.full(self.num_envs, None, object)
                for i in np.flatnonzero(again):
                    final_obs[i] = _row(_shown(self._venv, obs), i)
                extra = dict(final_obs=final_obs, _final_obs=again, final_info=_masked(info, again), _final_info=again.copy())
            obs, fresh = self._begin(again, [None] * self.num_envs)
            info = {name: np.where(again, fresh[name], value) for name, value in info.items()}
        self._over = over
        info = extra | _masked(info, np.ones_like(over))
        return _shown(self._venv, obs), reward.astype(np.float64), terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Pictures for people (H, W, 3) uint8, from the tasks' render cameras."""
        return tuple(self._venv.render()) if self.render_mode else None

    def close_extras(self, **kwargs: Any) -> None:
        self._venv.close()

    def _begin(self, mask: np.ndarray, seeds: list[int | None]) -> tuple[dict, dict]:
        """New episodes in the environments of the mask; a seed restarts the environment's own generator, None draws from it."""
        if len(seeds) != self.num_envs:
            raise EnvError(f"reset takes one seed per environment ({self.num_envs}), got {len(seeds)}")
        check_seeds(seeds[i] for i in np.flatnonzero(mask) if seeds[i] is not None)  # before any generator is touched
        for i in np.flatnonzero(mask):
            if seeds[i] is not None:
                self._generators[i] = seeding.np_random(int(seeds[i]))[0]
            else:
                seeds[i] = _draw(self._generators[i])
        seeds = [seed if begun else 0 for seed, begun in zip(seeds, mask)]
        begun = self._venv.reset(seed=seeds, options=dict(reset_mask=mask))
        self._begun |= mask
        return begun


def _masked(info: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Gymnasium's form of an info: beside each entry a mask of the environments that it is about, and zero for the others."""
    told = {}
    for name, values in info.items():
        told[name], told[f"_{name}"] = np.where(mask, values, np.zeros_like(values)), mask.copy()
    return told
