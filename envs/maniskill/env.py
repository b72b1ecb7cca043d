"""ManiSkill tasks: which there are, how one is created, and a single CPU scene stepped by action chunks (`ManiSkillEnv`)."""

from __future__ import annotations

import difflib
import functools
import warnings
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch

from pi_stepnft.envs import vulkan
from pi_stepnft.envs.base import EnvError, EnvSpec
from pi_stepnft.envs.maniskill import ood

INSTRUCTIONS = {
    "PickCube-v1": "pick up the red cube and move it to the goal",
    "PushCube-v1": "push the cube to the goal region",
    "PullCube-v1": "pull the cube to the goal region",
    "StackCube-v1": "stack the red cube on the green cube",
    "LiftPegUpright-v1": "lift the peg upright",
    "PlaceSphere-v1": "place the sphere into the bin",
}
"""Language instruction per task; other tasks get their id spelled out ("PokeCube-v1" → "poke cube")."""


@dataclass(frozen=True)
class Camera:
    """A fixed base camera. Eye and target in metres in the world frame (robot base at x = −0.615), vertical field of view in rad.

    The default looks at the work area from the front and above, so closely that a 4 cm cube is 9 px wide in a 96 px picture; in
    ManiSkill's own view (fov π/2) it is 3 px.
    """

    eye: tuple[float, float, float] = (0.55, 0.0, 0.42)
    target: tuple[float, float, float] = (0.0, 0.0, 0.08)
    fov: float = 0.6


def instruction(env_id: str) -> str:
    """The language instruction of a task, or of a variant of one."""
    if (changed := ood.find(env_id).instruction) is not None:
        return changed
    env_id = ood.task_of(env_id)
    if env_id in INSTRUCTIONS:
        return INSTRUCTIONS[env_id]
    name = env_id.rsplit("-", 1)[0]
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


@functools.cache
def _registry():
    """ManiSkill's task registry. Imports SAPIEN, so the driver must be chosen first."""
    vulkan.ensure_driver()
    try:
        import mani_skill.envs  # noqa: F401 (registers the tasks)
        from mani_skill.utils import assets
        from mani_skill.utils.registration import REGISTERED_ENVS
    except ImportError as error:
        if vulkan.is_driver_error(error):
            raise EnvError(vulkan.no_driver_message()) from error
        raise EnvError(f"ManiSkill cannot be imported ({error}): pip install mani-skill") from error

    return REGISTERED_ENVS, assets


def check(env_id: str) -> None:
    """Raise EnvError, in one line, for a task or variant that does not exist, or whose assets are not on this machine."""
    registered, assets = _registry()
    env_id, variant = ood.task_of(env_id), env_id
    if env_id not in registered:
        near = difflib.get_close_matches(env_id, registered, n=3)
        raise EnvError(
            f"unknown environment id {env_id!r}: not a ManiSkill task" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    sources = []
    for asset in registered[env_id].asset_download_ids or []:
        sources += assets.expand_data_group_into_individual_data_source_ids(asset) if asset in assets.DATA_GROUPS else [asset]
    missing = [s for s in sources if not assets.is_data_source_downloaded(s)]
    if missing:
        raise EnvError(
            f"{env_id} needs {len(missing)} asset(s) that are not on this machine; download them with: "
            f"python -m mani_skill.utils.download_asset {env_id}"
        )
    ood.find(variant)


@functools.cache
def gpu_simulation() -> bool:
    """Whether PhysX can simulate on a GPU here. Its library is downloaded at the first use; without it, says why, in a warning."""
    if not torch.cuda.is_available():
        return False
    _registry()
    from sapien import physx

    try:
        physx.enable_gpu()
    except Exception as error:  # no network, no disk, a driver that is too old: the process pool works without it
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"no simulation on the GPU, processes on the CPU instead: PhysX's library is missing ({reason})", stacklevel=3
        )
    return physx.is_gpu_enabled()


def _make(spec: EnvSpec, num_envs: int, backend: str) -> gym.Env:
    """The plain ManiSkill environment behind a spec; `backend` is "cpu" or "cuda"."""
    check(spec.env_id)
    from mani_skill.utils import sapien_utils

    from pi_stepnft.envs.maniskill.meshes import light_meshes
    from pi_stepnft.envs.maniskill.shaders import lean_shaders

    on_gpu = backend == "cuda" or vulkan.renders_on_gpu()
    kwargs = dict(
        num_envs=num_envs,
        obs_mode=spec.obs_mode,
        control_mode=spec.control_mode,
        reward_mode=spec.reward_mode,
        sim_backend=f"physx_{backend}",
        render_backend="gpu" if on_gpu else "cpu",
        render_mode="rgb_array",
        human_render_camera_configs=dict(width=spec.video_size, height=spec.video_size),
    )
    if spec.obs_mode == "rgb":
        size = dict(width=spec.image_size, height=spec.image_size)
        kwargs["sensor_configs"] = dict(size)
        if spec.camera is not None:
            pose = sapien_utils.look_at(spec.camera.eye, spec.camera.target)
            kwargs["sensor_configs"]["base_camera"] = dict(size, pose=pose, fov=spec.camera.fov)
    kwargs.update(spec.kwargs)
    try:
        # Rendering on a GPU does not mind triangles; there the meshes stay as they are.
        with light_meshes(spec.mesh_keep if backend == "cpu" else 1.0), lean_shaders(not on_gpu):
            env = gym.make(spec.env_id, disable_env_checker=True, **kwargs)
    except RuntimeError as error:
        if vulkan.is_driver_error(error):
            raise EnvError(vulkan.no_driver_message()) from error
        raise EnvError(f"{spec.env_id} could not be created: {str(error).splitlines()[0]}") from error
    except (KeyError, NotImplementedError, AssertionError, TypeError) as error:
        raise EnvError(f"{spec.env_id} could not be created with {spec.control_mode=}, {spec.reward_mode=}: {error}") from error
    return env


def episode_limit(spec: EnvSpec) -> int:
    """Steps after which an episode is cut off: the spec's own, or the task's registered limit."""
    limit = spec.max_episode_steps or _registry()[0][ood.task_of(spec.env_id)].max_episode_steps
    if limit is None:
        raise EnvError(f"{spec.env_id} has no episode limit of its own: give max_episode_steps")
    return limit


def _leaves(tree) -> list[torch.Tensor]:
    """The leaves of a nested dict of (B, …) tensors, in order, as (B, S_i) float32."""
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [torch.as_tensor(tree).reshape(len(tree), -1).float()]


def state_vector(base, info: dict) -> torch.Tensor:
    """(B, S): proprioception and task extras; with object poses only in obs_mode "state"."""
    return torch.cat(_leaves(base._get_obs_agent()) + _leaves(base._get_obs_extra(info)), dim=1)


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


class ManiSkillEnv:
    """One ManiSkill scene on the CPU, stepped by action chunks.

    Between the actions of a chunk it builds no observation, no reward (in the sparse mode) and no picture; success is checked
    after every action, so none is missed. Everything runs in inference mode, which also covers construction.
    """

    def __init__(self, spec: EnvSpec):
        self.spec = spec
        self.max_episode_steps = episode_limit(spec)
        self.task, self.instruction = spec.env_id, instruction(spec.env_id)
        self._software = not vulkan.renders_on_gpu()  # rendering
        with torch.inference_mode():
            self.env = _make(spec, 1, "cpu")
            self.base = self.env.unwrapped
            self._bound = self._set_action = None
            self.action_dim = int(self.base.single_action_space.shape[0])
            self.reset(0)
            self.cameras = tuple(self.base.scene.sensors) if spec.obs_mode == "rgb" else ()
            self.state_dim = state_vector(self.base, self.info).shape[1]

    def _bind(self) -> None:
        """Take the fast controller and grasp check into use for the current agent."""
        from pi_stepnft.envs.maniskill import fast_control

        self._bound = agent = self.base.agent
        if self.spec.fast_control:
            self._set_action = fast_control.make_set_action(agent)
            if is_grasping := fast_control.make_is_grasping(agent):
                agent.is_grasping = is_grasping

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`: the same seed gives the same initial state."""
        from pi_stepnft.envs.maniskill.meshes import light_meshes
        from pi_stepnft.envs.maniskill.shaders import lean_shaders

        # Some tasks build a new scene for every episode.
        with torch.inference_mode(), light_meshes(self.spec.mesh_keep), lean_shaders(self._software):
            obs_mode, self.base._obs_mode = self.base._obs_mode, "none"  # nobody reads this observation: do not render it
            try:
                self.base.reset(seed=int(seed))
            finally:
                self.base._obs_mode = obs_mode
            if self._bound is not self.base.agent:
                self._bind()
            self.info = initial_info(self.base)
        self.steps = 0
        self.success = False

    def step(self, chunk: np.ndarray) -> tuple[float, bool, bool, int]:
        """Execute up to n actions (n, A); stop at success, failure or the limit. Returns (reward, terminated, truncated, steps)."""
        reward, terminated, before = 0.0, False, self.steps
        with torch.inference_mode():
            for action in chunk:
                self._control_step(action)
                self.steps += 1
                self.info = self.base.get_info()
                self.success = bool(self.info.get("success", False))
                terminated = self.success or bool(self.info.get("fail", False))
                reward += self._reward(action)
                if terminated or self.steps >= self.max_episode_steps:
                    break
        return reward, terminated, not terminated and self.steps >= self.max_episode_steps, self.steps - before

    def _control_step(self, action: np.ndarray) -> None:
        """One control period: set the action's targets, then step the physics."""
        base = self.base
        if self._set_action is None:
            base._step_action(action)
        else:
            self._set_action(action)
            base._before_control_step()
            for _ in range(base._sim_steps_per_control):
                base._before_simulation_step()
                base.scene.step()
                base._after_simulation_step()
            base._after_control_step()
        base._elapsed_steps += 1

    def _reward(self, action: np.ndarray) -> float:
        if self.spec.reward_mode == "sparse":
            return float(self.success)
        if self.spec.reward_mode == "none":
            return 0.0
        base = self.base
        obs = base.get_obs(self.info, unflattened=True)
        return float(base.get_reward(obs=obs, action=torch.as_tensor(action)[None], info=self.info)[0])

    def observe(self, image: np.ndarray, state: np.ndarray) -> None:
        """Write the current observation into `image` uint8 (cameras, H, W, 3) and `state` float32 (S,)."""
        with torch.inference_mode():
            state[:] = state_vector(self.base, self.info)[0].numpy()
            if self.cameras:
                for i, data in enumerate(self.base._get_obs_sensor_data().values()):
                    image[i] = data["rgb"][0].cpu().numpy()

    def object_positions(self) -> np.ndarray:
        """World positions (objects, 3) float32, m, of everything that can be moved, in the order of the task's scene."""
        movable = [actor for actor in self.base.scene.actors.values() if actor.px_body_type == "dynamic"]
        return np.array([actor._objs[0].pose.p for actor in movable], np.float32).reshape(-1, 3)

    def render(self) -> np.ndarray:
        """A picture for people (H, W, 3) uint8, from the task's render camera, with the goal visible."""
        with torch.inference_mode():
            return self.base.render_rgb_array()[0].cpu().numpy()

    def close(self) -> None:
        self.env.close()
