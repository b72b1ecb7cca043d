"""Out-of-distribution variants of the ManiSkill tasks that have an expert: what each one changes, and how.

A variant's id is "<task>/<family>-<name>-<strength>", e.g. "PickCube-v1/vision-table_color-1"; `envs.make` and `gym.make` take it
like any task's id. The families are those of the π-StepNFT paper (arXiv 2603.02083): vision, semantic and execution; strength 1 is
mild, 2 strong. `VISION`, `EXECUTION` and `TASKS` below are the whole table.

A variant is its task's own ManiSkill class with `Varied` in front, which applies one `Change` in the hooks that ManiSkill's tasks
have for the purpose: scene, lights, cameras, start of an episode, control step, pictures. What a change draws at random comes from
a generator of its own, seeded by the episode: the task's draws stay as they are, so episodes of equal seeds can be compared.
Importing this module registers the ids with gymnasium and imports no simulator.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import WrapperSpec

from pi_stepnft.envs.base import EnvError

# Lengths are in metres in the world frame (robot base at x = -0.615, facing +x; the table is z = 0), colours are linear RGB in
# [0, 1]. In the pictures of the default camera, which looks back at the robot, +x is near and +y is on the right.
RGB = tuple[float, float, float]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Lights:
    """All lamps of the scene. Each lamp shines along a direction; ManiSkill's own are two white ones, (1, 1, -1) and (0, 0, -1)."""

    ambient: RGB = (0.3, 0.3, 0.3)
    lamps: tuple[tuple[Vector, RGB], ...] = (((1, 1, -1), (1, 1, 1)), ((0, 0, -1), (1, 1, 1)))


@dataclass(frozen=True)
class Thing:
    """An object: "cube", "cylinder" (upright) or "ball", of the same half size in all directions."""

    shape: str
    half_size: float
    color: RGB | None = None
    """None: the colour of the object that it takes the place of."""


@dataclass(frozen=True)
class Spread:
    """Another range of start positions: p becomes scale · p + shift for the first body; the others are displaced as it is."""

    bodies: tuple[str, ...]
    scale: Vector = (1, 1, 1)
    shift: Vector = (0, 0, 0)


@dataclass(frozen=True)
class Change:
    """What a variant changes; the defaults change nothing. Bodies go by the names of ManiSkill's scene."""

    # vision
    tablecloth: tuple[RGB, ...] = ()
    """One colour, or two in a chequered pattern."""
    check: float = 0.0
    """Side of the pattern's squares, m."""
    lights: Lights | None = None
    camera: tuple[float, float] = (0, 0)
    """Azimuth and elevation, degrees, by which the base camera is turned about the point PIVOT ahead of it."""
    image_noise: float = 0.0
    """Standard deviation of Gaussian noise on every channel, grey levels of 255."""
    # semantic
    colors: dict[str, RGB | tuple[RGB, RGB]] = field(default_factory=dict)
    """New colour per body; two for a body of two parts."""
    sizes: dict[str, float] = field(default_factory=dict)
    """The task's own size attributes, m."""
    things: dict[str, Thing] = field(default_factory=dict)
    """What is built in place of a body."""
    distractors: tuple[Thing, ...] = ()
    """Fixed to the table, clear of the way from the object to the goal; not in the state."""
    instruction: str | None = None
    """Also set where the task's own would be false, e.g. would name the old colour."""
    # execution
    spreads: tuple[Spread, ...] = ()
    goal_turn: float = 0.0
    """The goal region is turned about the object by up to this angle to either side, degrees."""
    joints: tuple[float, ...] = ()
    """Added to the first of the arm's start angles, rad."""
    joint_noise: float | None = None
    """Standard deviation of the start angles, rad (ManiSkill's own: 0.02)."""
    jump: float = 0.0
    """The object is displaced so far along the table before step JUMP_STEP, once, in a direction drawn from the seed, m."""


PIVOT = 0.7  # m; about the distance from the default camera to the middle of the table
JUMP_STEP = 4  # of 50; experts reach the object in about 7
DISTRACTOR_REGION = ((-0.22, 0.10), (-0.17, 0.17))  # m, x and y; in the default camera's picture
DISTRACTOR_GAP = 0.075  # m from the way and between distractors, centre to centre

WHITE, BLACK, BROWN, DARK_BROWN = (0.8, 0.8, 0.8), (0.02, 0.02, 0.02), (0.32, 0.17, 0.09), (0.16, 0.08, 0.04)
GREY, PURPLE, YELLOW = (0.25, 0.26, 0.28), (0.13, 0.02, 0.25), (0.9, 0.7, 0.0)
RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 0.6, 0.05), (0.0, 0.05, 0.8)
PINK, CYAN = (0.9, 0.02, 0.35), (0.0, 0.5, 0.6)

Pair = tuple[Change, Change]  # strength 1 (mild) and 2 (strong)

VISION: dict[str, Pair] = {
    "vision-table_color": (Change(tablecloth=(GREY,)), Change(tablecloth=(PURPLE,))),
    "vision-table_texture": (
        Change(tablecloth=(BROWN, DARK_BROWN), check=0.08),
        Change(tablecloth=(WHITE, BLACK), check=0.05),
    ),
    "vision-light_direction": (
        Change(lights=Lights(lamps=(((-1, 1, -1), (1, 1, 1)), ((0, 0, -1), (1, 1, 1))))),
        Change(lights=Lights(lamps=(((0, -1, -0.3), (1.5, 1.5, 1.5)),))),
    ),
    "vision-light_intensity": (
        Change(lights=Lights((0.15,) * 3, (((1, 1, -1), (0.5,) * 3), ((0, 0, -1), (0.5,) * 3)))),
        Change(lights=Lights((0.05,) * 3, (((1, 1, -1), (0.2,) * 3), ((0, 0, -1), (0.2,) * 3)))),
    ),
    "vision-light_color": (
        Change(lights=Lights((0.3, 0.24, 0.15), (((1, 1, -1), (1, 0.8, 0.5)), ((0, 0, -1), (1, 0.8, 0.5))))),
        Change(lights=Lights((0.08, 0.15, 0.3), (((1, 1, -1), (0.25, 0.5, 1)), ((0, 0, -1), (0.25, 0.5, 1))))),
    ),
    "vision-camera_pose": (Change(camera=(10, 3)), Change(camera=(-25, 8))),
    "vision-image_noise": (Change(image_noise=15), Change(image_noise=45)),
}  # fmt: skip

EXECUTION: dict[str, Pair] = {
    "execution-robot_pose": (Change(joints=(0.13,)), Change(joints=(-0.25,))),  # the tool 8 and 15 cm to the side
    "execution-robot_noise": (Change(joint_noise=0.04), Change(joint_noise=0.07)),
    "execution-object_moved": (Change(jump=0.03), Change(jump=0.06)),
}


@dataclass(frozen=True)
class Task:
    """What variants need to know of a task, and those that are its own."""

    object: str
    """The body that is to be moved."""
    goal: str | None
    """The body that marks where to; None where the task has no place for it."""
    changes: dict[str, Pair]
    reach: float = 0.08
    """How far beyond the object and the goal, along the line through both (or along x), nothing else may stand, m."""


_CUBES = (Thing("cylinder", 0.02, BLUE), Thing("cube", 0.015, YELLOW))
_CROWD = (Thing("ball", 0.02, RED), Thing("cube", 0.02, BLUE), Thing("cylinder", 0.02, GREEN), Thing("cube", 0.02, WHITE))
DISTRACTORS: Pair = (Change(distractors=_CUBES), Change(distractors=_CROWD))


def _towards_goal(verb: str) -> Task:
    """PushCube and PullCube: a blue cube, and a disc 0.2 m ahead of it or behind it."""
    both = ("cube", "goal_region")
    return Task(
        "cube",
        "goal_region",
        {
            "semantic-object_color": (Change(colors={"cube": PURPLE}), Change(colors={"cube": YELLOW})),
            "semantic-object_size": (
                Change(sizes={"cube_half_size": 0.026}),
                Change(sizes={"cube_half_size": 0.035}),
            ),
            "semantic-object_shape": (
                Change(things={"cube": Thing("cylinder", 0.02)}, instruction=f"{verb} the cylinder to the goal region"),
                Change(things={"cube": Thing("ball", 0.02)}, instruction=f"{verb} the ball to the goal region"),
            ),
            "semantic-distractors": DISTRACTORS,
            "semantic-instruction": (
                Change(instruction=f"{verb} the block onto the target"),
                Change(instruction=f"the small box belongs on the round mark, {verb} it there"),
            ),
            "execution-spawn_range": (
                Change(spreads=(Spread(both, scale=(1.2, 1.3, 1), shift=(-0.03, 0, 0)),)),
                Change(spreads=(Spread(both, scale=(1.4, 1.6, 1), shift=(-0.06, 0, 0)),)),
            ),
            "execution-goal_range": (Change(goal_turn=15), Change(goal_turn=35)),
        },
        reach=0.12,
    )


TASKS: dict[str, Task] = {
    "PickCube-v1": Task(
        "cube",
        "goal_site",
        {
            "semantic-object_color": (
                Change(colors={"cube": PINK}, instruction="pick up the pink cube and move it to the goal"),
                Change(colors={"cube": BLUE}, instruction="pick up the blue cube and move it to the goal"),
            ),
            "semantic-object_size": (
                Change(sizes={"cube_half_size": 0.016}),
                Change(sizes={"cube_half_size": 0.012}),
            ),
            "semantic-object_shape": (
                Change(things={"cube": Thing("cylinder", 0.02)}, instruction="pick up the red cylinder and move it to the goal"),
                Change(things={"cube": Thing("ball", 0.02)}, instruction="pick up the red ball and move it to the goal"),
            ),
            "semantic-distractors": DISTRACTORS,
            "semantic-instruction": (
                Change(instruction="grasp the red block and bring it to the target"),
                Change(instruction="the small red box belongs at the marked place, take it there"),
            ),
            "execution-spawn_range": (  # the task's own: x and y in ±0.1
                Change(spreads=(Spread(("cube",), scale=(1.3, 1.3, 1), shift=(-0.02, 0, 0)),)),
                Change(spreads=(Spread(("cube",), scale=(1.7, 1.6, 1), shift=(-0.05, 0, 0)),)),
            ),
            "execution-goal_range": (  # the task's own: x and y in ±0.1, z from 0.02 to 0.32
                Change(spreads=(Spread(("goal_site",), scale=(1.3, 1.3, 1.1), shift=(-0.03, 0, 0)),)),
                Change(spreads=(Spread(("goal_site",), scale=(1.6, 1.8, 1.2), shift=(-0.08, 0, 0)),)),
            ),
        },
    ),
    "PushCube-v1": _towards_goal("push"),
    "PullCube-v1": _towards_goal("pull"),
    "StackCube-v1": Task(
        "cubeA",
        "cubeB",
        {
            "semantic-object_color": (
                Change(colors={"cubeA": PINK}, instruction="stack the pink cube on the green cube"),
                Change(colors={"cubeA": BLUE, "cubeB": YELLOW}, instruction="stack the blue cube on the yellow cube"),
            ),
            "semantic-object_size": (
                Change(
                    sizes={"cube_half_size": 0.0175},
                    things={"cubeA": Thing("cube", 0.0175), "cubeB": Thing("cube", 0.0175)},
                ),
                Change(
                    sizes={"cube_half_size": 0.015},
                    things={"cubeA": Thing("cube", 0.015), "cubeB": Thing("cube", 0.015)},
                ),
            ),
            "semantic-object_shape": (
                Change(things={"cubeA": Thing("cylinder", 0.02)}, instruction="stack the red cylinder on the green cube"),
                Change(
                    things={"cubeA": Thing("cylinder", 0.02), "cubeB": Thing("cylinder", 0.02)},
                    instruction="stack the red cylinder on the green cylinder",
                ),
            ),
            "semantic-distractors": DISTRACTORS,
            "semantic-instruction": (
                Change(instruction="put the red block on top of the green block"),
                Change(instruction="build a tower of the two boxes, the green one at the bottom"),
            ),
            "execution-object_moved": (Change(jump=0.03), Change(jump=0.045)),  # as far as its expert can make good in time
            "execution-spawn_range": (
                Change(spreads=(Spread(("cubeA", "cubeB"), shift=(-0.04, 0, 0)),)),
                Change(spreads=(Spread(("cubeA", "cubeB"), shift=(-0.08, 0, 0)),)),
            ),
        },
    ),
    "LiftPegUpright-v1": Task(
        "peg",
        None,
        {
            "semantic-object_color": (
                Change(colors={"peg": (PINK, CYAN)}),
                Change(colors={"peg": (YELLOW, GREEN)}),
            ),
            "semantic-object_size": (
                Change(sizes={"peg_half_length": 0.105}),
                Change(sizes={"peg_half_length": 0.09}),
            ),
            "semantic-distractors": DISTRACTORS,
            "semantic-instruction": (
                Change(instruction="set the rod upright"),
                Change(instruction="the bar is lying down, make it stand on its end"),
            ),
            "execution-spawn_range": (
                Change(spreads=(Spread(("peg",), scale=(1.2, 1.3, 1), shift=(-0.02, 0, 0)),)),
                Change(spreads=(Spread(("peg",), scale=(1.4, 1.6, 1), shift=(-0.04, 0, 0)),)),
            ),
        },
        reach=0.2,
    ),
    "PlaceSphere-v1": Task(
        "sphere",
        "bin",
        {
            "semantic-object_color": (Change(colors={"sphere": PURPLE}), Change(colors={"sphere": YELLOW})),
            "semantic-object_shape": (
                Change(things={"sphere": Thing("cylinder", 0.018)}, instruction="place the cylinder into the bin"),
                Change(things={"sphere": Thing("cube", 0.018)}, instruction="place the cube into the bin"),
            ),
            "semantic-distractors": DISTRACTORS,
            "semantic-instruction": (
                Change(instruction="put the ball in the box"),
                Change(instruction="the ball belongs in the white tray, drop it there"),
            ),
            "execution-spawn_range": (  # the task's own: x from -0.1 to -0.05, y in ±0.1
                Change(spreads=(Spread(("sphere",), scale=(2, 1.3, 1), shift=(0.05, 0, 0)),)),
                Change(spreads=(Spread(("sphere",), scale=(3, 1.6, 1), shift=(0.10, 0, 0)),)),
            ),
            "execution-goal_range": (  # the task's own: x from 0 to 0.1, y in ±0.1
                Change(spreads=(Spread(("bin",), scale=(1.2, 1.3, 1)),)),
                Change(spreads=(Spread(("bin",), scale=(1.4, 1.6, 1)),)),
            ),
            "execution-object_moved": (Change(jump=0.02), Change(jump=0.03)),
        },
    ),
}
"""Tasks with variants. Left out because they mean nothing: a peg of another shape (a round one rolls away), a goal range for the
peg (it may stand anywhere) and for StackCube (its goal is a cube, which the spawn range covers), a smaller ball for PlaceSphere
(loose in the bin, it comes to rest beside the 5 mm that count as success)."""


# -------------------------------------------------------------------------------------------------------------------------- ids


def _changes(env_id: str) -> dict[str, Pair]:
    """All pairs of a task, in a fixed order: vision, semantic, execution."""
    if env_id not in TASKS:
        return {}
    changes = VISION | EXECUTION | TASKS[env_id].changes
    return dict(sorted(changes.items(), key=lambda item: ("vision", "semantic", "execution").index(item[0].split("-")[0])))


def variants(env_id: str) -> list[str]:
    """Ids of all variants of a task, in a fixed order; none for a task without."""
    return [f"{env_id}/{name}-{strength}" for name in _changes(env_id) for strength in (1, 2)]


def task_of(env_id: str) -> str:
    """The plain task's id, of a variant's id or of a plain one."""
    return env_id.partition("/")[0]


def find(env_id: str) -> Change:
    """What a variant changes; nothing for a plain task. EnvError, in one line, for a variant that does not exist."""
    task, slash, variant = env_id.partition("/")
    if not slash:
        return Change()
    name, _, strength = variant.rpartition("-")
    pair = _changes(task).get(name)
    if pair is None or strength not in ("1", "2"):
        near = difflib.get_close_matches(env_id, variants(task), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "envs.ood.variants(task) lists a task's"
        raise EnvError(f"unknown variant {env_id!r}: {hint}")
    return pair[int(strength) - 1]


def family(variant_id: str) -> str:
    """ "vision", "semantic" or "execution". EnvError for what is no variant's id."""
    find(variant_id)
    if "/" not in variant_id:
        raise EnvError(f"{variant_id!r} is a task, not a variant of one")
    return variant_id.partition("/")[2].split("-")[0]


# --------------------------------------------------------------------------------------------------------------- the simulation


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
    from pi_stepnft.envs.maniskill import env as maniskill

    maniskill.check(variant)
    task = task_of(variant)
    cls = maniskill._registry()[0][task].cls
    return type(cls.__name__, (Varied, cls), dict(change=find(variant), task=TASKS[task]))(**kwargs)


def _register() -> None:
    limit = WrapperSpec("MSTimeLimit", "mani_skill.utils.registration:TimeLimitWrapper", dict(max_episode_steps=50))
    for env_id in TASKS:  # all of 50 steps
        for variant in variants(env_id):
            gym.register(
                variant,
                entry_point="pi_stepnft.envs.maniskill.ood:create",
                kwargs=dict(variant=variant),
                disable_env_checker=True,
                additional_wrappers=(limit,),
            )


_register()
