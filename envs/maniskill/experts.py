"""Scripted experts on privileged simulator state for seven ManiSkill tabletop tasks (Panda, `pd_ee_delta_pose`).

    expert = experts.make("PickCube-v1")(env.unwrapped)   # a single-environment CPU env
    expert.reset()
    env.step(expert.act())                                # (7,) float32 in [-1, 1]

Every expert is a function of the current simulator state, with no phase counter: it looks where the gripper, the
object and the goal are and heads for the next point. So it recovers by itself from noise in the executed actions,
from a lost grasp or from being started in the middle of an episode, and the state (or the picture) is all that a
policy needs to imitate it. Lengths are in metres in the world frame, whose axes are the robot base's; angles are in
radians.

Facts of the controller, measured in mani-skill 3.0.1 and read in `agents/controllers/pd_ee_pose.py`:

* Translation is root-aligned: one unit of action commands 0.1 m from the *current* pose (`use_target=False`). The
  overdamped drives (stiffness 1000, damping 100: a time constant of 0.1 s against a control step of 0.05 s) cover
  1 - exp(-0.5) = 39 % of it within the step and all but stop when the command does. One unit thus moves 0.039 m.
* Rotation is about the root's axes through the tool centre point, with a *negated* sign (the controller multiplies by
  `rot_lower`): one unit commands -0.1 rad and moves -0.039 rad. A quarter turn takes 40 steps: experts hardly rotate.
* A commanded pose that inverse kinematics cannot reach, be it 0.1 m away on the path to a near point, makes the arm
  stand still (`set_action` falls back to the current joints): commands are shortened to what the arm reaches.
* Gripper: +1 is open (each finger 0.04 m from the centre), -1 closed (target -0.01 m, so that thin things are
  squeezed), linear in between.
"""

from __future__ import annotations

import numpy as np

from pi_stepnft.envs.base import EnvError, no_expert
from pi_stepnft.envs.maniskill import variants

STEP_FRACTION = 1 - np.exp(-0.5)  # of a commanded offset covered in one control step, see above
COMMAND = 0.1  # m of translation, or rad of rotation, commanded by one unit of action (Panda agent's controller config)
GAIN = 0.6  # share of the position error removed per step when unsaturated; the arm's inertia makes 0.9 overshoot
TILT_GAIN = 0.3  # same for the orientation: low, since it only undoes drift and hurry here would shake the arm
# Tool orientations (w, x, y, z) that point straight down with the fingers closing along the world's y (how a `panda`
# starts) or along x (how a `panda_wristcam`, StackCube's default robot, starts): the nearest is kept.
FINGERS_DOWN = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.5**0.5, 0.5**0.5, 0.0], [0.0, 0.5**0.5, -(0.5**0.5), 0.0]])
OPEN, CLOSE = 1.0, -1.0
# The Panda's geometry (Franka's Denavit-Hartenberg parameters), in m, for a hand that points down:
SHOULDER = np.array([0.0, 0.0, 0.333])  # above the base
WRIST_UP = 0.107 + 0.1034  # from the tool centre point up to the wrist's centre
WRIST_BACK = 0.088  # and back from it towards the base
REACH = 0.71  # shoulder to wrist; stretched it is hypot(0.316, 0.0825) + hypot(0.384, 0.0825) = 0.719


def rotation_vector(target, current) -> np.ndarray:
    """Axis times angle (3,) in the root frame that turns quaternion `current` into `target` (both (w, x, y, z))."""
    w, xyz = current[0], -current[1:]  # the conjugate
    real = target[0] * w - target[1:] @ xyz
    imag = target[0] * xyz + w * target[1:] + np.cross(target[1:], xyz)
    # 2 sin(angle / 2), exact enough for the small tilts corrected here; the sign picks the shorter way round
    return 2 * np.copysign(1.0, real) * imag


def position(actor) -> np.ndarray:
    """World position (3,) of a ManiSkill actor of a single environment, past the torch round trip of `actor.pose`."""
    return actor._objs[0].pose.p


class Expert:
    """Base: reads the state, turns the subclass's next waypoint into an action.

    `base_env` is the unwrapped single-environment CPU env in control mode `pd_ee_delta_pose`; otherwise EnvError.
    """

    robots = ("panda", "panda_wristcam")

    def __init__(self, base_env):
        given = (base_env.num_envs, base_env.control_mode, base_env.robot_uids)
        if given[:2] != (1, "pd_ee_delta_pose") or given[2] not in self.robots:
            raise EnvError(
                f"{type(self).__name__} expert got (num_envs, control_mode, robot_uids) = {given}: make the "
                f"environment with num_envs=1, control_mode='pd_ee_delta_pose' and robot_uids one of {self.robots}"
            )
        self.env = base_env

    def reset(self) -> None:
        """Call at the start of an episode. (Looks the simulator's objects up: a reconfigured env has new ones.)"""
        agent = self.env.agent
        self._tcp, self._robot = agent.tcp._objs[0], agent.robot._objs[0]

    def act(self) -> np.ndarray:
        """Action (7,) float32 in [-1, 1] for the current state: position, rotation, gripper."""
        pose = self._tcp.entity_pose
        self.tcp = pose.p
        self.fingers = self._robot.qpos[-2:].mean()  # m from the centre; 0.04 when open
        point, grip = self.waypoint()
        down = FINGERS_DOWN[np.abs(FINGERS_DOWN @ pose.q).argmax()]
        action = np.empty(7, np.float32)
        step = GAIN / STEP_FRACTION * (point - self.tcp)
        # Saturate along the line, not per axis, so that the path is straight.
        step *= min(1.0, COMMAND / max(np.abs(step).max(), 1e-9))
        action[:3] = (self.reachable(self.tcp + step) - self.tcp) / COMMAND
        action[3:6] = -TILT_GAIN / STEP_FRACTION / COMMAND * rotation_vector(down, pose.q)
        action[3:6] /= max(1.0, np.linalg.norm(action[3:6]))
        action[6] = grip
        return np.clip(action, -1, 1)

    def waypoint(self) -> tuple[np.ndarray, float]:
        """Where the tool centre point should go next (3,), and the gripper command."""
        raise NotImplementedError

    def reachable(self, point) -> np.ndarray:
        """`point`, drawn towards the shoulder as far as the outstretched arm needs."""
        base = self._robot.pose.p
        outward = (point - base) * [1, 1, 0]
        arm = point - base - SHOULDER + [0, 0, WRIST_UP] - WRIST_BACK * outward / np.linalg.norm(outward)
        length = np.linalg.norm(arm)
        return point - max(0.0, 1 - REACH / length) * arm

    def funnel(self, point, hover=0.06, radius=0.01, slope=3.0) -> np.ndarray:
        """`point`, raised while the tool is not over it: descend along a funnel instead of in two legs with a stop.

        The height is `slope` times the horizontal distance beyond `radius`, `hover` at most, so that opened fingers
        come down beside the object and never upon it.
        """
        distance = np.linalg.norm((point - self.tcp)[:2])
        return point + [0, 0, np.clip(slope * (distance - radius), 0, hover)]

    def grasp(self, point, half_width, aim=0.013) -> tuple[bool, np.ndarray, float]:
        """Fetch what is at `point` and up to 2 `half_width` wide: whether it is held, and the waypoint until it is."""
        offset = np.abs(point - self.tcp)
        # Above sqrt(2) half widths, since a cube gripped across its edges is held as well; the open hand's 0.04 is not.
        closed = self.fingers < min(1.5 * half_width, 0.03)
        # Wider bounds once the fingers are round it, or noise at the bounds would open them again.
        within = (offset < (0.025 if closed else aim)).all()
        return within and closed, point if within else self.funnel(point), CLOSE if within else OPEN


class PickCube(Expert):
    """Carry the cube to the goal (anywhere up to 0.3 m high) in a straight line, and stay.

    Success: cube within 0.025 m of the goal, joints slower than 0.2 rad/s (`pick_cube.py`).
    """

    def cube(self):
        return self.env.cube

    def waypoint(self):
        cube, goal = position(self.cube()), position(self.env.goal_site)
        held, point, grip = self.grasp(cube, self.env.cube_half_size)
        return (self.tcp + goal - cube, CLOSE) if held else (point, grip)


class PickNamedCube(PickCube):
    """The cube that is meant, past the other one (`named.py`)."""

    def cube(self):
        return self.env.cubes[self.env.meant[0]]


class PushCube(Expert):
    """Go behind the cube, seen from the goal disc, and push it there with closed fingers. Does PullCube too.

    Success: cube within 0.1 m of the disc's centre, which starts 0.2 m away along x: +x to push, -x to pull
    (`push_cube.py`, `pull_cube.py`).
    """

    BEHIND = 0.025  # m from the cube's side to the tool's centre: half a finger, and a little air

    def waypoint(self):
        cube, goal = position(self.env.obj), position(self.env.goal_region)
        ahead = (goal - cube) * [1, 1, 0]
        distance = np.linalg.norm(ahead)
        ahead = ahead / max(distance, 1e-6)
        start = cube - (self.env.cube_half_size + self.BEHIND) * ahead
        offset = self.tcp - start
        aside = offset - (offset @ ahead) * ahead  # lateral and vertical
        if np.abs(aside).max() < 0.015 and abs(offset @ ahead) < 0.03:
            return start + distance * ahead, CLOSE
        return self.funnel(start), CLOSE


class Place(Expert):
    """Carry an object over a support, lower it, let go and rise. A subclass says which, and where it comes to rest."""

    aim = 0.013  # m off its centre at which the fingers may close
    near = 0.01  # m off its resting place, horizontally, at which it is let go
    drop = 0.0  # m above its resting place where the object is let go
    hover = 0.05  # m above its resting place at which the object travels

    def objects(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Where the object is, where it should come to rest (both (3,)), and half its width, m."""
        raise NotImplementedError

    def waypoint(self):
        thing, rest, half_width = self.objects()
        away, height = np.linalg.norm((thing - rest)[:2]), (thing - rest)[2]
        opening = self.fingers > 1.5 * half_width
        if away < (0.02 if opening else self.near) and height < self.drop + 0.006:
            # Rise when the fingers are clear of it, or they would drag it along.
            return np.array([*self.tcp[:2], rest[2] + 0.08 if self.fingers > 0.035 else self.tcp[2]]), OPEN
        held, point, grip = self.grasp(thing, half_width, self.aim)
        if not held:
            return point, grip
        carry = rest + [0, 0, self.drop + np.clip(3 * (away - 0.005), 0, self.hover)]
        if carry[2] - thing[2] > 0.02:  # lift before going sideways, or it would sweep the support away
            carry[:2] = thing[:2]
        return self.tcp + carry - thing, CLOSE


class StackCube(Place):
    """Put cube A upon cube B, of the same size.

    Success: centres 0.04 +- 0.005 m apart in height and 0.033 m at most horizontally, A at rest and not gripped
    (`stack_cube.py`).
    """

    def objects(self):
        half = float(self.env.cube_half_size[2])
        return position(self.env.cubeA), position(self.env.cubeB) + [0, 0, 2 * half], half


class PlaceSphere(Place):
    """Put the ball into the shallow bin, whose walls leave no room for the fingers: let it drop.

    Success: centre (a radius and 0.0025 m) +- 0.005 m above the bin's origin and 0.005 m at most beside it, at rest and not gripped
    (`place_sphere.py`).
    """

    aim = 0.008  # gripped off-centre it leaves the fingers spinning, and a ball spins on for long
    near = 0.006
    drop = 0.012

    def objects(self):
        radius = self.env.radius
        return position(self.env.obj), position(self.env.bin) + [0, 0, radius + self.env.block_half_size[0]], radius


class LiftPegUpright(Expert):
    """Raise the peg (lying along x) by its near end, about its far end, until it stands.

    The wrist is too slow to turn it (40 steps for a quarter turn): the fingers hold so gently that the peg swings
    between them like a door on its hinge.
    Success: upright within 0.08 rad and centre half a length +- 0.005 m high (`lift_peg_upright.py`).
    """

    robots = ("panda",)  # its fingers close across the peg, the other's along it
    NEAR_END = 0.025  # m from it to where the peg is gripped
    GENTLE = 0.2  # gripper command: target 0.020 m, so each finger presses with 1000 N/m x 0.005 m = 5 N

    def waypoint(self):
        pose = self.env.peg._objs[0].pose
        half_length, half_width = self.env.peg_half_length, self.env.peg_half_width
        grip_at = half_length - self.NEAR_END
        axis = -pose.to_transformation_matrix()[:3, 0]  # from the far end, which stays on the table, to the near one
        held, point, grip = self.grasp(pose.p + grip_at * axis, half_width)
        if not held:
            return point, grip
        radius = grip_at + half_length
        left = np.pi / 2 - np.arcsin(np.clip(axis[2], -1, 1))
        level = np.array([axis[0], axis[1], 0]) / max(np.hypot(axis[0], axis[1]), 1e-6)
        tangent = np.array([0, 0, np.sin(left)]) - np.cos(left) * level
        float_height = pose.p[2] - half_length * axis[2] - half_width * np.sin(left)
        return self.tcp + radius * left * tangent - [0, 0, float_height], self.GENTLE


EXPERTS = {
    "PickCube-v1": PickCube,
    "PickNamedCube-v1": PickNamedCube,
    "PushCube-v1": PushCube,
    "PullCube-v1": PushCube,
    "StackCube-v1": StackCube,
    "LiftPegUpright-v1": LiftPegUpright,
    "PlaceSphere-v1": PlaceSphere,
}


def available() -> list[str]:
    """Ids of ManiSkill's environments that have an expert."""
    return list(EXPERTS)


def make(env_id: str) -> type[Expert]:
    """The expert class for `env_id`, a task or a variant of one; EnvError for an environment without one."""
    if (task := variants.task_of(env_id)) not in EXPERTS:
        raise no_expert(env_id, ", ".join(EXPERTS))
    return EXPERTS[task]
