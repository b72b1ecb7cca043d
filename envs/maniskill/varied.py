"""What applies a variant's `Change` to a ManiSkill task.

A variant is its task's own ManiSkill class with `Varied` in front, which applies one `Change` in the hooks that ManiSkill's tasks
have for the purpose: scene, lights, cameras, start of an episode, control step, pictures. What a change draws at random comes from
a generator of its own, seeded by the episode: the task's draws stay as they are, so episodes of equal seeds can be compared.
Importing this module registers the ids with gymnasium and imports no simulator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import WrapperSpec

from pi_stepnft.envs.maniskill import tasks
from pi_stepnft.envs.maniskill.changes import RGB, Change, Thing
from pi_stepnft.envs.maniskill.variants import (
    DISTRACTOR_GAP,
    DISTRACTOR_REGION,
    JUMP_STEP,
    PIVOT,
    TASKS,
    Task,
    find,
    task_of,
    variants,
)


class Varied:
    """Stands in front of a ManiSkill task class and applies `change`. Everything is per environment, so it can be batched."""

    change: Change
    task: Task

    def __init__(self, *args: Any, **kwargs: Any):
        if self.change.joint_noise is not None:
            kwargs["robot_init_qpos_noise"] = self.change.joint_noise
        super().__init__(*args, **kwargs)

    def _episode_generator(self, i: int, *more: int) -> np.random.Generator:
        """Of environment i's current episode; `more` tells several of one episode apart."""
        return np.random.default_rng([int(self._episode_seed[i]), *more])

    # when the scene is built

    def _load_scene(self, options: dict) -> None:
        import sapien
        import torch

        change = self.change
        for name, value in change.sizes.items():
            setattr(self, name, value)
        with _in_place_of(change.things):
            super()._load_scene(options)
        for name, value in change.sizes.items():
            if isinstance(getattr(self, name), torch.Tensor):  # StackCube's, which the call above has set anew
                setattr(self, name, torch.full_like(getattr(self, name), value))
        for name, colors in change.colors.items():
            for entity in self.scene.actors[name]._objs:
                shapes = entity.find_component_by_type(sapien.render.RenderBodyComponent).render_shapes
                for i, shape in enumerate(shapes):
                    shape.material.set_base_color([*(colors if len(shapes) == 1 else colors[i]), 1])
        if change.tablecloth:
            _lay_tablecloth(self.scene, change.tablecloth, change.check)
        self._distractors = [
            _build(self.scene, thing, [*thing.color, 1], f"distractor_{i}", "kinematic", sapien.Pose([i, 5, 0]))
            for i, thing in enumerate(change.distractors)
        ]

    def _load_lighting(self, options: dict) -> None:
        if self.change.lights is None:
            return super()._load_lighting(options)
        self.scene.set_ambient_light(self.change.lights.ambient)
        for direction, color in self.change.lights.lamps:
            self.scene.add_directional_light(direction, color)

    def _setup_sensors(self, options: dict) -> None:
        import sapien

        super()._setup_sensors(options)
        if any(self.change.camera):
            azimuth, elevation = np.deg2rad(self.change.camera) / 2
            camera = self._sensors["base_camera"].camera
            ahead = sapien.Pose([PIVOT, 0, 0])  # cameras look along their x axis
            pose = camera.get_local_pose().sp * ahead
            raise_it = sapien.Pose(q=[np.cos(elevation), 0, np.sin(elevation), 0])
            turn_it = sapien.Pose(q=[np.cos(azimuth), 0, 0, np.sin(azimuth)])
            pose = sapien.Pose(pose.p, (turn_it * sapien.Pose(q=pose.q) * raise_it).q)
            camera.set_local_pose(pose * ahead.inv())

    # when an episode starts

    def _initialize_episode(self, env_idx: Any, options: dict) -> None:
        import torch

        super()._initialize_episode(env_idx, options)
        change, device = self.change, self.device
        for name, thing in change.things.items():
            p = self.scene.actors[name].pose.p[env_idx]
            self._displace((name,), env_idx, (thing.half_size - p[:, 2:]) * torch.tensor([[0.0, 0, 1]], device=device))
        for spread in change.spreads:
            p = self.scene.actors[spread.bodies[0]].pose.p[env_idx]
            scale, shift = (torch.tensor(v, dtype=p.dtype, device=device) for v in (spread.scale, spread.shift))
            self._displace(spread.bodies, env_idx, scale * p + shift - p)
        if change.goal_turn:
            self._turn_goal(env_idx)
        if change.joints:
            qpos = self.agent.robot.get_qpos()[env_idx]
            qpos[:, : len(change.joints)] += torch.tensor(change.joints, device=device)
            self.agent.reset(qpos)
        if change.distractors:
            self._place_distractors(env_idx)

    def _displace(self, bodies: tuple[str, ...], env_idx: Any, offset: Any) -> None:
        """Move bodies by offset (b, 3) in the environments env_idx (b,), which are those of the scene's reset mask."""
        from mani_skill.utils.structs.pose import Pose

        for name in bodies:
            actor = self.scene.actors[name]
            actor.set_pose(Pose.create_from_pq(actor.pose.p[env_idx] + offset, actor.pose.q[env_idx]))

    def _turn_goal(self, env_idx: Any) -> None:
        import torch

        arm = (self._position(self.task.goal) - self._position(self.task.object))[env_idx.cpu().numpy()]  # (b, 3)
        angles = [np.deg2rad(self.change.goal_turn) * self._episode_generator(int(i)).uniform(-1, 1) for i in env_idx]
        c, s = np.cos(angles), np.sin(angles)
        turned = np.stack([c * arm[:, 0] - s * arm[:, 1], s * arm[:, 0] + c * arm[:, 1], arm[:, 2]], axis=1)
        self._displace((self.task.goal,), env_idx, torch.as_tensor(turned - arm, dtype=torch.float32, device=self.device))

    def _position(self, name: str) -> np.ndarray:
        """(num_envs, 3)."""
        return self.scene.actors[name].pose.p.cpu().numpy()

    def _place_distractors(self, env_idx: Any) -> None:
        """Each at the first of 64 random places that is clear of the way and of the others, or at the clearest."""
        import torch
        from mani_skill.utils.structs.pose import Pose

        start, end = (self._position(name)[:, :2] for name in (self.task.object, self.task.goal or self.task.object))
        places = np.zeros((len(env_idx), len(self._distractors), 3))
        low, high = np.transpose(DISTRACTOR_REGION)
        for row, i in enumerate(int(i) for i in env_idx):
            way = end[i] - start[i]
            length = np.linalg.norm(way)
            ahead = way / length if length > 1e-3 else np.array([1.0, 0.0])
            rng = self._episode_generator(i)
            for k, thing in enumerate(self.change.distractors):
                options = rng.uniform(low, high, (64, 2))
                along = np.clip((options - start[i]) @ ahead, -self.task.reach, length + self.task.reach)
                others = np.concatenate([start[i] + along[:, None, None] * ahead, np.tile(places[row, :k, :2], (64, 1, 1))], axis=1)
                gap = np.linalg.norm(options[:, None] - others, axis=2).min(1)
                clear = gap >= DISTRACTOR_GAP
                places[row, k] = *options[clear.argmax() if clear.any() else gap.argmax()], thing.half_size
        for k, actor in enumerate(self._distractors):
            actor.set_pose(Pose.create_from_pq(torch.as_tensor(places[:, k], dtype=torch.float32, device=self.device)))

    # while it lasts

    def _before_control_step(self) -> None:
        super()._before_control_step()
        if self.change.jump and (due := self._elapsed_steps == JUMP_STEP).any():
            self._jump(due)

    def _jump(self, due: Any) -> None:
        """Displace the object in the environments of the mask, away from its goal where that is a thing that it could hit."""
        import torch

        env_idx = due.nonzero()[:, 0]
        offset = np.zeros((len(env_idx), 3))
        goal = self.task.goal if self.task.goal in ("cubeB", "bin") else None
        for row, i in enumerate(int(i) for i in env_idx):
            angle = self._episode_generator(i).uniform(0, 2 * np.pi)
            offset[row, :2] = self.change.jump * np.array([np.cos(angle), np.sin(angle)])
            if goal and offset[row] @ (self._position(self.task.object) - self._position(goal))[i] < 0:
                offset[row] *= -1
        mask, self.scene._reset_mask = self.scene._reset_mask, due  # GPU poses are set where this mask is true
        self._displace((self.task.object,), env_idx, torch.as_tensor(offset, dtype=torch.float32, device=self.device))
        self.scene._reset_mask = mask
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
            self.scene.px.gpu_update_articulation_kinematics()
            self.scene._gpu_fetch_all()

    def _get_obs_sensor_data(self, *args: Any, **kwargs: Any) -> dict:
        import torch

        data = super()._get_obs_sensor_data(*args, **kwargs)
        if self.change.image_noise:
            for k, textures in enumerate(textures for textures in data.values() if "rgb" in textures):
                rgb = textures["rgb"]  # (B, H, W, 3) uint8
                noise = [
                    self._episode_generator(i, int(step), k).standard_normal(rgb.shape[1:], np.float32)
                    for i, step in enumerate(self._elapsed_steps)
                ]
                noise = self.change.image_noise * torch.as_tensor(np.stack(noise), device=rgb.device)
                textures["rgb"] = (rgb + noise).round().clamp(0, 255).to(torch.uint8)
        return data


@contextlib.contextmanager
def _in_place_of(things: dict[str, Thing]) -> Iterator[None]:
    """While active, ManiSkill's builders of cubes and balls build these things for the bodies of those names."""
    from mani_skill.utils.building import actors

    originals = {name: getattr(actors, name) for name in ("build_cube", "build_sphere")}

    def instead_of(original):
        def build(scene, *, name, color, **kwargs):
            if name not in things:
                return original(scene, name=name, color=color, **kwargs)
            return _build(scene, things[name], color, name, "dynamic", kwargs.get("initial_pose"))

        return build

    try:
        for name, original in originals.items():
            setattr(actors, name, instead_of(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(actors, name, original)


def _build(scene: Any, thing: Thing, color: Any, name: str, body_type: str, initial_pose: Any) -> Any:
    """A new actor in every sub-scene."""
    import sapien

    builder, h = scene.create_actor_builder(), thing.half_size
    material = sapien.render.RenderMaterial(base_color=color)
    if thing.shape == "cube":
        builder.add_box_collision(half_size=[h] * 3)
        builder.add_box_visual(half_size=[h] * 3, material=material)
    elif thing.shape == "ball":
        builder.add_sphere_collision(radius=h)
        builder.add_sphere_visual(radius=h, material=material)
    else:
        upright = sapien.Pose(q=[0.5**0.5, 0, -(0.5**0.5), 0])  # SAPIEN's lie along x
        builder.add_cylinder_collision(pose=upright, radius=h, half_length=h)
        builder.add_cylinder_visual(pose=upright, radius=h, half_length=h, material=material)
    if initial_pose is not None:
        builder.set_initial_pose(initial_pose)
    return builder.build(name=name) if body_type == "dynamic" else builder.build_kinematic(name=name)


def _lay_tablecloth(scene: Any, colors: tuple[RGB, ...], check: float) -> None:
    """Cover the table (1.2 × 2.4 m) with a picture of 1 cm per pixel; nothing can touch it."""
    import sapien

    # A box's texture is a cross of its faces, four columns by three rows; the top is one of them.
    x, y = np.meshgrid(np.arange(4 * 120), np.arange(3 * 240))
    side = max(1, round(100 * check))
    picture = np.array([[*c, 1] for c in colors])[(x // side + y // side) % len(colors)]
    texture = sapien.render.RenderTexture2D(np.uint8(255 * picture), "R8G8B8A8Unorm", srgb=False)
    material = sapien.render.RenderMaterial()
    material.set_base_color_texture(texture)
    builder = scene.create_actor_builder()
    builder.add_box_visual(half_size=[0.6, 1.2, 1e-4], material=material)
    builder.set_initial_pose(sapien.Pose([-0.12, 0, 1e-4]))
    builder.build_static(name="tablecloth")


# ----------------------------------------------------------------------------------------------------------------- registration


def create(variant: str, **kwargs: Any) -> gym.Env:
    """The ManiSkill environment of a variant, without a step limit; gymnasium's entry point."""
    tasks.check(variant)
    task = task_of(variant)
    cls = tasks.registry()[0][task].cls
    return type(cls.__name__, (Varied, cls), dict(change=find(variant), task=TASKS[task]))(**kwargs)


def register(variant: str) -> None:
    """A variant's id with gymnasium."""
    limit = WrapperSpec("MSTimeLimit", "mani_skill.utils.registration:TimeLimitWrapper", dict(max_episode_steps=50))
    gym.register(
        variant,
        entry_point="pi_stepnft.envs.maniskill.varied:create",
        kwargs=dict(variant=variant),
        disable_env_checker=True,
        additional_wrappers=(limit,),
    )


for env_id in TASKS:  # all of 50 steps; randomised scenes are registered when they are asked for
    for variant in variants(env_id):
        register(variant)
