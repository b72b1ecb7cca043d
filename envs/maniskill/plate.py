"""The paper's ManiSkill tasks: RLinf's PutOnPlateInScene25 and its variants out of distribution. Importing it imports no simulator.

A WidowX is to put one of 25 things on a plate; the table, the things and the sentence change from episode to episode. The task's
code comes with RLinf's wheel, its things, tables and robot are downloads (`check` says which). Docs: docs/ood.md.

Its initial states are a fixed grid (thing × plate × table × places × rotation: 802,816 in the main task, 250,880 to 11.5 billion in
the variants), and a seed stands for one of them, always.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from collections.abc import Iterable
from typing import Any

import numpy as np

from pi_stepnft.envs.base import EnvError, did_you_mean, import_below

PREFIX = "PutOnPlateInScene25"
MAIN = f"{PREFIX}Main-v3"
FAMILIES = dict(
    vision=("VisionImage", "VisionTexture03", "VisionTexture05", "VisionWhole03", "VisionWhole05"),
    semantic=("Carrot", "Plate", "Instruct", "MultiCarrot", "MultiPlate"),
    execution=("Position", "EEPose", "PositionChangeTo"),
)
VARIANTS = {f"{PREFIX}{name}-v1": family for family, names in FAMILIES.items() for name in names}
"""Ids of the variants, as RLinf registers them, in the paper's order, and the family of each."""

VERSION = "0.3.0"
"""Of RLinf, the one that this is tested with."""
PACKAGES = f"pip install opencv-python && pip install --no-deps rlinf=={VERSION}"
THINGS = "hf download RLinf/maniskill_assets --repo-type dataset --local-dir {0} && export MANISKILL_ASSET_DIR={0}"


def knows(env_id: str) -> bool:
    """Whether an id is, or is meant to be, one of these tasks'."""
    return env_id.startswith(PREFIX)


@functools.cache
def register() -> types.ModuleType:
    """Import the modules of the tasks, which registers them with ManiSkill, and no other of RLinf: its packages above them would
    import Ray, Hydra and more. Returns the main task's. EnvError where they cannot be imported."""
    if importlib.util.find_spec("rlinf") is None:
        raise EnvError(f"the tasks {PREFIX}… come with RLinf's wheel, without what it depends on: {PACKAGES}")
    try:
        import_below("rlinf.envs.maniskill", "tasks.variants")
        return import_below("rlinf.envs.maniskill", "tasks.put_on_in_scene_multi")
    except ImportError as error:
        raise EnvError(f"RLinf's tasks {PREFIX}… cannot be imported ({error}): {PACKAGES}") from None


def check(env_id: str) -> None:
    """Raise EnvError, in one line, for an id that is none of these, and where files are missing: which, from where, and whereto."""
    if env_id != MAIN and env_id not in VARIANTS:
        raise EnvError(f"unknown task {env_id!r}{did_you_mean(env_id, [MAIN, *VARIANTS]) or f'; there is {MAIN}'}")
    things = register().CARROT_DATASET_DIR.resolve()
    from mani_skill.utils import assets

    missing = [
        f"{what} in {source.output_dir / source.target_path} (python -m mani_skill.utils.download_asset -y {name})"
        for name, what in (("widowx250s", "the robot"), ("bridge_v2_real2sim", "the scene"))
        if not (source := assets.DATA_SOURCES[name]).output_dir.joinpath(source.target_path).exists()
    ]
    if not all((things / kind / "model_db.json").exists() for kind in ("more_carrot", "more_plate", "more_table")):
        folder = os.environ.get("MANISKILL_ASSET_DIR") or assets.ASSET_DIR.parent / "rlinf"
        missing.append(f"things and tables in {things} ({THINGS.format(folder)})")
    if missing:
        raise EnvError(f"{env_id} needs downloads that are not on this machine: {'; '.join(missing)}")


def options(env_id: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those given, and RLinf's in place of our defaults, with which the paper's checkpoints were trained. EnvError for a mode
    without pictures."""
    if given.get("obs_mode", "rgb") != "rgb":
        raise EnvError(f"{env_id} has pictures and no other observations: obs_mode must be 'rgb', got {given['obs_mode']!r}")
    known = dict(
        control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos", sim_obs_mode="rgb+segmentation", task_size=True,
        joints=8, binary_gripper=True, kwargs={},
    )
    chosen = known | given
    if isinstance(chosen["kwargs"], dict):
        chosen["kwargs"] = dict(obj_set="train" if env_id == MAIN else "test", reward_mode="none") | chosen["kwargs"]
    return chosen


def reset_options(base: Any, seeds: Iterable[int]) -> dict[str, Any]:
    """What `base.reset` has to be told to begin the episodes of these seeds, one for each environment; {} for other tasks."""
    if not hasattr(base, "_reset_episode_idx"):
        return {}
    import torch

    states = [int(np.random.default_rng(int(seed)).integers(base.total_num_trials)) for seed in seeds]
    return dict(episode_id=torch.tensor(states, device=base.device))
