"""Out-of-distribution variants of the ManiSkill tasks that have an expert: what each one changes. `varied` applies it.

A variant's id is "<task>/<family>-<name>-<strength>", e.g. "PickCube-v1/vision-table_color-1"; `envs.make` and `gym.make` take it
like any task's id. The families are those of the π-StepNFT paper (arXiv 2603.02083): vision, semantic and execution; strength 1 is
mild, 2 strong. `VISION`, `EXECUTION` and `TASKS` below are the whole table.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi_stepnft.envs.base import EnvError, did_you_mean
from pi_stepnft.envs.maniskill import randomised
from pi_stepnft.envs.maniskill.changes import Change, Lights, Spread, Thing

FAMILIES = "vision", "semantic", "execution"

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
}

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
    return dict(sorted(changes.items(), key=lambda item: FAMILIES.index(item[0].split("-")[0])))


def variants(env_id: str) -> list[str]:
    """Ids of all variants of a task, in a fixed order; none for a task without."""
    return [f"{env_id}/{name}-{strength}" for name in _changes(env_id) for strength in (1, 2)]


def task_of(env_id: str) -> str:
    """The plain task's id, of a variant's id or of a plain one."""
    return env_id.partition("/")[0]


def find(env_id: str) -> Change:
    """What a variant or a randomised scene changes; nothing for a plain task. EnvError, in one line, for what does not exist."""
    task, slash, variant = env_id.partition("/")
    if not slash:
        return Change()
    name, _, strength = variant.rpartition("-")
    if task in TASKS and name == "random" and strength.isdecimal():
        return randomised.scene(task, int(strength), [change for pair in _changes(task).values() for change in pair])
    pair = _changes(task).get(name)
    if pair is None or strength not in ("1", "2"):
        hint = did_you_mean(env_id, variants(task)) or f"; {task} has {'others' if task in TASKS else 'none'}"
        raise EnvError(f"unknown variant {env_id!r}{hint}")
    return pair[int(strength) - 1]


def family(variant_id: str) -> str:
    """ "vision", "semantic" or "execution"; "random" of a randomised scene. EnvError for what is no variant's id."""
    find(variant_id)
    if "/" not in variant_id:
        raise EnvError(f"{variant_id!r} is a task, not a variant of one")
    return variant_id.partition("/")[2].split("-")[0]
