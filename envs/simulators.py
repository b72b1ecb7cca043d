"""The simulators that there are, and which one an id belongs to."""

from __future__ import annotations

from pi_stepnft.envs.base import Simulator, import_module
from pi_stepnft.envs.libero import Libero
from pi_stepnft.envs.maniskill import ManiSkill

SIMULATORS: dict[str, Simulator] = {"maniskill": ManiSkill(), "libero": Libero()}
"""Asked from the last to the first. To add one: a subclass of `base.Simulator`, of `base.Spec` and of `base.Environment`."""


def simulator(env_id: str) -> Simulator:
    """The simulator that an id belongs to. A module that the id names ("my_module:MyTask-v1") is imported, and may add its own."""
    if module := env_id.rpartition(":")[0]:
        import_module(module)
    return next(found for found in reversed(SIMULATORS.values()) if found.knows(env_id))
