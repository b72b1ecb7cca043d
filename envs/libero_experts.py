"""Scripted pick-and-place experts on privileged simulator state for libero_object and libero_spatial (Panda, OSC_POSE).

    expert = experts.make("libero_object/3")(env.base)    # env: an envs.libero.LiberoEnv; base is robosuite's environment
    expert.reset()
    env.step(expert.act()[None])                          # (7,) float32 in [-1, 1], +1 closes the gripper

As in `envs/experts.py`, every action is a function of the current state: no phase counter. Only the choice of the grasp is made
once, where the episode starts, from what the pictures show. Lengths are in metres in the world frame, angles in radians.

Facts of the controller (robosuite 1.4.0, OSC_POSE at 20 Hz): one unit of action puts the goal 0.05 m (0.5 rad) from the *current*
pose, and a critically damped spring (stiffness 150 / s²) pulls the hand there: at most 13 mm (0.13 rad) a step. An error of less
than one unit is commanded as it is: the spring itself is as fast as it can be without overshooting.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

COMMAND, TURN = 0.05, 0.5  # m and rad that one unit of action commands (robosuite's osc_pose.json)
OPEN, CLOSE = -1.0, 1.0
# Half sizes of the gripper in the frame of its site (x: the fingers close, z: down), between the pads and above them:
OPENING = 0.038  # from the centre to an open finger's pad
FINGER = np.array([0.062, 0.013])  # what two open fingers cover, x and y
PALM = np.array([0.105, 0.033])  # what the hand covers
PALM_UP, TIP_DOWN = 0.031, 0.0045  # from the site up to the palm, and down to the finger tips
# The arm, whose hand points down (Franka's Denavit-Hartenberg parameters): stretched beyond 0.719 it comes back on another branch.
SHOULDER, WRIST_UP, WRIST_BACK, REACH = 0.333, 0.207, 0.088, 0.68
DEPTH = 0.016  # from the top of a thing down to the site: the pads, 0.012 high, are on it, and it hangs as low as it can
MARGIN = 0.012  # air to keep from other things


@dataclass
class Grasp:
    """Where to hold a thing, in the frame of its body, so that it moves with it."""

    point: np.ndarray  # (3,) of the gripper's site
    closing: np.ndarray  # (3,) unit vector along which the fingers close
    width: float  # of what is between them


class PickAndPlace:
    """Grasp the goal's object from above, carry it over all that stands on the way, and lower it onto, or let it drop into, the other.

    A thing that fits between the fingers is held about its middle, a bowl by its rim. Of all directions the one is chosen that
    keeps clear of other things, then the one that needs the least turning.
    """

    def __init__(self, base):
        self.base = base
        (predicate, thing, place), *more = base.parsed_problem["goal_state"]
        if more or predicate not in ("in", "on"):
            raise ValueError(f"the expert puts one thing into or onto another, and the task is {base.parsed_problem['goal_state']}")
        self.into = predicate == "in"
        self.thing = base.obj_body_id[thing]
        self.shoulder = base.sim.data.get_body_xpos("robot0_base") + [0, 0, SHOULDER]
        self.place = base.obj_body_id[place.removesuffix("_contain_region")]

    # -------------------------------------------------------------------------------------------------------- what there is

    def reset(self) -> None:
        """Call at the start of an episode: chooses the grasp."""
        self.model, self.data = self.base.sim.model._model, self.base.sim.data._data
        robot = self.base.robots[0]
        self._site, self._fingers = robot.eef_site_id, robot._ref_gripper_joint_pos_indexes
        self._finger_speeds = robot._ref_gripper_joint_vel_indexes
        root = self.model.body_rootid
        solid = (self.model.geom_contype | self.model.geom_conaffinity) > 0
        boxes = np.flatnonzero(solid & (self.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX))
        owner = root[self.model.geom_bodyid[boxes]]
        self._boxes = {int(body): boxes[owner == body] for body in np.unique(owner)}
        robots = {root[self.model.body(name).id] for name in ("robot0_base",)}
        flat = {body for body, geoms in self._boxes.items() if self.model.geom_size[geoms].max() > 0.3}  # tables
        self._others = [body for body in self._boxes if body not in robots | flat | {self.thing}]
        self._look()
        self.grasp = self._choose()

    def corners(self, body: int) -> np.ndarray:
        """World corners (boxes, 8, 3) of the collision boxes of a body."""
        geoms = self._boxes[body]
        signs = np.stack(np.meshgrid(*3 * [[-1.0, 1.0]], indexing="ij"), -1).reshape(8, 3)
        local = signs * self.model.geom_size[geoms][:, None]
        return self.data.geom_xpos[geoms][:, None] + local @ self.data.geom_xmat[geoms].reshape(-1, 3, 3).swapaxes(1, 2)

    def obstacles(self) -> np.ndarray:
        """World points (n, 3) on all that is not the robot, the thing itself or a table: a lattice in every box."""
        corners = np.concatenate([self.corners(body) for body in self._others])
        low, x, y, z = corners[:, 0], *(corners[:, i] - corners[:, 0] for i in (4, 2, 1))
        steps = np.linspace(0, 1, 5)
        a, b, c = (g.reshape(-1, 1) for g in np.meshgrid(steps, steps, steps, indexing="ij"))
        return (low[:, None] + a * x[:, None] + b * y[:, None] + c * z[:, None]).reshape(-1, 3)

    def _look(self) -> None:
        self.tcp = self.data.site_xpos[self._site].copy()
        self.frame = self.data.site_xmat[self._site].reshape(3, 3).copy()
        self.gap = float(np.abs(self.data.qpos[self._fingers]).sum())  # between the fingers; 0.08 when open
        self.opening = float(self.data.qvel[self._finger_speeds] @ [1, -1])  # m/s by which the gap grows

    # --------------------------------------------------------------------------------------------------- how to take hold

    def _choose(self) -> Grasp:
        corners = self.corners(self.thing)
        points = corners.reshape(-1, 3)
        bottom, top = points[:, 2].min(), points[:, 2].max()
        candidates = self._around(corners, bottom, top) or self._at_the_rim(points, top)
        obstacles = self.obstacles()
        costs = []
        for point, closing, width in candidates:
            turn = np.arccos(np.clip(abs(closing @ self.frame[:, 0]), 0, 1))
            clear = self._clearance(point, closing, obstacles)
            stretch = max(self._stretch(point), self._stretch(point + self.data.xpos[self.place] - self.data.xpos[self.thing]))
            costs.append(100 * max(0.0, MARGIN - clear) + 50 * max(0.0, stretch - REACH + 0.02) + turn + 20 * width)
        point, closing, width = candidates[int(np.argmin(costs))]
        frame = self.data.xmat[self.thing].reshape(3, 3)
        return Grasp(frame.T @ (point - self.data.xpos[self.thing]), frame.T @ closing, width)

    def _around(self, corners: np.ndarray, bottom: float, top: float) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Grasps about the middle of what fits between the fingers: (point, closing direction, width)."""
        height = max(top - DEPTH, bottom + min(0.5 * (top - bottom), 0.02))
        at = (corners[..., 2].min(1) < height + TIP_DOWN) & (corners[..., 2].max(1) > height - 2 * TIP_DOWN)
        slab = corners[at].reshape(-1, 3)
        found = []
        for angle in np.arange(12) * np.pi / 12:
            closing = np.array([np.cos(angle), np.sin(angle), 0])
            across = np.array([-closing[1], closing[0], 0])
            along, beside = slab @ closing, slab @ across
            width = np.ptp(along)
            if width < 2 * OPENING - 0.008:
                point = 0.5 * (along.min() + along.max()) * closing + 0.5 * (beside.min() + beside.max()) * across
                found.append((point + [0, 0, height], closing, width))
        return found

    def _at_the_rim(self, points: np.ndarray, top: float) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Grasps of a bowl's rim, all around, or where it is high if the bowl is tilted."""
        frame, origin = self.data.xmat[self.thing].reshape(3, 3), self.data.xpos[self.thing]
        local = (points - origin) @ frame
        rim = local[local[:, 2] > local[:, 2].max() - 0.01]
        centre = 0.5 * (rim.min(0) + rim.max(0))
        radius = np.linalg.norm((rim - centre)[:, :2], axis=1).mean()
        angles = np.arange(24) * np.pi / 12
        outward = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1) @ frame.T
        found = []
        for out in outward:
            point = origin + frame @ centre + radius * out
            if point[2] > top - 0.02:
                closing = out * [1, 1, 0]
                found.append((point - [0, 0, DEPTH], closing / np.linalg.norm(closing), 0.004))
        return found

    def _clearance(self, point: np.ndarray, closing: np.ndarray, obstacles: np.ndarray) -> float:
        """Horizontal distance from the open hand, on its way straight down to `point`, to the nearest obstacle."""
        offset = obstacles - point
        flat = np.abs(np.stack([offset @ closing, offset[:, 1] * closing[0] - offset[:, 0] * closing[1]], 1))
        clear = 0.1
        for size, above in ((FINGER, -TIP_DOWN), (PALM, PALM_UP)):
            outside = flat[offset[:, 2] > above - 0.005] - size
            if len(outside):
                distance = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(1), 0)
                clear = min(clear, distance.min())
        return clear

    def _arm(self, point: np.ndarray) -> np.ndarray:
        """From the shoulder to the wrist (3,) where the site is at `point`."""
        out = point - self.shoulder
        return out + [0, 0, WRIST_UP] - WRIST_BACK * out * [1, 1, 0] / np.linalg.norm(out[:2])

    def _stretch(self, point: np.ndarray) -> float:
        return float(np.linalg.norm(self._arm(point)))

    # ------------------------------------------------------------------------------------------------------------- acting

    def act(self) -> np.ndarray:
        """Action (7,) float32 in [-1, 1] for the current state: position, rotation, gripper."""
        self._look()
        point, grip = self.waypoint()
        action = np.empty(7, np.float32)
        step = (point - self.tcp) / COMMAND
        step /= max(1.0, np.abs(step).max())  # saturated along the line, so that the path is straight
        arm = self._arm(self.tcp + COMMAND * step)
        action[:3] = step - max(0.0, 1 - REACH / np.linalg.norm(arm)) * arm / COMMAND  # no further than the arm reaches
        turn = self._turn() / TURN
        action[3:6] = turn / max(1.0, np.abs(turn).max())
        action[6] = grip
        return np.clip(action, -1, 1)

    def _turn(self) -> np.ndarray:
        """Axis times angle (3,) that makes the hand point down with the fingers closing along the grasp's direction."""
        # What is held may turn between the fingers: then the hand's own direction is kept.
        closing = self.frame[:, 0] if self.gap < 0.07 else self.data.xmat[self.thing].reshape(3, 3) @ self.grasp.closing
        closing = closing * [1, 1, 0]
        closing /= np.linalg.norm(closing) * np.copysign(1, closing @ self.frame[:, 0])  # the fingers are alike
        target = np.stack([closing, np.cross([0, 0, -1.0], closing), [0, 0, -1.0]], 1)
        return Rotation.from_matrix(target @ self.frame.T).as_rotvec()

    def waypoint(self) -> tuple[np.ndarray, float]:
        """Where the gripper's site should go next (3,), and the gripper's command."""
        thing, place = self.data.xpos[self.thing], self.data.xpos[self.place]
        point = thing + self.data.xmat[self.thing].reshape(3, 3) @ self.grasp.point
        bottom = self.corners(self.thing)[..., 2].min()
        hanging = self.tcp[2] - bottom
        # Where the gripper lets go: as low as the hand fits into a basket, or where the thing touches the place.
        if self.into:
            low = max(self.corners(self.place)[..., 2].max() + PALM_UP + 0.01, place[2] + hanging + 0.02)
        else:
            low = place[2] + hanging
        goal = np.array([*(place + self.tcp - thing)[:2], low])
        away = np.linalg.norm((thing - place)[:2])
        wide = self.gap > self.grasp.width + 0.015
        near = 0.05 if wide or self.opening > 0.02 else 0.03 if self.into else 0.015
        if away < near and self.tcp[2] < goal[2] + 0.01:
            return self.tcp, OPEN  # without rising: light things fall slowly, and would stick to a finger
        offset = point - self.tcp
        closing = self.gap < 0.07
        near, deep = (0.02, 0.02) if closing else (0.006, 0.008)
        at_it = np.linalg.norm(offset[:2]) < near and abs(offset[2]) < deep and (closing or np.linalg.norm(self._turn()) < 0.1)
        if not at_it:
            return self._over(point, 0.0), OPEN
        if wide or self.opening < -0.02:
            return point, CLOSE
        return self._over(goal, hanging), CLOSE

    def _over(self, point: np.ndarray, hanging: float, radius=0.008, slope=4.0) -> np.ndarray:
        """`point`, raised over all that stands on the way until the tool is above it; `hanging`: how far what is held hangs down."""
        away = point - self.tcp
        distance = np.linalg.norm(away[:2])
        obstacles = self.obstacles()
        along = np.clip((obstacles - self.tcp)[:, :2] @ away[:2] / max(distance, 1e-6) ** 2, 0, 1)
        beside = np.linalg.norm((obstacles - self.tcp)[:, :2] - along[:, None] * away[:2], axis=1)
        clear = max(point[2] + 0.05, obstacles[beside < 0.1, 2].max(initial=-np.inf) + hanging + 0.02)
        goal = np.array([*point[:2], min(clear, point[2] + slope * max(0.0, distance - radius))])
        if goal[2] - self.tcp[2] > 0.02 and distance > 0.03:  # rise before going sideways
            goal[:2] = self.tcp[:2]
        return goal


SUITES = "libero_object", "libero_spatial"


def available() -> list[str]:
    """Suites whose tasks have an expert."""
    return list(SUITES)


def make(env_id: str) -> type[PickAndPlace]:
    """The expert class for `env_id`, one task of a suite; ValueError for an environment without one."""
    suite, _, number = env_id.partition("/")
    if suite not in SUITES or not number:
        raise ValueError(f"no expert for {env_id!r}: choose one task of {' or '.join(SUITES)}, as in {SUITES[0]}/0")
    return PickAndPlace
