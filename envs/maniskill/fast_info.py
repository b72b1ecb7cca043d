"""What a task tells of one CPU scene, without the torch code that tells it of a thousand.

After most actions one length shows that a task has not succeeded, and ManiSkill's `evaluate` need not run. It runs wherever that
length is not clearly too long, so no success is decided here. What a task adds to the observation is copied from the scene, or is a
difference of positions, the same to the last bit. Both are for tasks whose code is, to the letter, the one that is known here;
`lean_poses` makes that of all others cheaper. `tests/test_envs.py` holds all of it to what ManiSkill says.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose

MARGIN = 1e-4
"""m by which a length must exceed its limit; single precision rounds to a hundredth of that, here and in ManiSkill."""


def pose(actor: Actor) -> sapien.Pose:
    return actor._objs[0].pose


def offset(actor: Actor, other: Actor) -> list[float]:
    return (pose(actor).p - pose(other).p).tolist()


class Known:
    """A task with a Panda, one that knows no failure."""

    code: str
    """Hash of its `evaluate` and `_get_obs_extra`."""

    def __init__(self, task: BaseEnv):
        self.task = task

    def is_far(self) -> bool:
        """Whether it has certainly not succeeded, in its scene as it is."""
        return self.excess() > MARGIN

    def extra(self) -> list:
        """All numbers of `_get_obs_extra`, in order, in several arrays or tensors."""
        tcp = self.task.agent.tcp._objs[0].entity_pose
        return self.seen(tcp) + (self.told(tcp) if "state" in self.task.obs_mode else [])

    def excess(self) -> float:
        """By how much a length exceeds the most that success allows, m."""
        raise NotImplementedError

    def seen(self, tcp: sapien.Pose) -> list:
        """What is told beside pictures too."""
        return [tcp.p, tcp.q]

    def told(self, tcp: sapien.Pose) -> list:
        """What is told only where there are none."""
        raise NotImplementedError


class PickCube(Known):
    code = "7f8003549b1ed2f4"

    def excess(self) -> float:
        return math.hypot(*offset(self.task.cube, self.task.goal_site)) - self.task.goal_thresh

    def seen(self, tcp: sapien.Pose) -> list:
        return [self.task.agent.is_grasping(self.task.cube), tcp.p, tcp.q, pose(self.task.goal_site).p]

    def told(self, tcp: sapien.Pose) -> list:
        cube, goal = pose(self.task.cube), pose(self.task.goal_site)
        return [cube.p, cube.q, cube.p - tcp.p, goal.p - cube.p]


class PickNamedCube(Known):
    code = "de7be58892f04d2f"

    def excess(self) -> float:
        return math.hypot(*offset(self.task.cubes[self.task.meant[0]], self.task.goal_site)) - self.task.goal_thresh

    def seen(self, tcp: sapien.Pose) -> list:
        return [*map(self.task.agent.is_grasping, self.task.cubes), tcp.p, tcp.q, pose(self.task.goal_site).p]

    def told(self, tcp: sapien.Pose) -> list:
        goal = pose(self.task.goal_site).p
        return [part for cube in map(pose, self.task.cubes) for part in (cube.p, cube.q, cube.p - tcp.p, goal - cube.p)]


class PushCube(Known):
    code = "7c1cceb0eb3fab52"

    def excess(self) -> float:
        return math.hypot(*offset(self.task.obj, self.task.goal_region)[:2]) - self.task.goal_radius

    def told(self, tcp: sapien.Pose) -> list:
        return [pose(self.task.goal_region).p, pose(self.task.obj).p, pose(self.task.obj).q]


class PullCube(PushCube):
    code = "5ea002921eed2a06"

    def seen(self, tcp: sapien.Pose) -> list:
        return [tcp.p, tcp.q, pose(self.task.goal_region).p]

    def told(self, tcp: sapien.Pose) -> list:
        return [pose(self.task.obj).p, pose(self.task.obj).q]


class StackCube(Known):
    code = "fd3c509b4a8803cb"

    def excess(self) -> float:
        return abs(offset(self.task.cubeA, self.task.cubeB)[2] - 2 * float(self.task.cube_half_size[2])) - 0.005

    def told(self, tcp: sapien.Pose) -> list:
        a, b = pose(self.task.cubeA), pose(self.task.cubeB)
        return [a.p, a.q, b.p, b.q, a.p - tcp.p, b.p - tcp.p, b.p - a.p]


class LiftPegUpright(Known):
    code = "ceda1c657ae0d8ec"

    def excess(self) -> float:
        return abs(float(pose(self.task.peg).p[2]) - self.task.peg_half_length) - 0.005

    def told(self, tcp: sapien.Pose) -> list:
        return [pose(self.task.peg).p, pose(self.task.peg).q]


class PlaceSphere(Known):
    code = "3ec5e8d9005b78cc"

    def excess(self) -> float:
        return math.hypot(*offset(self.task.obj, self.task.bin)[:2]) - 0.005

    def seen(self, tcp: sapien.Pose) -> list:
        return [self.task.agent.is_grasping(self.task.obj), tcp.p, tcp.q, pose(self.task.bin).p]

    def told(self, tcp: sapien.Pose) -> list:
        sphere = pose(self.task.obj)
        return [sphere.p, sphere.q, sphere.p - tcp.p]


KNOWN = {kind.code: kind for kind in (PickCube, PickNamedCube, PushCube, PullCube, StackCube, LiftPegUpright, PlaceSphere)}


@functools.cache
def code(*functions: Callable) -> str:
    """Hash of their source; "" where there is none."""
    try:
        return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def known(task: BaseEnv) -> Known | None:
    """None where only ManiSkill's own code knows what to tell."""
    cls = type(task)
    if cls.get_info is not BaseEnv.get_info or getattr(type(task.agent), "tcp_pose", None) is not Panda.tcp_pose:
        return None
    kind = KNOWN.get(code(cls.evaluate, cls._get_obs_extra))
    return kind and kind(task)


CPU = torch.device("cpu")
MANISKILLS = vars(Pose)["create"]


def _create(cls: type[Pose], pose: Any, device: Any = None) -> Pose:
    if type(pose) is list and len(pose) == 1 and type(pose[0]) is sapien.Pose and device == CPU:
        return cls(raw_pose=torch.from_numpy(np.concatenate((pose[0].p, pose[0].q))[None]))
    return MANISKILLS.__func__(cls, pose, device)


@contextlib.contextmanager
def lean_poses(lean: bool) -> Iterator[None]:
    """While active, ManiSkill makes the pose of a single thing on the CPU by one copy instead of five. False changes nothing."""
    if not lean:
        yield
        return
    Pose.create = classmethod(_create)
    try:
        yield
    finally:
        Pose.create = MANISKILLS
