"""ManiSkill's tasks, the user's own among them: which there are, what they are told, what they need. Creates none.

A task's id is ManiSkill's ("PickCube-v1"), that of a variant of one (`variants`), or "my_module:MyTask-v1" for one that a module of
the user's registers: gymnasium's form. Importing this module imports no simulator.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from typing import Any

from pi_stepnft.envs import vulkan
from pi_stepnft.envs.base import EnvError, did_you_mean, import_module
from pi_stepnft.envs.maniskill import plate, variants

INSTRUCTIONS = {
    "PickCube-v1": "pick up the red cube and move it to the goal",
    "PushCube-v1": "push the cube to the goal region",
    "PullCube-v1": "pull the cube to the goal region",
    "StackCube-v1": "stack the red cube on the green cube",
    "LiftPegUpright-v1": "lift the peg upright",
    "PlaceSphere-v1": "place the sphere into the bin",
}
"""Language instruction per task; other tasks get their id spelled out ("PokeCube-v1" → "poke cube")."""


def instruction(env_id: str) -> str:
    """The language instruction of a task, or of a variant of one."""
    if (changed := variants.find(env_id).instruction) is not None:
        return changed
    task = registered_id(env_id)
    if task in INSTRUCTIONS:
        return INSTRUCTIONS[task]
    words = re.findall(r"[A-Z]+\d*(?![a-z])|[A-Z]?[a-z]+|\d+", task.rsplit("-v", 1)[0])  # capitals and digits stay together
    return " ".join(words).lower()


def registered_id(env_id: str) -> str:
    """The name under which ManiSkill has a task, or the one that an id is a variant of."""
    return variants.task_of(env_id).rpartition(":")[2]


@functools.cache
def registry() -> tuple[dict, Any, dict]:
    """ManiSkill's table of tasks, its assets, and its table of robots. Imports SAPIEN, so the driver is chosen before."""
    vulkan.ensure_driver()
    try:
        import mani_skill.envs  # noqa: F401 (registers the tasks)
        from mani_skill.agents.registration import REGISTERED_AGENTS
        from mani_skill.utils import assets
        from mani_skill.utils.registration import REGISTERED_ENVS

        import pi_stepnft.envs.maniskill.named  # noqa: F401 (registers ours)
    except ImportError as error:
        if vulkan.is_driver_error(error):
            raise EnvError(vulkan.no_driver_message()) from error
        raise EnvError(f"ManiSkill cannot be imported ({error}): pip install mani-skill") from error

    return REGISTERED_ENVS, assets, REGISTERED_AGENTS


def registered(env_id: str) -> Any:
    """ManiSkill's entry for a task; a module that an id names is imported first. EnvError for a task that does not exist."""
    table = registry()[0]
    module, _, _ = variants.task_of(env_id).rpartition(":")
    if module:
        import_module(module)
    elif plate.knows(env_id):
        plate.check(env_id)
    if (task := registered_id(env_id)) not in table:
        where = f"{module} registers no such task" if module else "not a ManiSkill task"
        raise EnvError(f"unknown environment id {task!r}: {where}{did_you_mean(task, table)}")
    return table[task]


def module_of(env_id: str) -> str | None:
    """The module that a worker must import before it knows a task which is not ManiSkill's own.

    EnvError for one that the program itself registers, since no worker runs that.
    """
    module = registered(env_id).cls.__module__
    if module == "__main__":
        raise EnvError(
            f"{env_id} is registered by the program itself, which environment workers do not run: move it to a module, and call it "
            f"my_module:{registered_id(env_id)}"
        )
    return None if module.startswith(("mani_skill.", "rlinf.")) else module


def robots_of(env_id: str) -> tuple:
    """The robots that a task has where none is asked for."""
    for cls in registered(env_id).cls.__mro__:
        if (robot := inspect.signature(cls.__init__).parameters.get("robot_uids")) is not None:
            default = robot.default
            return tuple(default) if isinstance(default, tuple | list) else (default,)
    return ()


def check(env_id: str, robot: str | None = None) -> None:
    """Raise EnvError, in one line, for a task or variant that does not exist, or whose assets are not on this machine.

    robot: in place of the task's own.
    """
    task, (_, assets, agents) = registered(env_id), registry()
    variants.find(env_id)
    if robot is not None and robot not in agents:
        raise EnvError(f"unknown robot {robot!r}{did_you_mean(robot, agents) or '; there are ' + ', '.join(agents)}")
    robots = robots_of(env_id) if robot is None else (robot,)
    if len(robots) > 1:
        raise EnvError(f"{env_id} has several robots ({', '.join(map(str, robots))}), and a policy moves one: choose another task")
    for name, needed in [(task.uid, task.asset_download_ids or []), *((r, assets.DATA_GROUPS.get(r, [])) for r in robots)]:
        sources = []
        for asset in needed:
            is_group = asset in assets.DATA_GROUPS
            sources += assets.expand_data_group_into_individual_data_source_ids(asset) if is_group else [asset]
        if missing := [source for source in sources if not assets.is_data_source_downloaded(source)]:
            raise EnvError(
                f"{env_id} needs {len(missing)} asset(s) that are not on this machine; download them with: "
                f"{download_command(name)}"
            )


def download_command(name: str) -> str:
    """name: of a task, a robot or a scene. Some tasks load a scene that they do not declare, after which they are called."""
    assets = registry()[1]
    if not assets.DATA_GROUPS.get(name) and name not in assets.DATA_SOURCES:
        name = next((known for known in assets.DATA_SOURCES if name.startswith(known)), name)
    return f"python -m mani_skill.utils.download_asset {name}"


def episode_limit(env_id: str, given: int | None) -> int:
    """Steps after which an episode is cut off: those given, or the task's registered limit."""
    limit = given or registered(env_id).max_episode_steps
    if limit is None:
        raise EnvError(f"{env_id} has no episode limit of its own: give max_episode_steps")
    return limit


@functools.cache
def gpu_simulation() -> bool:
    """Whether PhysX can simulate on a GPU here. Its library is downloaded at the first use; without it, says why, in a warning."""
    import torch

    if not torch.cuda.is_available():
        return False
    registry()
    from sapien import physx

    try:
        physx.enable_gpu()
    except Exception as error:  # no network, no disk, a driver that is too old: the process pool works without it
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"no simulation on the GPU, processes on the CPU instead: PhysX's library is missing ({reason})", stacklevel=3
        )
    return physx.is_gpu_enabled()
