"""Demonstrations as users have them, read into `envs.demos.Demos`: LIBERO and ManiSkill HDF5, LeRobot datasets, this project's own.

    read("demos/PickCube-v1-state-32-noise0.5.h5")         # envs/demos.py
    read("libero_object")                                  # a folder of LIBERO's *_demo.hdf5, or one such file
    read("trajectory.rgb.pd_ee_delta_pose.physx_cpu.h5")   # ManiSkill's RecordEpisode, with the .json beside it
    read("lerobot/libero")                                 # a LeRobot dataset folder, v2.0 to v3.0

The layout is recognised by what is in the file. What a file says of itself (numbers of episodes and rows, times of pictures,
success) is compared with what is read, and a difference is an error. Pictures, shrunk to `image_size` while they are read, lie in
an unnamed temporary file (in `TMPDIR`) that is mapped into memory, so they may be more than fit there; all else is held in memory.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from pi_stepnft.envs import demos, reading
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.simulators import simulator

LIBERO_CAMERAS = "agentview_rgb", "eye_in_hand_rgb"
LIBERO_STATE = "ee_pos", "ee_ori", "gripper_states"
"""openpi's state for LIBERO: position (3), axis-angle (3), gripper (2)"""


def read(
    path: str | Path, *, obs_mode: str = "rgb", rotate: bool | None = None, image_size: int | None = None,
    cameras: Sequence[str] | None = None, **expected: str,
) -> demos.Demos:
    """Read every successful demonstration of a file or folder.

    obs_mode: "rgb", or "state" to leave the pictures away.
    rotate: turn pictures by 180°. Default: those of LIBERO's HDF5 files alone, which hold what MuJoCo renders, upside down; LeRobot
        versions of LIBERO are mostly turned already (openpi's are).
    image_size: longer side of the pictures in memory, px; smaller ones stay as they are. Default: as stored. Cameras of different
        sizes all become squares of this size, padded with black.
    cameras: names of those to read, in order. Default: all but LeRobot's depth maps, those on a wrist last.
    expected: what a file must be of if it tells, e.g. env_id="PickCube-v1".

    Raises EnvError, in one line, that names the file and what it lacks.
    """
    path = Path(path)
    if not path.exists():
        raise EnvError(f"no demonstration file at {path}")
    options = dict(rotate=rotate, cameras=() if obs_mode == "state" else cameras)
    how = dict(rotate=bool(rotate), image_size=image_size, expected=expected | dict(obs_mode=obs_mode))
    data = demos.Demos(**reading.gather(episodes, path, options, **how))
    if obs_mode == "rgb" and not data.image.shape[1]:
        raise EnvError(f"{path} holds no pictures: record it with some, or train without, in obs mode 'state'")
    if None in data.instructions:  # ManiSkill's files hold none
        env_id = data.attrs["env_id"].rpartition(":")[2]  # no file makes this program import a module
        data.instructions = [simulator(env_id).instruction(env_id)]
    return data


def episodes(path: Path, rotate: bool | None, cameras: Sequence[str] | None) -> Iterator[dict | None]:
    """What `reading.join` takes, in the child process: episodes, and None for each that is marked as a failure."""
    if (path / "meta" / "info.json").exists():
        yield from _lerobot(path, cameras)
        return
    files = sorted([*path.glob("*.hdf5"), *path.glob("*.h5")]) if path.is_dir() else [path]
    if not files:
        raise EnvError(f"{path} holds neither meta/info.json (LeRobot) nor *.hdf5 or *.h5 files (LIBERO, ManiSkill)")
    for file in files:
        with reading.hdf5(file) as opened:
            if reading.attribute(opened, "format") == demos.FORMAT:
                yield from demos.episodes(file, cameras)
            elif reading.has(opened, "data"):
                yield from _libero(reading.member(opened, "data"), file, rotate is None, cameras)
            elif reading.numbered(opened, "traj_"):
                yield from _maniskill(opened, file, cameras)
            else:
                raise EnvError(f"{file} holds neither /data (LIBERO) nor /traj_0 (ManiSkill), and its format is not "
                               f"{demos.FORMAT!r}")


# ------------------------------------------------------------------------------------------------------ LIBERO and ManiSkill


def _libero(data: h5py.Group, file: Path, rotate: bool, cameras: Sequence[str] | None) -> Iterator[dict]:
    """`/data/demo_<i>/{actions, obs/…}` with the instruction in the attribute `problem_info`."""
    place = f"{file}, attribute 'problem_info' of /data,"
    with reading.naming(place):
        info = json.loads(reading.attribute(data, "problem_info") or "{}")
    told = info.get("language_instruction") if isinstance(info, dict) else None
    if not told or not all(isinstance(part, str) for part in told):
        raise EnvError(f"{file} lacks the instruction: no 'language_instruction' in the attribute 'problem_info' of /data")
    for _, demo in reading.members(data, reading.numbered(data, "demo_")):
        obs, action = reading.member(demo, "obs"), reading.array(demo, "actions")
        if (rows := reading.attribute(demo, "num_samples")) not in (None, len(action)):
            raise EnvError(f"{file}: {demo.name} has {len(action)} actions, its attribute 'num_samples' says {rows}")
        image = {camera: reading.array(obs, camera) for camera in (LIBERO_CAMERAS if cameras is None else cameras)}
        with reading.naming(f"{file}, {obs.name},"):
            state = np.concatenate([reading.array(obs, part) for part in LIBERO_STATE], 1)
        yield dict(image={camera: x[:, ::-1, ::-1] for camera, x in image.items()} if rotate else image, state=state, action=action,
                   instruction="".join(told).strip().strip('"').lower())


def _maniskill(opened: h5py.File, file: Path, cameras: Sequence[str] | None) -> Iterator[dict | None]:
    """`/traj_<i>/{actions, obs/…, success}`; observations have one row more than actions. The .json names task and control mode,
    and tells of each episode its length and success."""
    sidecar = file.with_suffix(".json")
    if not sidecar.exists():
        raise EnvError(f"{file} lacks its description {sidecar.name}, which ManiSkill writes beside it")
    described = reading.load_json(sidecar)
    info = reading.entry(described, "env_info", dict, sidecar, {})
    env_id = reading.entry(info, "env_id", str, f"{sidecar}: env_info")
    mode = reading.entry(reading.entry(info, "env_kwargs", dict, sidecar, {}), "control_mode", str, sidecar, None)
    replayed = "pd_ee_delta_pose" if mode == "pd_joint_pos" else mode  # ManiSkill converts from no other into that
    advice = (f": record observations with python -m mani_skill.trajectory.replay_trajectory --traj-path {file} "
              f"-o rgb{f' -c {replayed}' if replayed else ''} --save-traj")
    attrs = dict(env_id=env_id) | ({"control_mode": mode} if mode else {})
    trajectories, told = reading.numbered(opened, "traj_"), {}
    if (listed := reading.entry(described, "episodes", list, sidecar, None)) is not None:
        for row in listed:
            if not isinstance(row, dict):
                raise EnvError(f"{sidecar}: episodes must be JSON objects, not {row!r:.40}")
            told[f"traj_{reading.entry(row, 'episode_id', int, f'{sidecar}: episodes')}"] = row
        if told.keys() != set(trajectories) or len(told) != len(listed):
            raise EnvError(f"{sidecar} describes {len(listed)} episodes, not the {len(trajectories)} of {file.name}: one of the "
                           "two is incomplete")
    for name, trajectory in reading.members(opened, trajectories):
        row = told.get(name, {})
        action = reading.array(trajectory, "actions", advice)
        if (steps := reading.entry(row, "elapsed_steps", int, f"{sidecar}: episodes", len(action))) != len(action):
            raise EnvError(f"{file}: {name} has {len(action)} actions, {sidecar.name} says {steps}")
        if not reading.entry(row, "success", (bool, int), sidecar, True) or (
            reading.has(trajectory, "success") and not reading.array(trajectory, "success").any()
        ):
            yield None
            continue
        if isinstance(obs := reading.member(trajectory, "obs", advice), h5py.Dataset):  # obs_mode "state"
            image, state = {}, reading.array(trajectory, "obs")[:-1]
        else:
            sensors = reading.member(obs, "sensor_data") if reading.has(obs, "sensor_data") else {}
            names = reading.pick(list(sensors), cameras, file)
            image = {camera: reading.array(reading.member(sensors, camera), "rgb", advice)[:-1] for camera in names}
            groups = [reading.member(obs, name) for name in ("agent", "extra") if reading.has(obs, name)]
            parts = [part for group in groups for part in reading.arrays(group)]
            if not parts:
                raise EnvError(f"{file} lacks {obs.name}/agent{advice}")
            state = np.concatenate([part.reshape(len(part), -1)[:-1] for part in parts], 1)
        yield dict(image=image, state=state, action=action, attrs=attrs, instruction=None)


# ----------------------------------------------------------------------------------------------------------------- LeRobot


def _lerobot(folder: Path, chosen: Sequence[str] | None) -> Iterator[dict | None]:
    """Frames from data/**/*.parquet; pictures from there too, or from videos/; tasks and videos' places from meta/."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise EnvError("LeRobot datasets need pyarrow: pip install pyarrow") from None
    meta = folder / "meta" / "info.json"
    info = reading.load_json(meta)
    version = reading.entry(info, "codebase_version", str, meta, "").removeprefix("v")
    if version.split(".")[0] not in ("2", "3"):
        raise EnvError(f"{folder} is a LeRobot dataset of version {version or 'unknown'}; v2.0 to v3.0 can be read")
    features = reading.entry(info, "features", dict, meta)
    types = {name: reading.entry(feature, "dtype", str, f"{meta}: {name}", "") for name, feature in features.items()
             if isinstance(feature, dict)}

    def one_of(*names: str) -> str:
        found = next((name for name in names if name in types), None)
        if found is None:
            raise EnvError(f"{meta} lacks the feature {' or '.join(names)}")
        return found

    state, action = one_of("observation.state", "state"), one_of("action", "actions")
    known = [name for name, kind in types.items() if kind in ("image", "video")]
    cameras = reading.pick([name for name in known if chosen is not None or not _is_depth(features[name])], chosen, folder)
    filmed = [name for name in cameras if types[name] == "video"]
    columns = ["episode_index", "frame_index", "task_index", state, action, *(name for name in cameras if name not in filmed)]
    if filmed:
        columns.append("timestamp")
    if "next.success" in types:
        columns.append("next.success")
    places = _places(folder) if version.startswith("3") else None
    tasks, videos, seen = _lerobot_tasks(folder), _Videos(folder, info, places), {}
    for file in _data_files(folder, info, places):
        with reading.naming(file):
            missing = set(columns) - set(pq.read_schema(file).names)
            if missing:
                raise EnvError(f"{file} lacks the column {', '.join(sorted(missing))}")
            table = pq.read_table(file, columns=columns).combine_chunks()
            for episode in sorted(set(table["episode_index"].to_pylist())):
                if seen.setdefault(episode, file) != file:
                    raise EnvError(f"episode {episode} is in {seen[episode]} and again in {file}")
                rows = table.filter(pa.compute.equal(table["episode_index"], episode)).sort_by("frame_index")
                if rows["frame_index"].to_pylist() != list(range(len(rows))):
                    raise EnvError(f"{file}: the {len(rows)} rows of episode {episode} are not frames 0 to {len(rows) - 1}")
                success = rows["next.success"].to_pylist() if "next.success" in columns else []
                if any(value is not None for value in success) and not np.any([value for value in success if value is not None]):
                    yield None
                    continue
                told = rows["task_index"].to_pylist()
                if unknown := set(told) - tasks.keys():
                    raise EnvError(f"{folder}/meta lacks the text of task {min(unknown)}")
                image = {}
                for name in cameras:
                    if name in filmed:
                        image[name] = videos.read(name, episode, rows["timestamp"].to_pylist())
                    else:
                        image[name] = np.stack([_picture(cell, folder) for cell in rows[name].to_pylist()])
                yield dict(image=image, instruction=[tasks[task] for task in told],
                           state=np.array(rows[state].to_pylist(), np.float32),
                           action=np.array(rows[action].to_pylist(), np.float32))
    if (total := reading.entry(info, "total_episodes", int, meta, len(seen))) != len(seen):
        raise EnvError(f"{meta} tells of {total} episodes, {len(seen)} are in data/")


def _is_depth(feature: dict) -> bool:
    """Whether a camera measures distances, which are no pictures to a policy."""
    facts = [feature, feature.get("info"), feature.get("video_info")]
    return any(isinstance(fact, dict) and fact.get("video.is_depth_map") is True for fact in facts)


def _rows(file: Path) -> int:
    """How many rows a parquet file has, which must not claim more numbers than so many bytes can hold.

    Runs of equal numbers take next to no room, but no two rows are equal: they have their index.
    """
    import pyarrow.parquet as pq

    with reading.naming(file):
        about = pq.read_metadata(reading.regular(file))
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        numbers = [group.column(i).num_values for group in groups for i in range(group.num_columns)]
        if max(about.num_rows, *numbers, 0) > 64 * file.stat().st_size:
            raise EnvError(f"{file} claims {about.num_rows} rows and {max(numbers, default=0)} numbers in a column, more than it "
                           "can hold: it is damaged")
        return about.num_rows


def _data_files(folder: Path, info: dict, places: dict[int, dict] | None) -> list[Path]:
    """data/**/*.parquet, which must be those, and have as many rows, as meta/ tells.

    places: of v3, `_places`. Where meta/ does not tell, nothing is compared.
    """
    meta = folder / "meta" / "info.json"
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise EnvError(f"{folder} lacks data/**/*.parquet")
    total, template = reading.entry(info, "total_episodes", int, meta, None), reading.entry(info, "data_path", str, meta, None)
    fields = []
    if places is not None:
        fields = [{name: row.get(f"data/{name}") for name in ("chunk_index", "file_index")} for row in places.values()]
    elif total is not None:
        size = max(1, reading.entry(info, "chunks_size", int, meta, 1000))
        fields = [dict(episode_chunk=i // size, episode_index=i) for i in range(min(total, len(files) + 1))]
    if template and fields and None not in fields[0].values():
        named = {reading.filled(folder, template, f"{meta}: data_path", **which) for which in fields}
        if missing := sorted(named - set(files)):
            raise EnvError(f"{folder} lacks {missing[0].relative_to(folder)}: {len(files)} data files are there, and meta/ tells "
                           f"of {len(places or ()) or total} episodes")
        if others := sorted(set(files) - named):
            raise EnvError(f"{others[0]} is none of the data files that meta/ tells of, a copy perhaps: remove it from the folder")
    rows = sum(map(_rows, files))
    if (frames := reading.entry(info, "total_frames", int, meta, rows)) != rows:
        raise EnvError(f"{meta} tells of {frames} frames, data/ has {rows}: it is incomplete, or holds some twice")
    return files


def _lerobot_tasks(folder: Path) -> dict[int, str]:
    """task_index → instruction: meta/tasks.jsonl (v2), meta/tasks.parquet (v3)."""
    import pyarrow.parquet as pq

    if (file := folder / "meta" / "tasks.jsonl").exists():
        with reading.naming(file):
            rows = [json.loads(line) for line in reading.regular(file).read_text().splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise EnvError(f"{file}: each line must be a JSON object")
            tasks = {row["task_index"]: row["task"] for row in rows}
    elif (file := folder / "meta" / "tasks.parquet").exists():
        with reading.naming(file):
            columns = pq.read_table(file).to_pydict() if _rows(file) else {"task_index": []}
            text = next((name for name in columns if name != "task_index"), None)  # pandas' index, whose name varies
            tasks = dict(zip(columns["task_index"], columns.get(text, ())))
    else:
        raise EnvError(f"{folder} lacks meta/tasks.jsonl (v2) and meta/tasks.parquet (v3)")
    for index, text in tasks.items():
        if not isinstance(index, int) or not isinstance(text, str):
            raise EnvError(f"{file}: task {index!r:.40} is {text!r:.40}, not a text with a number")
    return tasks


def _places(folder: Path) -> dict[int, dict]:
    """Of v3: episode_index → its row in meta/episodes, which tells in what files it is, and where in its videos."""
    import pyarrow.parquet as pq

    places: dict[int, dict] = {}
    for file in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        with reading.naming(file):
            names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")] if _rows(file) else []
            for row in pq.read_table(file, columns=names).to_pylist():
                if places.setdefault(row["episode_index"], row) is not row:
                    raise EnvError(f"{file}: episode {row['episode_index']} is described twice")
    return places


def _picture(cell: dict | None, folder: Path) -> np.ndarray:
    """A PNG or JPEG inside a parquet cell, or the file it names."""
    from PIL import Image, UnidentifiedImageError

    reading.alive()
    if not cell or not (cell.get("bytes") or cell.get("path")):
        raise ValueError("a row has no picture")
    if cell.get("bytes"):
        source = io.BytesIO(cell["bytes"])
    else:
        source = reading.regular(reading.inside(folder, cell["path"], "the path of a picture"))
    try:
        opened = Image.open(source, formats=("PNG", "JPEG", "WEBP"))
    except UnidentifiedImageError:
        raise ValueError("a picture is neither PNG, JPEG nor WebP") from None
    with opened as picture:
        if picture.width * picture.height > reading.MAX_PIXELS:
            raise ValueError(f"a picture claims {picture.width} x {picture.height} pixels")
        return np.asarray(picture.convert("RGB"))


class _Videos:
    """Videos of a LeRobot dataset: one per episode and camera (v2), or long ones of which episodes are pieces (v3).

    Each camera's file stays open and is read forwards, since the episodes of a long one follow one another.
    """

    def __init__(self, folder: Path, info: dict, places: dict[int, dict] | None):
        self.folder, self.info, self.places = folder, info, places
        self.open: dict[str, _Video] = {}  # by camera

    def read(self, camera: str, episode: int, times: list[float]) -> np.ndarray:
        """The pictures (T, H, W, 3) of an episode whose rows have these times, s. A picture must be within half an interval of its
        row: rows and pictures are not counted, since either may pause."""
        meta = self.folder / "meta" / "info.json"
        keys: dict[str, int | str] = dict(
            episode_chunk=episode // max(1, reading.entry(self.info, "chunks_size", int, meta, 1000)), episode_index=episode
        )
        first = 0.0
        if self.places is not None:
            if episode not in self.places:
                raise EnvError(f"{self.folder} lacks episode {episode} in meta/episodes/**/*.parquet")
            with reading.naming(f"{self.folder}/meta, of episode {episode},"):
                keys = {name: int(self.places[episode][f"videos/{camera}/{name}"]) for name in ("chunk_index", "file_index")}
                first = float(self.places[episode][f"videos/{camera}/from_timestamp"])
        template, place = reading.entry(self.info, "video_path", str, meta), f"{meta}: video_path"
        file = reading.filled(self.folder, template, place, video_key=camera, **keys)
        if not file.exists():
            raise EnvError(f"{self.folder} lacks the video {file.relative_to(self.folder)}")
        if not 0 < (fps := reading.entry(self.info, "fps", (int, float), meta)) < np.inf:
            raise EnvError(f"{meta}: fps must be greater than 0, not {fps}")
        tolerance = 0.5 / fps
        video = self.open.get(camera)
        if video is None or video.file != file or first + times[0] < video.time - tolerance:
            self.open[camera] = video = _Video(file)
        pictures = []
        for row, time in enumerate(times):
            picture = video.nearest(first + time)
            if not (away := abs(video.time - first - time)) <= 1.001 * tolerance:  # its times are rounded
                raise EnvError(f"{file}: the nearest picture to row {row} of episode {episode} ({first + time:.3f} s) is {away:.3f}"
                               f" s away, more than half an interval at {fps} fps")
            pictures.append(picture)
        return np.stack(pictures)


class _Video:
    """A video that is read forwards, by time."""

    def __init__(self, file: Path):
        self.file, self.frames = file, _frames(reading.regular(file))
        self.time, self.picture = next(self.frames, (np.inf, np.zeros((0, 0, 3), np.uint8)))
        self.ahead = next(self.frames, None)

    def nearest(self, time: float) -> np.ndarray:
        """The picture (H, W, 3) whose time, then `self.time`, is nearest to this one, of those not passed yet."""
        while self.ahead is not None and abs(self.ahead[0] - time) <= abs(self.time - time):
            self.time, self.picture = self.ahead
            self.ahead = next(self.frames, None)
        return self.picture


def _frames(file: Path) -> Iterator[tuple[float, np.ndarray]]:
    """(time in s, picture (H, W, 3)) of all frames that an MP4 file stores: none is added where it pauses."""
    import imageio_ffmpeg

    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), *"-nostdin -hide_banner -nostats -loglevel info -xerror -err_detect explode".split(),
        # No other file, and of this one MP4 alone: other formats can name further files or addresses.
        *f"-copyts -max_pixels {reading.MAX_PIXELS} -protocol_whitelist file -f mov -i".split(), f"file:{file}",
        # s of computing, far more than it takes
        "-timelimit", str(reading.PATIENCE + file.stat().st_size // 10**4),
        *"-map 0:v:0 -vf showinfo -fps_mode passthrough -f image2pipe -c:v ppm pipe:1".split(),
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
        try:
            place, unit = 0, None
            while (kind := process.stdout.readline()) == b"P6\n":
                W, H = map(int, process.stdout.readline().split())
                process.stdout.readline()
                picture = process.stdout.read(3 * H * W)
                if len(picture) < 3 * H * W:
                    break
                reading.alive()
                match = None
                while not match:  # showinfo wrote of this frame before ffmpeg sent it
                    text = os.pread(log.fileno(), 1 << 16, place)
                    unit = unit or re.search(rb"config in time_base: (\d+)/(\d+)", text)
                    match = re.search(rb"\] n: *\d+ pts: *(-?\d+|NOPTS) ", text)
                    place += match.end() if match else max(0, len(text) - 200)
                    if not match and len(text) < 1 << 16:
                        raise EnvError(f"{file} has a frame without a time")
                if match[1] == b"NOPTS":
                    raise EnvError(f"{file} has a frame without a time")
                yield int(match[1]) * int(unit[1]) / int(unit[2]), np.frombuffer(picture, np.uint8).reshape(H, W, 3)
            process.stdout.close()
            if process.wait() or kind:
                end = os.pread(log.fileno(), 1 << 16, max(0, os.fstat(log.fileno()).st_size - (1 << 16)))
                lines = [line for line in end.decode(errors="replace").splitlines() if "rror" in line or "nvalid" in line]
                reason = re.sub(r"^(\[[^]]*\] ?)+", "", lines[0]) if lines else f"ffmpeg ended with {process.returncode}"
                raise EnvError(f"{file} cannot be decoded: {reason}")
        finally:
            process.kill()
            process.wait()
