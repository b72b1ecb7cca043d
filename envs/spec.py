"""What describes an environment, the error that every bad one raises, and the cores there are for them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar


def num_cores() -> int:
    """Cores that this process may use, which under Slurm, taskset or in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EnvError(RuntimeError):
    """A simulator, task or driver problem, told in one line: what was given, what was expected, what to do next."""


@dataclass(frozen=True)
class EnvSpec:
    """All that a worker process needs to build its environments."""

    env_id: str
    obs_mode: str = "rgb"
    """"rgb": camera images and a state without privileged object poses; "state": no images, privileged state."""
    image_size: int = 96
    """Side of the square camera images, px."""
    control_mode: str = "pd_ee_delta_pose"
    reward_mode: str = "sparse"
    max_episode_steps: int | None = None
    """None: the task's own limit."""
    camera: Any = None
    """Pose and field of view of the base camera (`envs.maniskill.Camera`); None: the task's own."""
    mesh_keep: float = 0.06
    """Share of the robot's visual triangles that software rendering keeps (1: all)."""
    fast_control: bool = True
    """Use the NumPy controller where it reproduces the simulator's own."""
    video_size: int = 256
    kwargs: dict = field(default_factory=dict)
    """More keyword arguments for the simulator's own constructor."""

    death: ClassVar[str] = "a broken Vulkan driver or too little memory; check the driver with: python -m envs.vulkan"
    """Why a worker process may have died, and what to do."""

    def create(self, slot: int, num_envs: int) -> Any:
        """The environment for place `slot` among `num_envs`: what a process pool's worker steps (see `ManiSkillEnv`)."""
        from envs.maniskill import ManiSkillEnv

        return ManiSkillEnv(self)
