"""ManiSkill's simulation: how one is created, and a single CPU scene stepped by action chunks (`ManiSkillEnv`)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
import torch

from pi_stepnft.envs import vulkan
from pi_stepnft.envs.base import EnvError, Environment, fit, import_module
from pi_stepnft.envs.maniskill import experts, plate, tasks, varied

if TYPE_CHECKING:
    from pi_stepnft.envs.maniskill.simulator import Camera, ManiSkillSpec


def create(spec: ManiSkillSpec, num_envs: int, backend: str) -> gym.Env:
    """The plain ManiSkill environment behind a spec; `backend` is "cpu" or "cuda"."""
    if spec.module:
        import_module(spec.module)
    tasks.check(spec.env_id, spec.robot)
    from pi_stepnft.envs.maniskill.meshes import light_meshes
    from pi_stepnft.envs.maniskill.shaders import lean_shaders

    on_gpu = backend == "cuda" or vulkan.renders_on_gpu()
    kwargs = dict(
        num_envs=num_envs,
        obs_mode=spec.sim_obs_mode if spec.obs_mode == "rgb" else spec.obs_mode,
        control_mode=spec.control_mode,
        reward_mode=spec.reward_mode,
        sim_backend=f"physx_{backend}",
        render_backend="gpu" if on_gpu else "cpu",
        render_mode="rgb_array",
        human_render_camera_configs=dict(width=spec.video_size, height=spec.video_size),
    )
    if spec.robot is not None:
        kwargs["robot_uids"] = spec.robot
    kwargs |= sensor_configs(spec, spec.camera)
    kwargs.update(spec.kwargs)
    gym_id = spec.env_id.rpartition(":")[2]
    if "/random-" in gym_id and gym_id not in gym.registry:
        varied.register(gym_id)
    silent = contextlib.redirect_stdout(io.StringIO()) if plate.knows(gym_id) else contextlib.nullcontext()  # it prints as it loads
    try:
        # Rendering on a GPU does not mind triangles; there the meshes stay as they are.
        with light_meshes(spec.mesh_keep if backend == "cpu" else 1.0), lean_shaders(not on_gpu), silent:
            try:
                env = gym.make(gym_id, disable_env_checker=True, **kwargs)
            except AttributeError as error:
                if "base_camera" not in str(error):
                    raise
                # A task without a base camera: there is none to place.
                env = gym.make(gym_id, disable_env_checker=True, **kwargs | sensor_configs(spec, None))
    except RuntimeError as error:
        if vulkan.is_driver_error(error):
            raise EnvError(vulkan.no_driver_message()) from error
        raise EnvError(f"{spec.env_id} could not be created: {str(error).splitlines()[0]}") from error
    except (FileNotFoundError, EOFError) as error:  # EOFError: ManiSkill asks whether to download, and nobody answers
        raise EnvError(
            f"{spec.env_id} needs files that are not on this machine ({str(error).splitlines()[0]}); download them with: "
            f"{tasks.download_command(gym_id)}"
        ) from error
    except (KeyError, NotImplementedError, AssertionError, TypeError, AttributeError) as error:
        given = ", ".join(f"{name}={getattr(spec, name)!r}" for name in ("control_mode", "reward_mode", "robot", "kwargs")
                          if getattr(spec, name) not in (None, {}))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvError(f"{spec.env_id} could not be created with {given}: {reason}") from error
    if not isinstance(env.unwrapped.single_action_space, gym.spaces.Box):
        env.close()
        raise EnvError(f"{spec.env_id} has several robots, or takes actions that are no vector: choose another task")
    return env


def sensor_configs(spec: ManiSkillSpec, camera: Camera | None) -> dict[str, dict]:
    if spec.obs_mode != "rgb" or spec.task_size:
        return {}
    from mani_skill.utils import sapien_utils

    size = dict(width=spec.image_size, height=spec.image_size)
    place = {}
    if camera is not None:
        place["base_camera"] = dict(size, pose=sapien_utils.look_at(camera.eye, camera.target), fov=camera.fov)
    return dict(sensor_configs=size | place)


def cameras_of(base, spec: ManiSkillSpec) -> tuple[str, ...]:
    """Names of the cameras that a policy sees by, in order. EnvError for one that the task does not have."""
    if spec.obs_mode != "rgb":
        return ()
    known = tuple(base.scene.sensors)
    chosen = known if spec.cameras is None else spec.cameras
    if not chosen or set(chosen) - set(known):
        raise EnvError(f"{spec.env_id} has the cameras {', '.join(known) or 'none'}, not {', '.join(chosen) or 'none'}")
    return chosen


def pictures(base, cameras: tuple[str, ...], size: int) -> list[np.ndarray]:
    """One (B, size, size, 3) uint8 per camera; no other is rendered, unless the task draws in their pictures itself."""
    sensors = base.scene.sensors
    if cameras == tuple(sensors) or base._obs_mode != "rgb":
        data = base._get_obs_sensor_data()
        drawn = [data[name]["rgb"] for name in cameras]
    else:
        base._sensors = base.scene.sensors = {name: sensors[name] for name in cameras}
        try:
            drawn = [data["rgb"] for data in base._get_obs_sensor_data().values()]
        finally:
            base._sensors = base.scene.sensors = sensors
    return [fit(picture.cpu().numpy(), size) for picture in drawn]


def frames(base, spec: ManiSkillSpec) -> np.ndarray:
    """Pictures for people (B, H, W, 3) uint8, from the task's render camera, with the goal visible; of a task that insists on its
    pictures' size, the policy's first, larger: what such a task draws in it itself is nowhere else."""
    if spec.task_size and spec.obs_mode == "rgb":
        return pictures(base, cameras_of(base, spec)[:1], spec.video_size)[0]
    return base.render_rgb_array().cpu().numpy()


def executed(actions: np.ndarray, spec: ManiSkillSpec) -> np.ndarray:
    """Actions (…, A) as the controller takes them."""
    if not spec.binary_gripper:
        return actions
    return np.concatenate([actions[..., :-1], np.where(actions[..., -1:] > 0.5, 1, -1)], -1, dtype=np.float32)


def instructions_of(base, spec: ManiSkillSpec) -> list[str]:
    """What each environment's policy is told in its present episode."""
    if spec.instruction is not None or not hasattr(base, "get_language_instruction"):
        return [spec.instruction or tasks.instruction(spec.env_id)] * base.num_envs
    told = base.get_language_instruction()
    return [told] * base.num_envs if isinstance(told, str) else list(told)


def _leaves(tree) -> list:
    """The leaves of a nested dict, in order."""
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def state_vector(base, info: dict, joints: int | None = None) -> torch.Tensor:
    """(B, S) float32: so many joint positions, or proprioception and task extras; with object poses only in obs_mode "state"."""
    if joints:
        return base.agent.robot.get_qpos()[:, :joints].float()
    parts = _leaves(base._get_obs_agent()) + _leaves(base._get_obs_extra(info))
    return torch.cat([torch.as_tensor(part).reshape(len(part), -1).float() for part in parts], dim=1)


def renew_physics(base) -> None:
    """Put all that is in a CPU scene into a new physics engine, as if it had just been built.

    What an episode does depends on more than the poses and velocities that a reset sets. PhysX hands out the numbers by which it
    orders contacts from lists that episodes leave in another order, and a body's wait until it may sleep runs on: of 48 episodes
    played again with the same actions, 12 ended elsewhere, by up to 0.3 m.
    """
    import sapien

    scene = base.scene
    old, = scene.sub_scenes
    entities = list(old.entities)
    bodies = [part for entity in entities for part in entity.components
              if isinstance(part, sapien.physx.PhysxRigidDynamicComponent) and not part.kinematic]
    for body in bodies:
        body.put_to_sleep()
    for entity in reversed(entities):
        old.remove_entity(entity)
    physics = sapien.physx.PhysxCpuSystem()
    physics.timestep = scene.px.timestep
    new = sapien.Scene([physics, *([old.render_system] if scene.can_render() else [])])
    for entity in entities:
        new.add_entity(entity)
    for body in bodies:
        body.wake_up()
    scene.sub_scenes, scene.px = [new], physics


class ManiSkillEnv(Environment):
    """One ManiSkill scene on the CPU, stepped by action chunks.

    Between the actions of a chunk it builds no observation, no reward (in the sparse mode) and no picture; success is checked
    after every action, so none is missed. Everything runs in inference mode, which also covers construction.
    """

    def __init__(self, spec: ManiSkillSpec):
        self.spec = spec
        self.task = spec.env_id
        self._software = not vulkan.renders_on_gpu()  # rendering
        with torch.inference_mode():
            self.env = create(spec, 1, "cpu")
            self.base = self.env.unwrapped
            self.max_episode_steps = tasks.episode_limit(spec.env_id, spec.max_episode_steps)
            self._bound = self._set_action = self._known = None
            self.action_space = self.base.single_action_space
            self.reset(0)
            self.cameras = cameras_of(self.base, spec)
            self.state_dim = state_vector(self.base, self.info, spec.joints).shape[1]

    def _bind(self) -> None:
        """Take into use what is faster than ManiSkill's own code and knows the current agent and task."""
        from pi_stepnft.envs.maniskill import fast_control, fast_info

        self._bound = agent = self.base.agent
        if self.spec.fast_control:
            self._known = fast_info.known(self.base)
            self._set_action = fast_control.make_set_action(agent)
            if is_grasping := fast_control.make_is_grasping(agent):
                agent.is_grasping = is_grasping

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """What the simulator runs in."""
        from pi_stepnft.envs.maniskill.fast_info import lean_poses

        with torch.inference_mode(), lean_poses(self.spec.fast_control):
            yield

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`: what follows is a function of it and of the actions alone."""
        from pi_stepnft.envs.maniskill.meshes import light_meshes
        from pi_stepnft.envs.maniskill.shaders import lean_shaders

        # Some tasks build a new scene for every episode.
        with self._mode(), light_meshes(self.spec.mesh_keep), lean_shaders(self._software):
            if self.base.reconfiguration_freq != 1:  # otherwise ManiSkill is about to build the scene anew
                renew_physics(self.base)
            obs_mode, self.base._obs_mode = self.base._obs_mode, "none"  # nobody reads this observation: do not render it
            try:
                self.base.reset(seed=int(seed), options=plate.reset_options(self.base, [seed]))
            finally:
                self.base._obs_mode = obs_mode
            if self._bound is not self.base.agent:
                self._bind()
            self._info = None if self._known else self.base.get_info()
            self.instruction = instructions_of(self.base, self.spec)[0]
        self.steps = 0
        self.success = False

    def step(self, chunk: np.ndarray) -> tuple[float, bool, bool, int]:
        """Execute up to n actions (n, A); stop at success, failure or the limit. Returns (reward, terminated, truncated, steps)."""
        reward, terminated, before = 0.0, False, self.steps
        with self._mode():
            for action in executed(chunk, self.spec):
                self._control_step(action)
                self.steps += 1
                self._info = None
                outcome = {} if self._known and self._known.is_far() else self.info
                self.success = bool(outcome.get("success", False))
                terminated = self.success or bool(outcome.get("fail", False))
                reward += self._reward(action)
                if terminated or self.steps >= self.max_episode_steps:
                    break
        return reward, terminated, not terminated and self.steps >= self.max_episode_steps, self.steps - before

    @property
    def info(self) -> dict:
        """What the task tells of the scene as it is: its `get_info()`."""
        if self._info is None:
            self._info = self.base.get_info()
        return self._info

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
        base._elapsed_steps.numpy()[:] += 1  # in its own memory, without a torch operation

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
        with self._mode():
            if self.spec.joints:
                state[:] = state_vector(self.base, {}, self.spec.joints)[0]
            else:
                extra = self._known.extra() if self._known else _leaves(self.base._get_obs_extra(self.info))
                parts = _leaves(self.base._get_obs_agent()) + extra
                np.concatenate([np.ravel(part) for part in parts], out=state, casting="unsafe")
            if self.cameras:
                for i, picture in enumerate(pictures(self.base, self.cameras, self.spec.image_size)):
                    image[i] = picture[0]

    def object_positions(self) -> np.ndarray:
        """World positions (objects, 3) float32, m, of everything that can be moved, in the order of the task's scene."""
        movable = [actor for actor in self.base.scene.actors.values() if actor.px_body_type == "dynamic"]
        return np.array([actor._objs[0].pose.p for actor in movable], np.float32).reshape(-1, 3)

    def expert(self) -> experts.Expert:
        return experts.make(self.task)(self.base)

    def render(self) -> np.ndarray:
        """A picture for people (H, W, 3) uint8: see `frames`."""
        with self._mode():
            return frames(self.base, self.spec)[0]

    def close(self) -> None:
        self.env.close()
