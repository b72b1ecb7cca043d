"""What a variant of a task, or a randomised scene, may change (`Change`): classes without a value of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

# Lengths are in metres in the world frame (robot base at x = -0.615, facing +x; the table is z = 0), colours are linear RGB in
# [0, 1]. In the pictures of the default camera, which looks back at the robot, +x is near and +y is on the right.
RGB = tuple[float, float, float]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Lights:
    """All lamps of the scene. Each lamp shines along a direction; ManiSkill's own are two white ones, (1, 1, -1) and (0, 0, -1)."""

    ambient: RGB = (0.3, 0.3, 0.3)
    lamps: tuple[tuple[Vector, RGB], ...] = (((1, 1, -1), (1, 1, 1)), ((0, 0, -1), (1, 1, 1)))


@dataclass(frozen=True)
class Thing:
    """An object: "cube", "cylinder" (upright) or "ball", of the same half size in all directions."""

    shape: str
    half_size: float
    color: RGB | None = None
    """None: the colour of the object that it takes the place of."""


@dataclass(frozen=True)
class Spread:
    """Another range of start positions: p becomes scale · p + shift for the first body; the others are displaced as it is."""

    bodies: tuple[str, ...]
    scale: Vector = (1, 1, 1)
    shift: Vector = (0, 0, 0)


@dataclass(frozen=True)
class Change:
    """What a variant changes; the defaults change nothing. Bodies go by the names of ManiSkill's scene."""

    # vision
    tablecloth: tuple[RGB, ...] = ()
    """One colour, or two in a chequered pattern."""
    check: float = 0.0
    """Side of the pattern's squares, m."""
    lights: Lights | None = None
    camera: tuple[float, float] = (0, 0)
    """Azimuth and elevation, degrees, by which the base camera is turned about the point PIVOT ahead of it."""
    image_noise: float = 0.0
    """Standard deviation of Gaussian noise on every channel, grey levels of 255."""
    # semantic
    colors: dict[str, RGB | tuple[RGB, RGB]] = field(default_factory=dict)
    """New colour per body; two for a body of two parts."""
    sizes: dict[str, float] = field(default_factory=dict)
    """The task's own size attributes, m."""
    things: dict[str, Thing] = field(default_factory=dict)
    """What is built in place of a body."""
    distractors: tuple[Thing, ...] = ()
    """Fixed to the table, clear of the way from the object to the goal; not in the state."""
    instruction: str | None = None
    """Also set where the task's own would be false, e.g. would name the old colour."""
    # execution
    spreads: tuple[Spread, ...] = ()
    goal_turn: float = 0.0
    """The goal region is turned about the object by up to this angle to either side, degrees."""
    joints: tuple[float, ...] = ()
    """Added to the first of the arm's start angles, rad."""
    joint_noise: float | None = None
    """Standard deviation of the start angles, rad (ManiSkill's own: 0.02)."""
    jump: float = 0.0
    """The object is displaced so far along the table before step JUMP_STEP, once, in a direction drawn from the seed, m."""
