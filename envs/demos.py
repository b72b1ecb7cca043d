"""Demonstrations: scripted experts acting in the real simulator, written to one HDF5 file.

File format (`FORMAT`): attributes `format`, `env_id`, `obs_mode`, `control_mode`, `image_size`, `instruction`, `noise`, `cameras`
(their names); one group `episode_<i>` per successful episode with

    image   uint8   (T, cameras, H, W, 3)  what the policy saw before each action (no cameras in obs_mode "state")
    state   float32 (T, S)                 its state vector
    action  float32 (T, A)                 the expert's clean action in [-1, 1]
    objects float32 (T, objects, 3)        where the movable objects are, m (privileged: for pre-training perception, not acting)

and attributes `seed`, `steps`, and `instruction`, where it is not that of the file. Episodes that fail are not written.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from pi_stepnft.envs import reading
from pi_stepnft.envs.base import TRAIN_SEEDS, EnvError, Environment
from pi_stepnft.envs.simulators import simulator

FORMAT = "pi-stepnft-demos-1"
ARRAYS = ("image", "state", "action", "objects")


@dataclass
class Demos:
    """Episodes, one after the other: arrays as in the file with N rows; start (E,) is the first row of each episode."""

    image: np.ndarray
    state: np.ndarray
    action: np.ndarray
    objects: np.ndarray
    start: np.ndarray
    attrs: dict
    instructions: list[str]
    """all that occur"""
    told: np.ndarray
    """(N,) int32: which of the instructions belongs to each row"""
    cameras: tuple[str, ...] = ()
    """names, in the order of the pictures"""
    failed: int = 0
    """episodes that the file marks as failures, and that were left out"""

    def text(self, rows: np.ndarray) -> list[str]:
        """The instruction of each of the given rows (b,)."""
        return [self.instructions[i] for i in self.told[rows]]

    def match(self, cameras: Sequence[str]) -> bool:
        """Keep the cameras that belong to those of an environment, in its order; False, and nothing is done, if names do not tell.

        Names are compared without what the formats add; otherwise it counts where the cameras are (`reading.place_of`), if all
        are in different places. Pictures move within their file, for they may be more than fit into memory.
        """
        bare = lambda name: re.sub(r"^observation\.(images?\.)?|_(rgb|image)$", "", name)
        for key in (bare, reading.place_of):
            known, wanted = list(map(key, self.cameras)), list(map(key, cameras))
            if len(known) == len(set(known)) and len(wanted) == len(set(wanted)) and set(wanted) <= set(known):
                order = [known.index(camera) for camera in wanted]
                break
        else:
            return False
        if order != list(range(len(self.cameras))):
            for first in range(0, len(self.image), 256):
                rows = self.image[first : first + 256]
                rows[:, : len(order)] = rows[:, order]
            self.image, self.cameras = self.image[:, : len(order)], tuple(self.cameras[i] for i in order)
        return True

    def chunks(self, horizon: int, absolute: bool = False) -> np.ndarray:
        """(N, horizon, A): the actions from each step on. Past an episode's end the arm rests and the gripper stays as it was.

        absolute: actions are targets, so that repeating the last one is to rest; otherwise they are differences, which are 0 then.
        """
        ends = np.append(self.start[1:], len(self.action))
        last = np.repeat(ends - 1, np.diff(np.append(self.start, len(self.action))))  # (N,) last row of each row's episode
        index = np.arange(len(self.action))[:, None] + np.arange(horizon)
        chunks = self.action[np.minimum(index, last[:, None])]
        if not absolute:
            chunks[index > last[:, None], :-1] = 0.0
        return chunks


def demonstrate(env: Environment, seed: int, noise: float, observe: bool = True) -> dict | None:
    """One episode of the scripted expert in `env`; None if it fails.

    `noise` is the standard deviation of Gaussian noise on the executed translation, relative to that translation: large on the
    way, none at rest, where a task may ask the robot to be still. The recorded action is the clean one, so the policy sees states
    off the expert's path together with the way back. Without `observe`, pictures and states are left black and zero, which saves
    most of the time where only success counts.
    """
    expert = env.expert()
    rng = np.random.default_rng(seed)
    env.reset(seed)
    expert.reset()
    image = np.zeros((len(env.cameras), *(2 * [env.spec.image_size]), 3), np.uint8)
    state = np.zeros(env.state_dim, np.float32)
    rows: dict[str, list] = {name: [] for name in ARRAYS}
    truncated = False
    while not (env.success or truncated):
        if observe:
            env.observe(image, state)
        action = np.clip(expert.act(), -1, 1)
        for name, value in zip(ARRAYS, (image, state, action, env.object_positions()), strict=True):
            rows[name].append(np.array(value))
        executed = action.copy()
        executed[:3] += noise * np.abs(action[:3]).max() * rng.standard_normal(3)[: len(action)]
        _, _, truncated, _ = env.step(executed[None])
    told = dict(seed=seed, instruction=env.instruction)
    return {name: np.stack(values) for name, values in rows.items()} | told if env.success else None


def demonstrate_in(env: Environment, env_id: str, seeds: Sequence[int], count: int, noise: float) -> list[dict | None]:
    """Episodes of `demonstrate` in a scene or task of its own, which is made for them, until `count` have succeeded."""
    gc.freeze()  # ManiSkill collects garbage twice for each scene, which takes longer than the episode if all there is is searched
    scene, made = None, []
    try:
        scene = replace(env.spec, env_id=env_id).create(0, 1)
        for seed in seeds:
            made.append(demonstrate(scene, seed, noise))
            if len(made) - made.count(None) == count:
                break
        return made
    finally:
        if scene:
            scene.close()
        del scene
        gc.collect()  # SAPIEN's scenes are freed with the last that refers to them; a process has room for about a thousand
        gc.unfreeze()


def collect(
    path: str | Path, venv, count: int, *, noise: float = 0.0, first_seed: int = TRAIN_SEEDS, scenes: Sequence[str] = (),
    progress: bool = True,
) -> Demos:
    """Write `count` successful episodes of the task's expert to `path` and read them back.

    venv: an `envs.pool.ChunkVecEnv`, whose workers run the experts. scenes: ids of variants of its task, over which the episodes
    are spread evenly; none: the task itself, or a suite's tasks. The file appears when it is complete, never half-written.
    Raises EnvError if there is no expert for the task, or it fails more than half the time.
    """
    spec = venv.spec
    simulator(spec.env_id).expert(spec.env_id)
    if not scenes and len(tasks := list(simulator(spec.env_id).select(spec.env_id, ["id"], spec.obs_mode))) > 1:
        if count < len(tasks):
            raise EnvError(f"{spec.env_id} has {len(tasks)} tasks: {count} demonstrations leave some without any")
        scenes = tasks
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # another program may collect the same
    done, tried = 0, 0
    try:
        with h5py.File(temporary, "w") as file, tqdm(total=count, desc="demonstrations", disable=not progress) as bar:
            file.attrs.update(
                format=FORMAT, env_id=spec.env_id, obs_mode=spec.obs_mode, control_mode=spec.control_mode,
                image_size=spec.image_size, instruction=venv.instruction, noise=noise, cameras=venv.cameras,
            )
            while done < count:
                seeds = range(first_seed + tried, first_seed + tried + count - done)
                if scenes:  # each tries again by itself, so that its episodes stay together: whole scenes can be held out
                    jobs, last = [], first_seed + 2 * max(count, 10 * len(scenes))
                    for i, scene in enumerate(scenes[:count]):
                        share = len(seeds[i :: len(scenes)])
                        jobs.append(dict(env_id=scene, seeds=range(first_seed + i, last, len(scenes)), count=share, noise=noise))
                    made = itertools.chain.from_iterable(venv.call(demonstrate_in, jobs))
                else:
                    made = venv.call(demonstrate, [dict(seed=seed, noise=noise) for seed in seeds])
                for episode in made:
                    tried += 1
                    if episode is None:
                        continue
                    group = file.create_group(f"episode_{done}")
                    group.attrs.update(seed=episode["seed"], steps=len(episode["action"]), instruction=episode["instruction"])
                    for name in ARRAYS:
                        group.create_dataset(name, data=episode[name], compression="lzf" if name == "image" else None)
                    done += 1
                    bar.update()
                if done < count and (scenes or tried >= 2 * max(count, 10)):
                    raise EnvError(f"the expert for {spec.env_id} solved only {done} of {tried} episodes")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return read(path)


def read(path: str | Path, **expected: str) -> Demos:
    """Read one demonstration file. Raises EnvError, naming what is missing, if it is not one.

    expected: attributes that the file must have, e.g. env_id="PickCube-v1"; another value is an EnvError too.
    """
    path = Path(path)
    if not path.exists():
        raise EnvError(f"no demonstration file at {path}")
    return Demos(**reading.gather(episodes, path, {}, expected=expected))


def episodes(path: Path, cameras: Sequence[str] | None = None) -> Iterator[dict]:
    """What `reading.join` takes of a demonstration file, in the child process. cameras: which ones, in order; default: all."""
    with reading.hdf5(path) as file:
        if reading.attribute(file, "format") != FORMAT:
            raise EnvError(f"{path} is not a demonstration file: its attribute 'format' is not {FORMAT!r}")
        names = ("env_id", "obs_mode", "control_mode", "image_size", "instruction", "noise")
        attrs = {name: value for name in names if (value := reading.attribute(file, name)) is not None}
        groups = reading.numbered(file, "episode_")
        if not groups:
            raise EnvError(f"{path} holds no episodes")
        if groups != [f"episode_{i}" for i in range(len(file))]:
            raise EnvError(f"{path} holds {len(file)} entries, which are not episode_0 to episode_{len(file) - 1}")
        for name, episode in reading.members(file, groups):
            arrays = {column: reading.array(episode, column) for column in ARRAYS}
            image = arrays["image"]
            if image.ndim != 5 or (image.size and image.dtype != np.uint8):
                raise EnvError(f"{path}: {name}/image is {image.dtype} {image.shape}, not uint8 (T, cameras, H, W, 3)")
            known = reading.attribute(file, "cameras") or ()
            if len(known) != image.shape[1]:  # a file of version 0.1
                known = [f"camera {i}" for i in range(image.shape[1])]
            chosen = known if cameras is None else reading.pick(known, cameras, path)
            if len(arrays["action"]) != (steps := reading.attribute(episode, "steps") or len(arrays["action"])):
                raise EnvError(f"{path}: {name} has {len(arrays['action'])} actions, its attribute 'steps' says {steps}")
            instruction = reading.attribute(episode, "instruction") or attrs.get("instruction", "")
            yield arrays | dict(image=image[:, [known.index(camera) for camera in chosen]], cameras=chosen, attrs=attrs,
                                instruction=instruction)
