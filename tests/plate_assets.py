"""A small asset pack for RLinf's PutOnPlateInScene25: python tests/plate_assets.py FOLDER [SHEET.png]

With a second argument, draws the main task and every variant with it, one episode each, into one picture.

It stands in for three downloads, of some gigabytes, with a megabyte written here: boxes for the 25 things and 17 plates (glb), 21
plain pictures of tables and textures, a table, and an arm of boxes with the WidowX's joint names and about its proportions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image, ImageDraw

THINGS = (
    "carrot", "eggplant", "green cube", "yellow cube", "spoon", "banana", "bread", "can", "ketchup", "lemon", "lime", "mushroom",
    "onion", "pear", "plum", "potato", "apple", "candle", "chalk", "cork", "dice", "eraser", "sponge", "tomato", "watch",
)
PLATES = ("plate", *(f"{hue} {kind}" for hue in ("red", "blue", "grey", "white") for kind in ("plate", "bowl", "board", "tray")))


def colour(i: int, of: int) -> np.ndarray:
    """The i-th of so many hues, RGB in [0, 1]."""
    return np.clip(np.abs((i / of * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * 0.9 + 0.05


def box(extents, rgb=(0.5, 0.5, 0.5), at=(0, 0, 0)) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents, trimesh.transformations.translation_matrix(at))
    mesh.unmerge_vertices()  # edges stay sharp
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*(255 * np.asarray(rgb)).astype(int), 255], metallicFactor=0)
    mesh.visual = trimesh.visual.TextureVisuals(material=material)
    return mesh


def write_things(folder: Path, names: tuple[str, ...], sizes: list[tuple[float, float, float]]) -> None:
    """A box each, with what the task reads of it: sizes in m."""
    table = {}
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        place = folder / f"{i:03d}_{name.replace(' ', '_')}"
        place.mkdir(parents=True)
        mesh = box(size, colour(i, len(names)))
        mesh.export(place / "textured.glb")
        trimesh.Trimesh(mesh.vertices, mesh.faces).export(place / "collision.obj")
        half = [side / 2 for side in size]
        table[place.name] = dict(name=name, density=500, scale=[1.0], bbox=dict(min=[-h for h in half], max=half))
    (folder / "model_db.json").write_text(json.dumps(table))


def write_tables(folder: Path, number: int = 21) -> None:
    """Backgrounds of two tones, and striped textures."""
    rows, columns = np.mgrid[:120, :160]
    table = {}
    for kind in ("imgs", "textures"):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        tone = 255 * (0.35 + 0.3 * colour(i, number))
        wall = np.where((rows < 30)[..., None], 0.6 * tone, tone)
        stripes = np.where(((rows + columns) // 10 % 2 == 0)[..., None], 255 * colour(number - i, number), 255.0)
        for kind, picture in (("imgs", wall), ("textures", stripes)):
            Image.fromarray(picture.astype(np.uint8)).save(folder / kind / f"{i:02d}.png")
        table[f"{i:02d}.png"] = dict(texture=f"{i:02d}.png", mix=0.8)
    (folder / "model_db.json").write_text(json.dumps(table))


ARM = (  # joint, parent link, child link, where in the parent (m), axis, limits (rad or m), the child's box and its place (m)
    ("waist", "base_link", "shoulder_link", (0, 0, 0.07), "0 0 1", (-3.1, 3.1), (0.07, 0.07, 0.06), (0, 0, 0)),
    ("shoulder", "shoulder_link", "upper_arm_link", (0, 0, 0.04), "0 1 0", (-1.9, 2.0), (0.04, 0.05, 0.25), (0.02, 0, 0.125)),
    ("elbow", "upper_arm_link", "upper_forearm_link", (0.05, 0, 0.25), "0 1 0", (-2.1, 1.6), (0.17, 0.04, 0.04), (0.085, 0, 0)),
    ("forearm_roll", "upper_forearm_link", "lower_forearm_link", (0.175, 0, 0), "1 0 0", (-3, 3), (0.07, 0.04, 0.04), (0.04, 0, 0)),
    ("wrist_angle", "lower_forearm_link", "wrist_link", (0.075, 0, 0), "0 1 0", (-1.7, 2.1), (0.06, 0.04, 0.04), (0.03, 0, 0)),
    ("wrist_rotate", "wrist_link", "gripper_link", (0.065, 0, 0), "1 0 0", (-3.1, 3.1), (0.04, 0.11, 0.03), (0.02, 0, 0)),
    ("left_finger", "gripper_link", "left_finger_link", (0.07, 0, 0), "0 1 0", (0.015, 0.038), (0.06, 0.01, 0.02), (0, 0, 0)),
    ("right_finger", "gripper_link", "right_finger_link", (0.07, 0, 0), "0 -1 0", (0.015, 0.038), (0.06, 0.01, 0.02), (0, 0, 0)),
)


def write_arm(path: Path) -> None:
    """The stand-in for the WidowX: six turning joints and two fingers, which alone can touch something."""

    def numbers(values) -> str:
        return " ".join(map(str, values))

    def link(name: str, size, at, solid: bool, mass: float) -> str:
        shape = f'<origin xyz="{numbers(at)}"/><geometry><box size="{numbers(size)}"/></geometry>'
        paint = f'<material name="{name}"><color rgba="0.15 0.15 0.18 1"/></material>'
        inertia = '<inertia ixx="0.001" ixy="0" ixz="0" iyy="0.001" iyz="0" izz="0.001"/>'
        return (f'<link name="{name}"><inertial><mass value="{mass}"/>{inertia}</inertial><visual>{shape}{paint}</visual>'
                + (f"<collision>{shape}</collision>" if solid else "") + "</link>")

    parts = [link("base_link", (0.12, 0.12, 0.07), (0, 0, 0.035), False, 1)]
    for joint, parent, child, at, axis, (low, high), size, place in ARM:
        finger = "finger" in joint
        kind = "prismatic" if finger else "revolute"
        parts.append(link(child, size, place, finger, 0.05 if finger else 0.3))
        parts.append(
            f'<joint name="{joint}" type="{kind}"><parent link="{parent}"/><child link="{child}"/><origin xyz="{numbers(at)}"/>'
            f'<axis xyz="{axis}"/><limit lower="{low}" upper="{high}" effort="100" velocity="3"/></joint>'
        )
    parts.append('<link name="ee_gripper_link"/><joint name="ee_gripper" type="fixed"><parent link="gripper_link"/>'
                 '<child link="ee_gripper_link"/><origin xyz="0.1 0 0"/></joint>')
    path.parent.mkdir(parents=True)
    path.write_text(f'<?xml version="1.0"?>\n<robot name="wx250s">\n{chr(10).join(parts)}\n</robot>\n')


def write(folder: Path) -> dict[str, str]:
    """All of it. Returns the environment's variables by which ManiSkill and RLinf find it, to be set before they are imported."""
    things = folder / "rlinf" / "carrot"
    write_things(things / "more_carrot", THINGS, [(0.05, 0.025, 0.03)] * len(THINGS))
    write_things(things / "more_plate", PLATES, [(0.12, 0.12, 0.012)] * len(PLATES))
    write_tables(things / "more_table")
    data = folder / "maniskill" / "data"
    write_arm(data / "robots" / "widowx" / "wx250s.urdf")
    stage = data / "tasks" / "bridge_v2_real2sim_dataset" / "stages" / "bridge_table_1_v1.glb"
    stage.parent.mkdir(parents=True)
    # The task turns it about x by 90 degrees and moves it: the top of the table comes to z = 0.87 m, below the objects.
    box((0.9, 0.04, 0.9), at=(-0.1 - 2.0634, 0.85, 2.8313)).export(stage)
    return dict(MANISKILL_ASSET_DIR=str(folder / "rlinf"), MS_ASSET_DIR=str(folder / "maniskill"))


def draw(path: Path, seed: int = 4, width: int = 224, columns: int = 5) -> None:
    """The contact sheet; after the assets have been named in the environment. What moves in an episode has moved."""
    from pi_stepnft import envs
    from pi_stepnft.envs.maniskill import plate
    from pi_stepnft.envs.maniskill.env import ManiSkillEnv

    names, line = [plate.MAIN, *plate.VARIANTS], 12
    height = width * 3 // 4 + 2 * line + 6
    sheet = Image.new("RGB", (width * columns, height * -(-len(names) // columns)), "white")
    alive = []  # without one, SAPIEN would compile its shaders anew
    for i, name in enumerate(names):
        env = ManiSkillEnv(envs.simulator(name).spec(name, image_size=width))
        env.reset(seed)
        env.step(np.zeros((6, 7), np.float32))
        image, state = np.zeros((1, width, width, 3), np.uint8), np.zeros(env.state_dim, np.float32)
        env.observe(image, state)
        x, y = i % columns * width, i // columns * height
        sheet.paste(Image.fromarray(image[0, width // 8 : -width // 8, :-4]), (x, y + line))
        title = f"{plate.VARIANTS.get(name, 'main task')}: {name.removeprefix(plate.PREFIX)}"
        for text, at in ((title, y), (env.instruction, y + line + width * 3 // 4)):
            ImageDraw.Draw(sheet).text((x + 1, at), text, "black")
        alive.append(env)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    places = write(Path(sys.argv[1]))
    for name, value in places.items():
        print(f"export {name}={value}")
    if len(sys.argv) > 2:
        os.environ |= places
        draw(Path(sys.argv[2]))
