"""Scripted pick-and-place experts on privileged simulator state for libero_object and libero_spatial (Panda, OSC_POSE).

    expert = experts.PickAndPlace(env.base)               # env: a LiberoEnv; its base is robosuite's environment
    expert.reset()
    env.step(expert.act()[None])                          # (7,) float32 in [-1, 1], +1 closes the gripper

As in `envs/maniskill/experts.py`, an action is a function of the current state, with no phase counter. Only the choice of the grasp
is made once, at the start of an episode, from where things stand then. Lengths are in metres in the world frame, angles in radians.

Facts of the controller (robosuite 1.4.0, OSC_POSE at 20 Hz): one unit of action puts the goal 0.05 m (0.5 rad) from the *current*
pose, and a critically damped spring (stiffness 150 / s²) pulls the hand there: at most 13 mm (0.13 rad) a step. An error of less
than one unit is commanded as it is: that is as fast as the spring goes without overshooting.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

COMMAND, TURN = 0.05, 0.5  # m and rad that one unit of action commands (robosuite's osc_pose.json)
OPEN, CLOSE = -1.0, 1.0
# The gripper, in the frame of its site (x: the fingers close, z: down), measured in robosuite's model:
OPENING = 0.038  # from the site to an open finger's pad
TIPS, FINGERS, PALM = np.array([0.057, 0.011]), np.array([0.065, 0.011]), np.array([0.105, 0.033])  # half their size, x and y
TIP_DOWN, FINGERS_UP, PALM_UP = 0.009, 0.006, 0.031  # down from the site to the tips, up to where the fingers widen, to the palm
# The arm, with the hand pointing down (Franka's Denavit-Hartenberg parameters): at 0.719 m from shoulder to wrist it is stretched,
# where it gets stuck or bends the other way.
SHOULDER, WRIST_UP, WRIST_BACK, REACH = 0.333, 0.207, 0.088, 0.68
DEPTH = 0.016  # from the top of a thing down to the site: the pads, 0.012 high, are on it, and it hangs as low as it can
INSIDE = 0.015  # from a rim to where the hand goes down
MARGIN = 0.012  # air between the open hand and other things
HELD = 0.07  # an open hand's fingers are further apart


@dataclass
class Grasp:
    """Where to hold a thing, in the frame of its body, so that it moves with it."""

    point: np.ndarray  # (3,) of the gripper's site
    closing: np.ndarray  # (3,) unit vector along which the fingers close
    width: float  # of what is between them


def flat(vector: np.ndarray) -> np.ndarray:
    """The horizontal part of a vector (3,), of length 1."""
    return vector * [1, 1, 0] / np.linalg.norm(vector[:2])


class PickAndPlace:
    """Grasp the goal's object from above, carry it over all that stands on the way, and lower it onto the other, or drop it in.

    A thing that fits between the fingers is held about its middle, a bowl by its rim. Of all directions the one is chosen that
    keeps clear of other things and within the arm's reach, then the one that needs the least turning.
    """

    def __init__(self, base):
        goal = base.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("in", "on"):
            raise ValueError(f"the expert puts one thing into or onto another, and the goal is {goal}")
        predicate, thing, place = goal[0]
        self.into = predicate == "in"
        self.thing, self.place = base.obj_body_id[thing], base.obj_body_id[place.removesuffix("_contain_region")]
        self.model, self.data = base.sim.model._model, base.sim.data._data
        self.robot = base.robots[0]
        base_body = self.model.body("robot0_base").id
        self.shoulder = self.data.xpos[base_body] + [0, 0, SHOULDER]
        solid = (self.model.geom_contype | self.model.geom_conaffinity) > 0
        boxes = np.flatnonzero(solid & (self.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX))
        root = self.model.body_rootid[self.model.geom_bodyid[boxes]]
        self.boxes = {body: boxes[root == body] for body in (self.thing, self.place)}
        table = self.model.geom_size[boxes].max(1) > 0.3
        self.others = boxes[~table & (root != self.thing) & (root != base_body)]

    def reset(self) -> None:
        """Call at the start of an episode: chooses the grasp."""
        self._look()
        self.grasp = self._choose()

    # -------------------------------------------------------------------------------------------------------- what there is

    def _look(self) -> None:
        site, fingers = self.robot.eef_site_id, self.robot._ref_gripper_joint_pos_indexes
        self.tcp = self.data.site_xpos[site].copy()
        self.hand = self.data.site_xmat[site].reshape(3, 3).copy()
        self.gap = float(np.abs(self.data.qpos[fingers]).sum())  # m between the fingers; 0.08 when open
        self.opening = float(self.data.qvel[self.robot._ref_gripper_joint_vel_indexes] @ [1, -1])  # m/s by which it grows
        self.thing_at, self.frame = self.data.xpos[self.thing], self.data.xmat[self.thing].reshape(3, 3)
        self.place_at = self.data.xpos[self.place]

    def _lattice(self, boxes: np.ndarray, n: int) -> np.ndarray:
        """World points (boxes, n³, 3) in boxes, n from side to side: 2 are the corners."""
        points = np.stack(np.meshgrid(*3 * [np.linspace(-1, 1, n)], indexing="ij"), -1).reshape(-1, 3)
        local = points * self.model.geom_size[boxes][:, None]
        return self.data.geom_xpos[boxes][:, None] + local @ self.data.geom_xmat[boxes].reshape(-1, 3, 3).swapaxes(1, 2)

    def _obstacles(self, n: int) -> np.ndarray:
        """Points (boxes · n³, 3) on all that is neither the robot nor the thing itself nor a table."""
        return self._lattice(self.others, n).reshape(-1, 3)

    def _arm(self, point: np.ndarray) -> np.ndarray:
        """From the shoulder to the wrist (3,) when the site is at `point`."""
        out = point - self.shoulder
        return out + [0, 0, WRIST_UP] - WRIST_BACK * flat(out)

    # --------------------------------------------------------------------------------------------------- how to take hold

    def _choose(self) -> Grasp:
        corners, obstacles = self._lattice(self.boxes[self.thing], 2), self._obstacles(12)  # closer than the fingers are wide
        obstacles = obstacles[np.linalg.norm((obstacles - self.thing_at)[:, :2], axis=1) < 0.2]
        candidates = self._around(corners) or self._at_the_rim(corners.reshape(-1, 3))
        costs = []
        for point, closing, width in candidates:
            turn = np.arccos(min(1.0, abs(closing @ self.hand[:, 0])))
            near = max(0.0, MARGIN - self._clearance(point, closing, obstacles))
            arms = [self._arm(at) for at in (point, point + self.place_at - self.thing_at)]
            far = max(0.0, np.linalg.norm(arms, axis=1).max() - (REACH - 0.02))
            costs.append(100 * near + 50 * far + turn + 20 * width)
        point, closing, width = candidates[int(np.argmin(costs))]
        return Grasp(self.frame.T @ (point - self.thing_at), self.frame.T @ closing, width)

    def _around(self, corners: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Grasps about the middle of what fits between the fingers: (point, closing direction, width)."""
        low, high = corners[..., 2].min(1), corners[..., 2].max(1)
        height = max(high.max() - DEPTH, low.min() + min(0.5 * (high.max() - low.min()), 0.02))
        slab = corners[(low < height + 0.012) & (high > height - 0.004)].reshape(-1, 3)
        found = []
        for angle in np.arange(12) * np.pi / 12:
            closing = np.array([np.cos(angle), np.sin(angle), 0])
            across = np.array([-closing[1], closing[0], 0])
            along, beside = slab @ closing, slab @ across
            if np.ptp(along) < 2 * OPENING - 0.008:
                middle = 0.5 * (along.min() + along.max()) * closing + 0.5 * (beside.min() + beside.max()) * across
                found.append((middle + [0, 0, height], closing, np.ptp(along)))
        return found

    def _at_the_rim(self, corners: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Grasps of a bowl's rim: all around, or where it is highest if the bowl is tilted."""
        local = (corners - self.thing_at) @ self.frame  # its axis is z
        rim = local[local[:, 2] > local[:, 2].max() - 0.01]
        centre = 0.5 * (rim.min(0) + rim.max(0))
        radius = np.linalg.norm((rim - centre)[:, :2], axis=1).mean()
        angles = np.arange(24) * np.pi / 12
        outward = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1) @ self.frame.T
        points = self.thing_at + self.frame @ centre + radius * outward
        high = points[:, 2] > corners[:, 2].max() - 0.02
        # Somewhat inside, since there is more room than outside: the outer finger will pull the rim to the middle.
        return [(point - INSIDE * flat(out) - [0, 0, DEPTH], flat(out), 0.004) for point, out in zip(points[high], outward[high])]

    def _clearance(self, point: np.ndarray, closing: np.ndarray, obstacles: np.ndarray) -> float:
        """Horizontal distance from the open hand, on its way straight down to `point`, to the nearest obstacle; 0.1 at most."""
        offset = obstacles - point
        beside = np.abs(np.stack([offset @ closing, offset[:, 1] * closing[0] - offset[:, 0] * closing[1]], 1))
        clear = 0.1
        for size, height in ((TIPS, -TIP_DOWN), (FINGERS, FINGERS_UP), (PALM, PALM_UP)):
            outside = beside[offset[:, 2] > height - 0.005] - size
            distance = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(1, initial=-np.inf), 0)
            clear = min(clear, distance.min(initial=clear))
        return clear

    # ------------------------------------------------------------------------------------------------------------- acting

    def act(self) -> np.ndarray:
        """Action (7,) float32 in [-1, 1] for the current state: position, rotation, gripper."""
        self._look()
        point, grip = self.waypoint()
        step = (point - self.tcp) / COMMAND
        step /= max(1.0, np.abs(step).max())  # saturated along the line, so that the path is straight
        arm = self._arm(self.tcp + COMMAND * step)
        step -= max(0.0, 1 - REACH / np.linalg.norm(arm)) * arm / COMMAND  # no further than the arm reaches
        turn = self._turn() / TURN
        turn /= max(1.0, np.abs(turn).max())
        return np.clip(np.concatenate([step, turn, [grip]]), -1, 1).astype(np.float32)

    def _turn(self) -> np.ndarray:
        """Axis times angle (3,) that makes the hand point down with the fingers closing along the grasp's direction."""
        # What is held may turn between the fingers: then the hand keeps its own direction.
        closing = flat(self.hand[:, 0] if self.gap < HELD else self.frame @ self.grasp.closing)
        closing *= np.copysign(1, closing @ self.hand[:, 0])  # the fingers are alike
        down = np.array([0, 0, -1.0])
        target = np.stack([closing, np.cross(down, closing), down], 1)
        return Rotation.from_matrix(target @ self.hand.T).as_rotvec()

    def waypoint(self) -> tuple[np.ndarray, float]:
        """Where the gripper's site should go next (3,), and the gripper's command."""
        hanging = self.tcp[2] - self._lattice(self.boxes[self.thing], 2)[..., 2].min()  # how far what is held reaches down
        lowest = self.place_at[2] + hanging  # where it touches the place
        if self.into:  # the hand does not fit in: let go above
            lowest = max(lowest + 0.02, self._lattice(self.boxes[self.place], 2)[..., 2].max() + PALM_UP + 0.01)
        goal = np.array([*(self.place_at + self.tcp - self.thing_at)[:2], lowest])
        wide = self.gap > self.grasp.width + 0.015
        near = 0.05 if wide or self.opening > 0.02 else 0.03 if self.into else 0.015
        if np.linalg.norm((self.thing_at - self.place_at)[:2]) < near and self.tcp[2] < lowest + 0.01:
            return self.tcp, OPEN  # without rising: light things fall slowly, and would stick to a finger
        point = self.thing_at + self.frame @ self.grasp.point
        beside, above = np.linalg.norm((point - self.tcp)[:2]), abs(point[2] - self.tcp[2])
        if self.gap < HELD:  # wider bounds once the fingers close, or noise at the bounds would open them again
            ready = beside < 0.03 and above < 0.02
        else:
            ready = beside < 0.006 and above < 0.008 and np.linalg.norm(self._turn()) < 0.1
        if not ready:
            return self._over(point, 0.0), OPEN
        if wide or self.opening < -0.02:
            return point, CLOSE
        return self._over(goal, hanging), CLOSE

    def _over(self, point: np.ndarray, hanging: float, radius=0.008, slope=4.0) -> np.ndarray:
        """`point`, raised over all that stands on the way until the site is above it; then down along a steep funnel.

        hanging: how far below the site the lowest is that has to pass.
        """
        away = (point - self.tcp)[:2]
        distance = np.linalg.norm(away)
        obstacles = self._obstacles(5)
        offset = (obstacles - self.tcp)[:, :2]
        along = np.clip(offset @ away / max(distance, 1e-6) ** 2, 0, 1)
        beside = np.linalg.norm(offset - along[:, None] * away, axis=1)
        clear = max(point[2] + 0.05, obstacles[beside < 0.1, 2].max(initial=-np.inf) + hanging + 0.02)
        height = min(clear, point[2] + slope * max(0.0, distance - radius))
        rise_first = height - self.tcp[2] > 0.02 and distance > 0.03
        return np.array([*(self.tcp if rise_first else point)[:2], height])
