"""Randomised scenes to pre-train on: "PickCube-v1/random-17" is scene 17 of a task, looks and distractors drawn from its number.

Table, lights, camera, noise of the pictures, colours of the objects (which the sentence names) and what stands around are drawn;
sizes, shapes, starts and goals stay the task's. What the evaluated variants show is left out, with a margin: `near` tells.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence

import numpy as np

from pi_stepnft.envs.maniskill.changes import RGB, Change, Lights, Thing

COLORS: dict[str, RGB] = {
    "red": (1.0, 0.0, 0.0), "orange": (1.0, 0.25, 0.0), "yellow": (0.9, 0.7, 0.0), "green": (0.0, 0.6, 0.05),
    "white": (0.8, 0.8, 0.8), "black": (0.02, 0.02, 0.02), "brown": (0.32, 0.17, 0.09),
}
"""Of things, by the words that sentences have for them; a task's evaluated colours are left out, as pink and blue are here."""

NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "PickCube-v1": ("pick up the {} cube and move it to the goal", ("cube",)),
    "PushCube-v1": ("push the cube to the goal region", ("cube",)),
    "PullCube-v1": ("pull the cube to the goal region", ("cube",)),
    "StackCube-v1": ("stack the {} cube on the {} cube", ("cubeA", "cubeB")),
    "LiftPegUpright-v1": ("lift the peg upright", ()),
    "PlaceSphere-v1": ("place the sphere into the bin", ("sphere",)),
}
"""Each task's sentence, and the bodies whose colours it names, in order; each of these gets a colour of its own."""

CAMERA = 30.0, 10.0  # largest azimuth and elevation of a scene, degrees
NOISE = 50.0  # largest deviation of the pictures' noise, grey levels


def near(one: Change, other: Change) -> bool:
    """Whether two changes show the same table (colours within 0.1), lights (colours within 0.1, directions within 15°), camera
    (within 3°) or noise (within 3 grey levels); what one of them leaves as it is tells nothing."""
    close = lambda a, b, margin: bool(np.abs(np.subtract(a, b)).max() < margin)
    if one.tablecloth and len(one.tablecloth) == len(other.tablecloth) and close(one.tablecloth, other.tablecloth, 0.1):
        return True
    if any(one.camera) and any(other.camera) and close(one.camera, other.camera, 3):
        return True
    if one.image_noise and other.image_noise and close(one.image_noise, other.image_noise, 3):
        return True
    if one.lights is None or other.lights is None or len(one.lights.lamps) != len(other.lights.lamps):
        return False
    unit = lambda v: np.divide(v, np.linalg.norm(v))
    return close(one.lights.ambient, other.lights.ambient, 0.1) and all(
        close(a, b, 0.1) and unit(v) @ unit(w) > np.cos(np.deg2rad(15))
        for (v, a), (w, b) in zip(one.lights.lamps, other.lights.lamps)
    )


def scene(task: str, number: int, evaluated: Sequence[Change]) -> Change:
    """Scene `number` of a task, always the same. evaluated: what its variants change, which is left out."""
    rng = np.random.default_rng(number)

    def unlike(draw: Callable[[], Change]) -> Change:
        """The first drawn change that is near no evaluated one."""
        change = draw()
        while any(near(change, other) for other in evaluated):
            change = draw()
        return change

    color = lambda: colorsys.hsv_to_rgb(rng.random(), rng.random(), rng.uniform(0.02, 0.8))
    tint = lambda strength: tuple(strength * (1 - rng.uniform(0, 0.4, 3)))

    def lamp() -> tuple[tuple, tuple]:
        angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 2)
        return (np.cos(angle), np.sin(angle), -height), tint(rng.uniform(0.4, 1.5))

    parts = [  # how often each is drawn, and how
        (0.8, lambda: Change(tablecloth=tuple(color() for _ in range(rng.integers(1, 3))), check=rng.uniform(0.03, 0.12))),
        (0.6, lambda: Change(lights=Lights(tint(rng.uniform(0.1, 0.5)), tuple(lamp() for _ in range(rng.integers(1, 3)))))),
        (0.8, lambda: Change(camera=tuple(rng.uniform(-1, 1, 2) * CAMERA))),
        (0.3, lambda: Change(image_noise=rng.uniform(0, NOISE))),
    ]
    looks = [unlike(draw) if rng.random() < share else Change() for share, draw in parts]
    sentence, bodies = NAMED[task]
    shown = [color for change in evaluated for color in change.colors.values()]
    names = list(rng.permutation([name for name, color in COLORS.items() if color not in shown]))
    own, others = names[: len(bodies)], names[len(bodies) :]  # nothing else has the colour that the sentence names
    things = tuple(
        Thing(str(rng.choice(("cube", "cylinder", "ball"))), rng.uniform(0.012, 0.024), COLORS[name])
        for name in others[: rng.integers(0, 4)]
    )
    return Change(
        tablecloth=looks[0].tablecloth, check=looks[0].check, lights=looks[1].lights, camera=looks[2].camera,
        image_noise=looks[3].image_noise, colors={body: COLORS[name] for body, name in zip(bodies, own)}, distractors=things,
        instruction=sentence.format(*own),
    )
