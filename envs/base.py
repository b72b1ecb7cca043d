"""What describes an environment, the error that every bad one raises, and the cores there are for them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

TRAIN_SEEDS = 500_000_000
"""Training episodes use seeds below this, demonstrations those from here to TUNING_SEED."""
TUNING_SEED = 1_000_000_000
"""Evaluations by which settings are chosen use seeds from here on (`--eval-seed`), so that results are not picked by chance."""
EVAL_SEED = 1_100_000_000
"""Reported evaluations use seeds from here on: no initial state is shared with training, demonstrations or tuning."""


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

    death: ClassVar[str] = "a broken Vulkan driver or too little memory; check the driver with: python -m pi_stepnft.envs.vulkan"
    """Why a worker process may have died, and what to do."""

    def create(self, slot: int, num_envs: int) -> Any:
        """The environment for place `slot` among `num_envs`: what a process pool's worker steps (see `ManiSkillEnv`)."""
        from pi_stepnft.envs.maniskill.env import ManiSkillEnv

        return ManiSkillEnv(self)
