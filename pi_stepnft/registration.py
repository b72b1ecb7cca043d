"""The ids under which Gymnasium knows our environments: `pi_stepnft/PickCube-v1`, `pi_stepnft/libero_object.3`, …

Of an id of `envs.make` each "/" is written ".", since those of Gymnasium have one "/". The tables repeat what the simulators know,
so that `import pi_stepnft` imports none of them; tests hold them to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym

DELTA, POSITION, DENSE = (
    dict(control_mode="pd_joint_delta_pos"), dict(control_mode="pd_joint_pos"), dict(reward_mode="normalized_dense"),
)
MANISKILL = {
    "PickCube PushCube PullCube StackCube LiftPegUpright PlaceSphere PegInsertionSide PlugCharger PokeCube RollBall PushT "
    "PullCubeTool StackPyramid DrawTriangle FMBAssembly1Easy PickNamedCube": {},
    "SO100GraspCube PickCubeSO100 UnitreeG1PlaceAppleInBowl UnitreeG1TransportBox RotateSingleObjectInHandLevel0 "
    "RotateSingleObjectInHandLevel1 RotateValveLevel0 RotateValveLevel1 RotateValveLevel2 RotateValveLevel3 RotateValveLevel4 "
    "TriFingerRotateCubeLevel0 TriFingerRotateCubeLevel1 TriFingerRotateCubeLevel2 TriFingerRotateCubeLevel3 "
    "TriFingerRotateCubeLevel4": DELTA,
    "MS-CartpoleBalance MS-CartpoleSwingUp MS-HopperStand MS-HopperHop MS-AntWalk MS-AntRun": DELTA | DENSE,
    "MS-HumanoidStand MS-HumanoidWalk MS-HumanoidRun": POSITION | DENSE,
}
"""Tasks of one robot that need no download, and what they need of other options than the defaults: a control mode that their robot
has; the dense reward where there is no success."""

COMMON = (
    "vision-table_color vision-table_texture vision-light_direction vision-light_intensity vision-light_color vision-camera_pose "
    "vision-image_noise semantic-object_color semantic-distractors semantic-instruction execution-robot_pose execution-robot_noise "
    "execution-object_moved execution-spawn_range"
).split()
SIZE, SHAPE, GOAL = "semantic-object_size", "semantic-object_shape", "execution-goal_range"
VARIANTS = {
    **dict.fromkeys(("PickCube-v1", "PushCube-v1", "PullCube-v1"), (*COMMON, SIZE, SHAPE, GOAL)),
    "StackCube-v1": (*COMMON, SIZE, SHAPE),
    "LiftPegUpright-v1": (*COMMON, SIZE),
    "PlaceSphere-v1": (*COMMON, SHAPE, GOAL),
}
"""Names of the out-of-distribution variants by task; each has two strengths."""

LIBERO = dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10"), 10)
LIBERO |= {f"{suite}_{kind}": 10 for suite in LIBERO for kind in ("lan", "object", "swap", "task")} | {"libero_90": 90}
"""How many tasks a suite has."""


def ids() -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of `envs.make`, and the options that they need."""
    for tasks, options in MANISKILL.items():
        yield from ((f"{task}-v1", options) for task in tasks.split())
    for task, names in VARIANTS.items():
        yield from ((f"{task}/{name}-{strength}", {}) for name in names for strength in (1, 2))
    for suite, number in LIBERO.items():
        yield from ((f"{suite}/{i}", {}) for i in range(number))


def register() -> None:
    for env_id, options in ids():
        gym.register(
            f"pi_stepnft/{env_id.replace('/', '.')}",
            entry_point="pi_stepnft.envs.plugin:Single",
            vector_entry_point="pi_stepnft.envs.plugin:Vector",
            kwargs=dict(env_id=env_id) | options,
        )
