"""Demonstrations as users have them, read into `envs.demos.Demos`: LIBERO and ManiSkill HDF5, LeRobot datasets, this project's own.

    read("demos/PickCube-v1-state-32-noise0.5.h5")         # envs/demos.py
    read("libero_object")                                  # a folder of LIBERO's *_demo.hdf5, or one such file
    read("trajectory.rgb.pd_ee_delta_pose.physx_cpu.h5")   # ManiSkill's RecordEpisode, with the .json beside it
    read("lerobot/libero")                                 # a LeRobot dataset folder, v2.0 to v3.0

The layout is recognised by what is in the file. All is held in memory; `image_size` shrinks pictures while they are read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from envs import demos
from envs.spec import EnvError

LIBERO_CAMERAS = "agentview_rgb", "eye_in_hand_rgb"
LIBERO_STATE = "ee_pos", "ee_ori", "gripper_states"
"""openpi's state for LIBERO: position (3), axis-angle (3), gripper (2)"""


def read(
    path: str | Path, *, obs_mode: str = "rgb", rotate: bool | None = None, image_size: int | None = None, **expected: str
) -> demos.Demos:
    """Read every successful demonstration of a file or folder.

    obs_mode: "rgb", or "state" to leave the pictures away.
    rotate: turn pictures by 180°. Default: those of LIBERO's HDF5 files alone, which hold what MuJoCo renders, upside down; LeRobot
        versions of LIBERO are mostly turned already (openpi's are).
    image_size: longer side of the pictures in memory, px; smaller ones stay as they are. Default: as stored.
    expected: what a file must be of if it tells, e.g. env_id="PickCube-v1".

    Raises EnvError, in one line, that names the file and what it lacks.
    """
    path = Path(path)
    if not path.exists():
        raise EnvError(f"no demonstration file at {path}")
    try:
        if (path / "meta" / "info.json").is_file():
            episodes = _lerobot(path)
        elif files := [path] if path.is_file() else sorted([*path.glob("*.hdf5"), *path.glob("*.h5")]):
            if len(files) == 1 and _attribute(files[0], "format") == demos.FORMAT:
                return demos.read(files[0], obs_mode=obs_mode, **expected)
            episodes = (episode for file in files for episode in _hdf5(file, rotate))
        else:
            raise EnvError(f"{path} holds neither meta/info.json (LeRobot) nor *.hdf5 or *.h5 files (LIBERO, ManiSkill)")
        if obs_mode == "state":
            episodes = (episode | {"image": []} for episode in episodes)
        data = _join(path, episodes, bool(rotate), image_size)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise EnvError(f"{path} cannot be read as demonstrations: {str(error).splitlines()[0]}") from None
    for name, value in expected.items():
        if data.attrs.get(name, value) != value:
            raise EnvError(f"{path} was made for {name} {data.attrs[name]!r}, not {value!r}")
    if obs_mode == "rgb" and not data.image.shape[1]:
        raise EnvError(f"{path} holds no pictures: record it with some, or train without, in obs mode 'state'")
    return data


def _join(path: Path, episodes: Iterator[dict], rotate: bool, image_size: int | None) -> demos.Demos:
    """Episodes of {"image": [(T, H, W, 3) per camera], "state" (T, S), "action" (T, A), "instruction"} as one Demos."""
    columns: dict[str, list] = {"image": [], "state": [], "action": []}
    instructions, attrs = [], {}
    for episode in episodes:
        cameras = [_shrink(images[:, ::-1, ::-1] if rotate else images, image_size) for images in episode["image"]]
        T = len(episode["action"])
        if len({c.shape[1:] for c in cameras}) > 1:
            raise EnvError(f"{path} has cameras of {' and '.join(str(c.shape[1:3]) for c in cameras)} pixels: give --image-size")
        episode["image"] = np.stack(cameras, 1) if cameras else np.zeros((T, 0, 0, 0, 3), np.uint8)
        for name, values in columns.items():
            value = np.asarray(episode[name], np.uint8 if name == "image" else np.float32)
            if len(value) != T or (values and value.shape[1:] != values[0].shape[1:]):
                raise EnvError(f"{path}: {name} of episode {len(instructions)} has shape {value.shape}, unlike the rest")
            if not np.isfinite(value).all():
                raise EnvError(f"{path}: {name} of episode {len(instructions)} holds NaN or infinity")
            values.append(value)
        instructions.append(episode["instruction"])
        attrs.update(episode.get("attrs", {}))
    if not instructions:
        raise EnvError(f"{path} holds no successful episode")
    start = np.cumsum([0, *map(len, columns["action"][:-1])])
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    objects = np.zeros((len(arrays["action"]), 0, 3), np.float32)  # privileged: not in these files
    return demos.Demos(**arrays, objects=objects, start=start, attrs=attrs | dict(instruction=instructions[0]),
                       instructions=instructions)  # fmt: skip


def _shrink(images: np.ndarray, size: int | None) -> np.ndarray:
    """(T, H, W, 3) uint8 with the longer side at most `size`: bilinear with antialiasing, as the policies' processor does it."""
    ratio = max(images.shape[1:3]) / (size or np.inf)
    if ratio <= 1:
        return images
    import torch

    shape = [max(1, int(side / ratio)) for side in images.shape[1:3]]
    small = torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), shape, mode="bilinear", antialias=True
    )
    return small.permute(0, 2, 3, 1).numpy()


def _of(group: Any, name: str, file: Path, advice: str = "") -> Any:
    """An entry of an HDF5 group, or the error that it is not there."""
    if name not in group:
        raise EnvError(f"{file} lacks {group.name.rstrip('/')}/{name}{advice}")
    return group[name]


def _attribute(file: Path, name: str) -> Any:
    with h5py.File(file) as opened:
        return opened.attrs.get(name)


def _numbered(names: Any, prefix: str) -> list[str]:
    """Those that are the prefix and a number, in the order of the numbers."""
    return sorted((n for n in names if re.fullmatch(rf"{prefix}\d+", n)), key=lambda n: int(n[len(prefix) :]))


# ------------------------------------------------------------------------------------------------------ LIBERO and ManiSkill


def _hdf5(file: Path, rotate: bool | None) -> Iterator[dict]:
    with h5py.File(file) as opened:
        if "data" in opened:
            yield from _libero(opened["data"], file, rotate is None)
        elif _numbered(opened, "traj_"):
            yield from _maniskill(opened, file)
        else:
            raise EnvError(f"{file} holds neither /data (LIBERO) nor /traj_0 (ManiSkill), and its format is not {demos.FORMAT!r}")


def _libero(data: h5py.Group, file: Path, rotate: bool) -> Iterator[dict]:
    """`/data/demo_<i>/{actions, obs/…}` with the instruction in the attribute `problem_info`."""
    info = json.loads(data.attrs.get("problem_info", "{}"))
    if "language_instruction" not in info:
        raise EnvError(f"{file} lacks the instruction: no 'language_instruction' in the attribute 'problem_info' of /data")
    for name in _numbered(data, "demo_"):
        demo = data[name]
        obs = _of(demo, "obs", file)
        images = [_of(obs, camera, file)[:] for camera in LIBERO_CAMERAS]
        yield dict(
            image=[x[:, ::-1, ::-1] for x in images] if rotate else images,
            state=np.concatenate([_of(obs, part, file)[:] for part in LIBERO_STATE], 1),
            action=_of(demo, "actions", file)[:],
            instruction="".join(info["language_instruction"]).strip().strip('"').lower(),
        )


def _maniskill(opened: h5py.File, file: Path) -> Iterator[dict]:
    """`/traj_<i>/{actions, obs/…, success}`; observations have one row more than actions. The .json names task and control mode."""
    from envs import maniskill

    sidecar = file.with_suffix(".json")
    if not sidecar.is_file():
        raise EnvError(f"{file} lacks its description {sidecar.name}, which ManiSkill writes beside it")
    info = json.loads(sidecar.read_text()).get("env_info", {})
    if "env_id" not in info:
        raise EnvError(f"{sidecar} lacks env_info/env_id")
    env_id, mode = info["env_id"], info.get("env_kwargs", {}).get("control_mode")
    advice = (f": record observations with python -m mani_skill.trajectory.replay_trajectory --traj-path {file} "
              "-o rgb -c pd_ee_delta_pose --save-traj")  # fmt: skip
    attrs = dict(env_id=env_id) | ({"control_mode": mode} if mode else {})
    for name in _numbered(opened, "traj_"):
        trajectory = opened[name]
        if "success" in trajectory and not trajectory["success"][:].any():
            continue
        obs = _of(trajectory, "obs", file, advice)
        if isinstance(obs, h5py.Dataset):  # obs_mode "state"
            images, state = [], obs[:-1]
        else:
            cameras = obs["sensor_data"] if "sensor_data" in obs else {}
            images = [_of(camera, "rgb", file, advice)[:-1] for camera in cameras.values()]
            parts = [part for group in ("agent", "extra") if group in obs for part in _leaves(obs[group])]
            if not parts:
                raise EnvError(f"{file} lacks {obs.name}/agent{advice}")
            state = np.concatenate([part.reshape(len(part), -1)[:-1] for part in parts], 1)
        yield dict(image=images, state=state, action=_of(trajectory, "actions", file)[:], attrs=attrs,
                   instruction=maniskill.instruction(env_id))  # fmt: skip


def _leaves(group: h5py.Group) -> list[np.ndarray]:
    """All arrays below a group, in the order in which they were recorded, which is that of the environment's state."""
    return [leaf for value in group.values() for leaf in (_leaves(value) if isinstance(value, h5py.Group) else [value[:]])]


# ----------------------------------------------------------------------------------------------------------------- LeRobot


def _lerobot(folder: Path) -> Iterator[dict]:
    """Frames from data/**/*.parquet; pictures from there too, or from videos/; tasks and videos' places from meta/."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise EnvError("LeRobot datasets need pyarrow: pip install pyarrow") from None
    info = json.loads((folder / "meta" / "info.json").read_text())
    version = str(info.get("codebase_version", "")).removeprefix("v")
    if version.split(".")[0] not in ("2", "3"):
        raise EnvError(f"{folder} is a LeRobot dataset of version {version or 'unknown'}; v2.0 to v3.0 can be read")
    features = info.get("features", {})

    def one_of(*names: str) -> str:
        found = next((name for name in names if name in features), None)
        if found is None:
            raise EnvError(f"{folder}/meta/info.json lacks the feature {' or '.join(names)}")
        return found

    state, action = one_of("observation.state", "state"), one_of("action", "actions")
    cameras = {name: feature["dtype"] for name, feature in features.items() if feature["dtype"] in ("image", "video")}
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise EnvError(f"{folder} lacks data/**/*.parquet")
    stored = [name for name, dtype in cameras.items() if dtype == "image"]
    columns = ["episode_index", "frame_index", "task_index", state, action, *stored]
    tasks, places = _lerobot_tasks(folder), _lerobot_episodes(folder, pq) if version.startswith("3") else {}
    for file in files:
        missing = set(columns) - set(pq.read_schema(file).names)
        if missing:
            raise EnvError(f"{file} lacks the column {', '.join(sorted(missing))}")
        table = pq.read_table(file, columns=columns).combine_chunks()
        for episode in sorted(set(table["episode_index"].to_pylist())):
            rows = table.filter(pa.compute.equal(table["episode_index"], episode)).sort_by("frame_index")
            task = rows["task_index"][0].as_py()
            if task not in tasks:
                raise EnvError(f"{folder}/meta lacks the text of task {task}")
            frames = {name: np.stack([_picture(cell, folder) for cell in rows[name].to_pylist()]) for name in stored}
            for name in cameras.keys() - frames.keys():
                frames[name] = _video(folder, info, name, episode, len(rows), places.get(episode, {}))
            yield dict(image=[frames[name] for name in cameras], instruction=tasks[task],
                       state=np.array(rows[state].to_pylist()), action=np.array(rows[action].to_pylist()))  # fmt: skip


def _lerobot_tasks(folder: Path) -> dict[int, str]:
    """task_index → instruction: meta/tasks.jsonl (v2), meta/tasks.parquet (v3)."""
    if (lines := folder / "meta" / "tasks.jsonl").is_file():
        return {row["task_index"]: row["task"] for row in map(json.loads, filter(str.strip, lines.read_text().splitlines()))}
    if not (table := folder / "meta" / "tasks.parquet").is_file():
        raise EnvError(f"{folder} lacks meta/tasks.jsonl (v2) and meta/tasks.parquet (v3)")
    import pyarrow.parquet as pq

    columns = pq.read_table(table).to_pydict()
    text = next((name for name in columns if name != "task_index"), None)  # pandas' index, whose name varies
    return dict(zip(columns["task_index"], columns.get(text, ())))


def _lerobot_episodes(folder: Path, pq: Any) -> dict[int, dict]:
    """episode_index → its row in meta/episodes/**/*.parquet (v3): in which video file, and from which second."""
    rows = [row for file in sorted((folder / "meta" / "episodes").rglob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return {row["episode_index"]: row for row in rows}


def _picture(cell: dict, folder: Path) -> np.ndarray:
    """A PNG or JPEG inside a parquet cell, or the file it names."""
    import imageio.v3 as iio

    return iio.imread(io.BytesIO(cell["bytes"]) if cell.get("bytes") else folder / cell["path"])[..., :3]


def _video(folder: Path, info: dict, camera: str, episode: int, length: int, place: dict) -> np.ndarray:
    """The `length` frames (T, H, W, 3) of an episode: a file of its own (v2), or a piece of one (v3)."""
    import imageio.v3 as iio

    if place:
        keys = dict(chunk_index=place[f"videos/{camera}/chunk_index"], file_index=place[f"videos/{camera}/file_index"])
        first = round(place[f"videos/{camera}/from_timestamp"] * info["fps"])
    else:
        keys, first = dict(episode_chunk=episode // info.get("chunks_size", 1000), episode_index=episode), 0
    file = folder / info["video_path"].format(video_key=camera, **keys)
    if not file.is_file():
        raise EnvError(f"{folder} lacks the video {file.relative_to(folder)}")
    frames = []
    for i, frame in enumerate(iio.imiter(file, plugin="FFMPEG")):
        if i >= first:
            frames.append(frame)
        if len(frames) == length:
            return np.stack(frames)
    raise EnvError(f"{file} has {len(frames)} frames of episode {episode}, its data {length}")
