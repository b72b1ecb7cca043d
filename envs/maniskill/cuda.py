"""`CudaVecEnv`: hundreds of ManiSkill scenes in one batched simulation, behind the interface of the process pool."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.maniskill import env as maniskill
from pi_stepnft.envs.maniskill import plate, tasks
from pi_stepnft.envs.vector import ChunkEnv

if TYPE_CHECKING:
    from pi_stepnft.envs.maniskill.simulator import ManiSkillSpec


def _rows(tree: Any, index: torch.Tensor) -> Any:
    """The given rows of every (B, …) tensor in a nested dict."""
    return {k: _rows(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def _copy_rows(target: dict, source: dict, index: torch.Tensor) -> None:
    """Overwrite the given rows of every (B, …) tensor in the nested dict `target` with those of `source`."""
    for key, value in source.items():
        if isinstance(value, dict):
            _copy_rows(target[key], value, index)
        else:
            target[key][index] = value[index]


def initial_info(base) -> dict:
    """`base.get_info()` right after a reset, when nothing is grasped.

    ManiSkill reads grasps from the contacts of the last simulation step, which a reset leaves in place: what was held at the end
    of one episode would count as held at the start of the next.
    """
    agent = base.agent
    own = vars(agent).get("is_grasping")
    agent.is_grasping = lambda *_, **__: torch.zeros(base.num_envs, dtype=torch.bool, device=base.device)
    try:
        return base.get_info()
    finally:
        del agent.is_grasping
        if own:
            agent.is_grasping = own


class CudaVecEnv(ChunkEnv):
    """`ChunkEnv` on one ManiSkill simulation that steps all environments together.

    All environments take part in every simulation step; one that has ended rests, its results and its observation stay as they
    were when it ended, and its scene is put back before a picture is taken. Pictures are taken once per chunk.

    backend: "cuda", or "cpu", which holds a single environment.
    """

    def __init__(self, spec: ManiSkillSpec, num_envs: int, *, chunk: int, seed: int, backend: str = "cuda"):
        super().__init__(spec, num_envs, seed)
        self._drifted = np.zeros(num_envs, bool)  # which scenes are no longer those at the end of their episodes, `_scenes`
        with torch.no_grad():
            self.env = maniskill.create(spec, num_envs, backend)
            self.base = self.env.unwrapped
            self._initialize, self.base._initialize_episode = self.base._initialize_episode, self._initialize_by_seed
            self._seeds, self._steps = np.zeros(num_envs, int), np.zeros(num_envs, int)
            self._reset(np.arange(num_envs))
            cameras = maniskill.cameras_of(self.base, spec)
            state = maniskill.state_vector(self.base, self.base.get_info(), spec.joints)
        try:
            self._describe(
                chunk,
                [(spec.env_id, text) for text in maniskill.instructions_of(self.base, spec)],
                action_space=self.base.single_action_space,
                state_dim=state.shape[1],
                cameras=cameras,
                max_episode_steps=tasks.episode_limit(spec.env_id, spec.max_episode_steps),
            )
        except EnvError:
            self.close()
            raise
        self._obs = {name: np.zeros(space.shape, space.dtype) for name, space in self.observation_space.items()}
        self._scenes: dict = self.base.get_state_dict()  # of each environment, at the end of its episode

    def reset(self, *, seed: int | Iterable[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        seeds, mask = self._reset_arguments(seed, options)
        self._seeds[mask] = seeds[mask]
        self._running[mask], self._success[mask], self._drifted[mask], self._steps[mask] = True, False, False, 0
        if mask.any():
            with torch.no_grad():
                self._reset(np.flatnonzero(mask))
                self._observe_state(mask, initial_info(self.base))
                self._observe_images(mask)
                for slot, text in enumerate(maniskill.instructions_of(self.base, self.spec)):
                    if mask[slot]:
                        self.instructions[slot] = text
        info = dict(success=self._success.copy(), steps=np.zeros(self.num_envs, int), lost=np.zeros(self.num_envs, bool))
        return {name: value.copy() for name, value in self._obs.items()}, info

    def step(self, chunk: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        chunk, lost = self._step_argument(chunk)
        chunk = maniskill.executed(chunk, self.spec)
        self._running &= ~lost
        reward, steps = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, int)
        terminated, truncated = ~self._running & self._success, lost.copy()
        with torch.no_grad():
            for i in range(chunk.shape[1]):
                if not self._running.any():
                    break
                moved = self._running.copy()
                self._drifted |= ~moved
                action = np.where(moved[:, None], chunk[:, i], 0).astype(np.float32)
                self.base._step_action(torch.as_tensor(action, device=self.base.device))
                self.base._elapsed_steps += 1
                info = self.base.get_info()
                success, fail = (self._flag(info, name) & moved for name in ("success", "fail"))
                reward += np.where(moved, self._reward(action, info, success), 0)
                self._success |= success
                self._steps += moved
                steps += moved
                terminated |= success | fail
                truncated |= moved & ~terminated & (self._steps >= self.max_episode_steps)
                self._running &= ~(terminated | truncated)
                if (ended := moved & ~self._running).any():
                    self._observe_state(ended, info)
                    _copy_rows(self._scenes, self.base.get_state_dict(), torch.as_tensor(ended, device=self.base.device))
            if steps.any():
                self._observe_state(self._running, info)
                self._observe_images(steps > 0)
        info = dict(success=self._success.copy(), steps=steps, lost=lost)
        return {name: value.copy() for name, value in self._obs.items()}, reward, terminated, truncated, info

    def render(self, slots: Iterable[int] | None = None) -> list[np.ndarray]:
        """Pictures for people (H, W, 3) uint8 of the given environments (default: all), from the task's render camera."""
        self._check_open()
        with torch.no_grad():
            self._put_back()
            frames = maniskill.frames(self.base, self.spec)
        return [frames[slot].copy() for slot in (range(self.num_envs) if slots is None else slots)]

    def call(self, function: Any, jobs: Iterable[dict]) -> None:
        raise EnvError("scripted experts run on the CPU back end: collect with envs.make(…, backend='cpu')")

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()

    # initial states

    def _reset(self, index: np.ndarray) -> None:
        """Start new episodes from self._seeds in the environments `index`."""
        base = self.base
        obs_mode, base._obs_mode = base._obs_mode, "none"  # nobody reads this observation: do not render it
        try:
            if grid := plate.reset_options(base, self._seeds):  # their code knows no other than whole batches
                others = np.isin(np.arange(self.num_envs), index, invert=True)
                if (self._running & others).any():
                    raise EnvError(f"{self.spec.env_id} begins all its episodes at once: not while others are running")
                self._drifted |= others
                base.reset(seed=self._seeds.tolist(), options=grid)
            else:
                base.reset(seed=self._seeds.tolist(), options={"env_idx": torch.as_tensor(index, device=base.device)})
        finally:
            base._obs_mode = obs_mode

    def _initialize_by_seed(self, env_idx: torch.Tensor, options: dict) -> None:
        """In place of the task's `_initialize_episode`: one initial state per seed, whatever else is in the batch.

        ManiSkill draws one batch of random numbers, seeded by the first environment. Here the first environment of each seed is
        initialised alone, from its own seed, and its scene is copied to the others of that seed. A task whose episodes bring their
        instructions keeps more than the scene: there each environment is initialised alone.
        """
        if "episode_id" in options:
            return self._initialize(env_idx, options)
        base, index = self.base, env_idx.cpu().numpy()
        alike = np.arange(self.num_envs) if hasattr(base, "get_language_instruction") else self._seeds
        _, first, group = np.unique(alike[index], return_index=True, return_inverse=True)
        leaders, followers = index[first], np.delete(index, first)
        mask = base.scene._reset_mask
        if len(followers):  # whatever a task keeps beside the scene
            self._initialize_alone(followers, options)
        for leader in leaders:
            torch.manual_seed(int(self._seeds[leader]))
            base._episode_rng = base._batched_episode_rng[int(leader)] = np.random.RandomState(self._seeds[leader])
            self._initialize_alone(np.array([leader]), options)
        if len(followers):
            source = np.delete(leaders[group], first)
            base.set_state_dict(_rows(base.get_state_dict(), torch.as_tensor(source)), torch.as_tensor(followers))
        base.scene._reset_mask = mask

    def _initialize_alone(self, index: np.ndarray, options: dict) -> None:
        base = self.base
        index = torch.as_tensor(index, device=base.device)
        base.scene._reset_mask = torch.zeros(self.num_envs, dtype=torch.bool, device=base.device)
        base.scene._reset_mask[index] = True
        self._initialize(index, options)

    # results

    def _flag(self, info: dict, name: str) -> np.ndarray:
        return info[name].cpu().numpy().astype(bool) if name in info else np.zeros(self.num_envs, bool)

    def _reward(self, action: np.ndarray, info: dict, success: np.ndarray) -> np.ndarray:
        if self.spec.reward_mode in ("sparse", "none"):
            return success.astype(np.float32) * (self.spec.reward_mode == "sparse")
        base = self.base
        obs = base.get_obs(info, unflattened=True)
        return base.get_reward(obs=obs, action=torch.as_tensor(action, device=base.device), info=info).cpu().numpy()

    def _observe_state(self, which: np.ndarray, info: dict) -> None:
        self._obs["state"][which] = maniskill.state_vector(self.base, info, self.spec.joints).cpu().numpy()[which]

    def _observe_images(self, which: np.ndarray) -> None:
        if self._obs["image"].size:
            self._put_back()
            for i, picture in enumerate(maniskill.pictures(self.base, self.cameras, self.spec.image_size)):
                self._obs["image"][which, i] = picture[which]

    def _put_back(self) -> None:
        """Put the scenes of environments that have ended back to where they ended."""
        if self._drifted.any():
            index = torch.as_tensor(np.flatnonzero(self._drifted), device=self.base.device)
            self.base.set_state_dict(_rows(self._scenes, index), index)
            self._drifted[:] = False
