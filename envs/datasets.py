"""Demonstrations as users have them, read into `envs.demos.Demos`: LIBERO and ManiSkill HDF5, LeRobot datasets, this project's own.

    read("demos/PickCube-v1-state-32-noise0.5.h5")         # envs/demos.py
    read("libero_object")                                  # a folder of LIBERO's *_demo.hdf5, or one such file
    read("trajectory.rgb.pd_ee_delta_pose.physx_cpu.h5")   # ManiSkill's RecordEpisode, with the .json beside it
    read("lerobot/libero")                                 # a LeRobot dataset folder, v2.0 to v3.0

The layout is recognised by what is in the file. Pictures, shrunk to `image_size` while they are read, lie in an unnamed temporary
file (in `TMPDIR`) that is mapped into memory, so they may be more than fit there; all else is held in memory.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pi_stepnft.envs import demos
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.simulators import simulator

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
    image_size: longer side of the pictures in memory, px; smaller ones stay as they are. Default: as stored. Cameras of different
        sizes all become squares of this size, padded with black.
    expected: what a file must be of if it tells, e.g. env_id="PickCube-v1".

    Raises EnvError, in one line, that names the file and what it lacks.
    """
    path = Path(path)
    if not path.exists():
        raise EnvError(f"no demonstration file at {path}")
    with _reading(path):
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
    for name, value in expected.items():
        if data.attrs.get(name, value) not in (value, value.rpartition(":")[2]):  # a file knows no module:Task-v1
            raise EnvError(f"{path} was made for {name} {data.attrs[name]!r}, not {value!r}")
    if obs_mode == "rgb" and not data.image.shape[1]:
        raise EnvError(f"{path} holds no pictures: record it with some, or train without, in obs mode 'state'")
    return data


@contextlib.contextmanager
def _reading(place: str | Path) -> Iterator[None]:
    """Names the place in what h5py, json, pyarrow, NumPy and the decoders raise over a damaged file."""
    try:
        yield
    except KeyError as error:
        raise EnvError(f"{place} lacks {str(error).splitlines()[0]}") from None
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvError(f"{place} cannot be read as demonstrations: {reason}") from None


def _join(path: Path, episodes: Iterator[dict], rotate: bool, image_size: int | None) -> demos.Demos:
    """Episodes of {"image": [(T, H, W, 3) per camera], "state" (T, S), "action" (T, A), "instruction"} as one Demos."""
    columns: dict[str, list] = {"state": [], "action": []}
    instructions, attrs, shape = [], {}, None
    with tempfile.TemporaryFile() as pictures:
        for episode in episodes:
            which, T = f"of episode {len(instructions)}", len(episode["action"])
            if not T:
                continue
            for images in episode["image"]:
                if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                    raise EnvError(f"{path}: pictures {which} are {images.dtype} {images.shape}, not uint8 (T, H, W, 3)")
            sizes = {images.shape[1:3] for images in episode["image"]}
            if len(sizes) > 1 and not image_size:
                raise EnvError(f"{path} has cameras of {' and '.join(map(str, sorted(sizes)))} pixels: give image_size")
            turned = (images[:, ::-1, ::-1] if rotate else images for images in episode["image"])
            cameras = [_resize(images, image_size, square=len(sizes) > 1) for images in turned]
            if len({T, len(episode["state"]), *map(len, cameras)}) > 1:
                raise EnvError(f"{path}: {T} actions {which}, {len(episode['state'])} states, {[*map(len, cameras)]} pictures")
            image = np.stack(cameras, 1) if cameras else np.zeros((T, 0, 0, 0, 3), np.uint8)
            shape = shape or image.shape[1:]
            if image.shape[1:] != shape:
                raise EnvError(f"{path}: pictures {which} have shape {image.shape[1:]}, those before {shape}")
            pictures.write(image.data)
            for name, values in columns.items():
                value = np.asarray(episode[name], np.float32).reshape(T, -1)  # LeRobot stores 1-dim vectors as numbers
                if values and value.shape[1] != values[0].shape[1]:
                    raise EnvError(f"{path}: {name} {which} has {value.shape[1]} dimensions, before {values[0].shape[1]}")
                if not np.isfinite(value).all():
                    raise EnvError(f"{path}: {name} {which} holds NaN or infinity")
                values.append(value)
            instructions.append(episode["instruction"])
            for name, value in episode.get("attrs", {}).items():
                if attrs.setdefault(name, value) != value:
                    raise EnvError(f"{path} mixes {name} {attrs[name]!r} and {value!r}")
        lengths = [len(action) for action in columns["action"]]
        if not lengths:
            raise EnvError(f"{path} holds no successful episode")
        pictures.flush()
        shape = sum(lengths), *shape
        image = np.asarray(np.memmap(pictures, np.uint8, "r", shape=shape)) if shape[1] else np.zeros(shape, np.uint8)
    return demos.Demos(
        image=image, **{name: np.concatenate(values) for name, values in columns.items()},
        objects=np.zeros((len(image), 0, 3), np.float32),  # privileged: not in these files
        start=np.cumsum([0, *lengths[:-1]]), attrs=attrs | dict(instruction=instructions[0]), instructions=instructions,
    )


def _resize(images: np.ndarray, size: int | None, square: bool) -> np.ndarray:
    """(T, H, W, 3) uint8 with the longer side at most `size`: bilinear with antialiasing, as the policies' processor does it.

    square: (T, size, size, 3), centred on black, as the processor makes it of all; for cameras that differ and are to be one array.
    """
    ratio = max(images.shape[1:3]) / (size or np.inf)
    if ratio <= 1 and not square:
        return images
    import torch

    H, W = (max(1, int(side / ratio)) for side in images.shape[1:3])
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), (H, W), mode="bilinear", antialias=True
    )
    if square:
        top, left = (size - H) // 2, (size - W) // 2
        resized = torch.nn.functional.pad(resized, (left, size - W - left, top, size - H - top))
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


def _of(group: Any, name: str, file: Path, advice: str = "") -> Any:
    """An entry of an HDF5 group, or the error that it is not there."""
    if name not in group:
        raise EnvError(f"{file} lacks {group.name.rstrip('/')}/{name}{advice}")
    return group[name]


def _json(file: Path) -> dict:
    with _reading(file):
        if isinstance(content := json.loads(file.read_text()), dict):
            return content
        raise EnvError(f"{file} holds no JSON object")


def _attribute(file: Path, name: str) -> Any:
    with h5py.File(file) as opened:
        return opened.attrs.get(name)


def _numbered(names: Any, prefix: str) -> list[str]:
    """Those that are the prefix and a number, in the order of the numbers."""
    return sorted((n for n in names if re.fullmatch(rf"{prefix}\d+", n)), key=lambda n: int(n[len(prefix) :]))


# ------------------------------------------------------------------------------------------------------ LIBERO and ManiSkill


def _hdf5(file: Path, rotate: bool | None) -> Iterator[dict]:
    with _reading(file), h5py.File(file) as opened:
        if "data" in opened:
            yield from _libero(opened["data"], file, rotate is None)
        elif _numbered(opened, "traj_"):
            yield from _maniskill(opened, file)
        else:
            raise EnvError(f"{file} holds neither /data (LIBERO) nor /traj_0 (ManiSkill), and its format is not {demos.FORMAT!r}")


def _libero(data: h5py.Group, file: Path, rotate: bool) -> Iterator[dict]:
    """`/data/demo_<i>/{actions, obs/…}` with the instruction in the attribute `problem_info`."""
    with _reading(f"{file}, attribute 'problem_info' of /data,"):
        info = json.loads(data.attrs.get("problem_info", "{}"))
    if "language_instruction" not in info:
        raise EnvError(f"{file} lacks the instruction: no 'language_instruction' in the attribute 'problem_info' of /data")
    for name in _numbered(data, "demo_"):
        demo = data[name]
        obs = _of(demo, "obs", file)
        images = [_of(obs, camera, file)[:] for camera in LIBERO_CAMERAS]
        with _reading(f"{file}, {obs.name},"):
            state = np.concatenate([_of(obs, part, file)[:] for part in LIBERO_STATE], 1)
        yield dict(
            image=[x[:, ::-1, ::-1] for x in images] if rotate else images, state=state, action=_of(demo, "actions", file)[:],
            instruction="".join(info["language_instruction"]).strip().strip('"').lower(),
        )


def _maniskill(opened: h5py.File, file: Path) -> Iterator[dict]:
    """`/traj_<i>/{actions, obs/…, success}`; observations have one row more than actions. The .json names task and control mode."""
    sidecar = file.with_suffix(".json")
    if not sidecar.is_file():
        raise EnvError(f"{file} lacks its description {sidecar.name}, which ManiSkill writes beside it")
    info = _json(sidecar).get("env_info") or {}
    if "env_id" not in info:
        raise EnvError(f"{sidecar} lacks env_info/env_id")
    env_id, mode = info["env_id"], (info.get("env_kwargs") or {}).get("control_mode")
    replayed = "pd_ee_delta_pose" if mode == "pd_joint_pos" else mode  # ManiSkill converts from no other into that
    advice = (f": record observations with python -m mani_skill.trajectory.replay_trajectory --traj-path {file} "
              f"-o rgb{f' -c {replayed}' if replayed else ''} --save-traj")
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
                   instruction=simulator(env_id).instruction(env_id))


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
    info = _json(folder / "meta" / "info.json")
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
    cameras = {name: feature["dtype"] for name, feature in features.items() if feature.get("dtype") in ("image", "video")}
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise EnvError(f"{folder} lacks data/**/*.parquet")
    stored = [name for name, dtype in cameras.items() if dtype == "image"]
    columns = ["episode_index", "frame_index", "task_index", state, action, *stored]
    tasks, videos = _lerobot_tasks(folder), _Videos(folder, info, version.startswith("3"))
    for file in files:
        with _reading(file):
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
                    frames[name] = videos.read(name, episode, len(rows))
                yield dict(image=[frames[name] for name in cameras], instruction=tasks[task],
                           state=np.array(rows[state].to_pylist(), np.float32),
                           action=np.array(rows[action].to_pylist(), np.float32))


def _lerobot_tasks(folder: Path) -> dict[int, str]:
    """task_index → instruction: meta/tasks.jsonl (v2), meta/tasks.parquet (v3)."""
    import pyarrow.parquet as pq

    if (lines := folder / "meta" / "tasks.jsonl").is_file():
        with _reading(lines):
            return {row["task_index"]: row["task"] for row in map(json.loads, filter(str.strip, lines.read_text().splitlines()))}
    if not (table := folder / "meta" / "tasks.parquet").is_file():
        raise EnvError(f"{folder} lacks meta/tasks.jsonl (v2) and meta/tasks.parquet (v3)")
    with _reading(table):
        columns = pq.read_table(table).to_pydict()
        text = next((name for name in columns if name != "task_index"), None)  # pandas' index, whose name varies
        return dict(zip(columns["task_index"], columns.get(text, ())))


def _picture(cell: dict | None, folder: Path) -> np.ndarray:
    """A PNG or JPEG inside a parquet cell, or the file it names."""
    import imageio.v3 as iio

    if not cell or not (cell.get("bytes") or cell.get("path")):
        raise ValueError("a row has no picture")
    return iio.imread(io.BytesIO(cell["bytes"]) if cell.get("bytes") else folder / cell["path"], plugin="pillow", mode="RGB")


class _Videos:
    """Videos of a LeRobot dataset: one per episode and camera (v2), or long ones of which episodes are pieces (v3).

    Each camera's file stays open and is read forwards, since the episodes of a long one follow one another.
    """

    def __init__(self, folder: Path, info: dict, pieces: bool):
        self.folder, self.info, self.pieces = folder, info, pieces
        self.places: dict[int, dict] = {}  # v3: episode_index → its row in meta/episodes
        self.open: dict[str, tuple[Path, Iterator[np.ndarray], int]] = {}  # camera → file, its frames, number of the next one
        if pieces:
            import pyarrow.parquet as pq

            for file in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
                with _reading(file):
                    self.places |= {row["episode_index"]: row for row in pq.read_table(file).to_pylist()}

    def read(self, camera: str, episode: int, length: int) -> np.ndarray:
        """The `length` frames (T, H, W, 3) of an episode."""
        import imageio.v3 as iio

        keys, first = dict(episode_chunk=episode // self.info.get("chunks_size", 1000), episode_index=episode), 0
        if self.pieces:
            if episode not in self.places:
                raise EnvError(f"{self.folder} lacks episode {episode} in meta/episodes/**/*.parquet")
            with _reading(f"{self.folder}/meta, of episode {episode},"):
                place = {name: self.places[episode][f"videos/{camera}/{name}"]
                         for name in ("chunk_index", "file_index", "from_timestamp")}
                keys, first = place, round(place.pop("from_timestamp") * self.info["fps"])
        if not self.info.get("video_path"):
            raise EnvError(f"{self.folder}/meta/info.json lacks video_path")
        with _reading(f"{self.folder}/meta/info.json, video_path,"):
            file = self.folder / self.info["video_path"].format(video_key=camera, **keys)
        if not file.is_file():
            raise EnvError(f"{self.folder} lacks the video {file.relative_to(self.folder)}")
        opened, frames, position = self.open.get(camera, (None, iter(()), 0))
        if opened != file or first < position:
            frames, position = iter(iio.imiter(file, plugin="FFMPEG")), 0
        with _reading(file):
            piece = list(itertools.islice(frames, first - position, first - position + length))
        if len(piece) < length:
            raise EnvError(f"{file} has {len(piece)} frames of episode {episode}, its data {length}")
        self.open[camera] = file, frames, first + length
        return np.stack(piece)
