"""Demonstrations in the formats that users have: small files are written as those formats say, and read back."""

import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from test_main import refusal, run

from pi_stepnft import envs, policies
from pi_stepnft.algos import sft
from pi_stepnft.envs import datasets, demos, reading

SIZE, LENGTHS = 32, (5, 3)
TEXTS = "pick up the bowl", "open the drawer"


def make_episodes() -> list[dict]:
    """Two episodes of two cameras, each picture a plain ramp that no codec distorts much and no flip leaves as it was."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 200, SIZE).astype(np.uint8)
    return [
        dict(
            image=np.stack([np.stack([np.clip(np.tile(ramp[:, None, None], (1, SIZE, 3)) + 4 * t + 20 * c, 0, 255).astype(np.uint8)
                                      for c in range(2)]) for t in range(T)]),  # (T, 2, H, W, 3)
            state=rng.standard_normal((T, 8)).astype(np.float32), action=rng.uniform(-1, 1, (T, 7)).astype(np.float32), text=text,
        )
        for T, text in zip(LENGTHS, TEXTS)
    ]


@pytest.fixture
def episodes() -> list[dict]:
    return make_episodes()


def same(data: demos.Demos, episodes: list[dict], texts=TEXTS, tolerance: float = 0) -> None:
    """The data are these episodes, pictures within `tolerance` grey levels on average."""
    assert data.start.tolist() == [0, LENGTHS[0]]
    for name in ("state", "action"):
        np.testing.assert_array_equal(getattr(data, name), np.concatenate([e[name] for e in episodes]))
    pictures = np.concatenate([e["image"] for e in episodes])
    assert data.image.dtype == np.uint8 and data.image.shape == pictures.shape
    assert np.abs(data.image.astype(float) - pictures).mean() <= tolerance
    assert data.text(np.array([0, 4, 5, 7])) == [texts[0], texts[0], texts[1], texts[1]]


def write_libero(file: Path, episodes: list[dict], text: str) -> None:
    with h5py.File(file, "w") as opened:
        data = opened.create_group("data")
        data.attrs["problem_info"] = json.dumps(dict(problem_name="libero", language_instruction=text))
        for i, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = episode["action"].astype(np.float64)
            for j, name in enumerate(datasets.LIBERO_CAMERAS):
                demo[f"obs/{name}"] = episode["image"][:, j, ::-1, ::-1]
            for name, part in zip(datasets.LIBERO_STATE, np.split(episode["state"].astype(np.float64), [3, 6], 1)):
                demo[f"obs/{name}"] = part


def write_maniskill(file: Path, episodes: list[dict], obs_mode: str, success=(True, True)) -> None:
    description = dict(
        env_info=dict(env_id="PickCube-v1", env_kwargs=dict(obs_mode=obs_mode, control_mode="pd_ee_delta_pose")),
        episodes=[dict(episode_id=i, elapsed_steps=len(e["action"]), success=success[i]) for i, e in enumerate(episodes)],
    )
    file.with_suffix(".json").write_text(json.dumps(description))
    after = lambda x: np.concatenate([x, x[-1:]])  # observations have one row more
    with h5py.File(file, "w", track_order=True) as opened:
        for i, episode in enumerate(episodes):
            trajectory = opened.create_group(f"traj_{i}", track_order=True)
            trajectory["actions"] = episode["action"]
            trajectory["success"] = np.arange(len(episode["action"])) >= len(episode["action"]) - success[i]
            if obs_mode == "state":
                trajectory["obs"] = after(episode["state"])
            elif obs_mode == "rgb":
                obs = trajectory.create_group("obs", track_order=True)
                for name in ("agent", "extra"):
                    obs.create_group(name, track_order=True)
                state = after(episode["state"])
                obs["agent/qpos"], obs["agent/qvel"] = state[:, :3], state[:, 3:6]
                obs["extra/tcp"], obs["extra/is_grasped"] = state[:, 6:7], state[:, 7]  # not in the order of the alphabet
                for j, camera in enumerate(("base_camera", "hand_camera")):
                    obs[f"sensor_data/{camera}/rgb"] = after(episode["image"][:, j])


def write_own(file: Path, episodes: list[dict]) -> None:
    with h5py.File(file, "w") as opened:
        opened.attrs.update(format=demos.FORMAT, env_id="PickCube-v1", obs_mode="rgb", instruction="", cameras=["base", "hand"])
        for i, episode in enumerate(episodes):
            group = opened.create_group(f"episode_{i}")
            group.attrs.update(steps=len(episode["action"]), instruction=episode["text"])
            for name in ("image", "state", "action"):
                group[name] = episode[name]
            group["objects"] = episode["state"][:, None, :3]


KEYS = "observation.images.front", "observation.images.wrist"


def write_lerobot(folder: Path, episodes: list[dict], version: str, pictures: str, keys=KEYS) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    three = version.startswith("v3")
    info = dict(
        codebase_version=version, fps=10, chunks_size=1000,
        features={key: dict(dtype=pictures) for key in keys}
        | {"observation.state": dict(dtype="float32"), "action": dict(dtype="float32")},
        total_episodes=len(episodes), total_frames=sum(len(episode["action"]) for episode in episodes),
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet" if three
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if three
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    tables, meta, first = [], [], 0
    for i, episode in enumerate(episodes):
        T = len(episode["action"])
        columns = dict(episode_index=[i] * T, frame_index=range(T), task_index=[i] * T, timestamp=[t / 10 for t in range(T)])
        columns |= {"observation.state": list(episode["state"]), "action": list(episode["action"])}
        if pictures == "image":
            cell = lambda image: dict(bytes=iio.imwrite("<bytes>", image, extension=".png"), path="")
            columns |= {key: list(map(cell, episode["image"][:, j])) for j, key in enumerate(keys)}
        tables.append(pa.table({name: list(values) for name, values in columns.items()}))
        place = dict(chunk_index=0, file_index=0, from_timestamp=first / 10)
        meta.append({"episode_index": i, "data/chunk_index": 0, "data/file_index": 0}
                    | {f"videos/{key}/{name}": value for key in keys for name, value in place.items()})
        first += T
    files = {f"data/chunk-000/episode_{i:06d}.parquet": table for i, table in enumerate(tables)}
    if three:
        files = {
            "data/chunk-000/file-000.parquet": pa.concat_tables(tables),
            "meta/episodes/chunk-000/file-000.parquet": pa.Table.from_pylist(meta),
            "meta/tasks.parquet": pa.table(dict(task_index=[0, 1], __index_level_0__=list(TEXTS))),
        }
    for name, table in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)
    (folder / "meta").mkdir(exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    if not three:
        lines = (json.dumps(dict(task_index=i, task=text)) for i, text in enumerate(TEXTS))
        (folder / "meta" / "tasks.jsonl").write_text("\n".join(lines))
    if pictures == "video":
        for j, key in enumerate(keys):
            clips = {i: episode["image"][:, j] for i, episode in enumerate(episodes)}
            for i, clip in ({0: np.concatenate(list(clips.values()))} if three else clips).items():
                file = folder / info["video_path"].format(
                    video_key=key, chunk_index=0, file_index=0, episode_chunk=0, episode_index=i
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                iio.imwrite(file, clip, fps=10, macro_block_size=1, quality=10)


def edit(file: Path, **columns: list) -> None:
    """Put these columns into a parquet file, in place of those of the same name."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, file)


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal_of(path: Path, **expected: str) -> str:
    """The one line about what cannot be read, in this process: what crashes is tested once, and a process takes half a second."""
    with pytest.raises(envs.EnvError) as error, reading.naming(path):
        files = {name: io.BytesIO() for name in reading.COLUMNS}
        reading.join(path, datasets.episodes(path, None, None), files, expected=expected)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_libero(tmp_path, episodes):
    for i, (episode, text) in enumerate(zip(episodes, TEXTS)):
        write_libero(tmp_path / f"{i}_demo.hdf5", [episode], text)
    same(datasets.read(tmp_path), episodes)
    one = datasets.read(tmp_path / "1_demo.hdf5", rotate=False)
    assert one.text(np.arange(1)) == [TEXTS[1]]
    np.testing.assert_array_equal(one.image[:, :, ::-1, ::-1], episodes[1]["image"])


def test_maniskill(tmp_path, episodes):
    text = envs.simulator("PickCube-v1").instruction("PickCube-v1")
    write_maniskill(tmp_path / "t.h5", episodes, "rgb")
    data = datasets.read(tmp_path / "t.h5", env_id="PickCube-v1")
    assert len(datasets.read(tmp_path / "t.h5", env_id="my_module:PickCube-v1").start) == len(data.start)  # as it is trained on
    same(data, episodes, (text, text))
    assert data.attrs["control_mode"] == "pd_ee_delta_pose"
    write_maniskill(tmp_path / "t.h5", episodes, "state", success=(False, True))
    failures_left_out = datasets.read(tmp_path / "t.h5", obs_mode="state")
    np.testing.assert_array_equal(failures_left_out.state, episodes[1]["state"])
    assert failures_left_out.image.shape[1] == 0


@pytest.mark.parametrize("pictures, tolerance", [("image", 0), ("video", 3)])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot(version, pictures, tolerance, tmp_path, episodes):
    write_lerobot(tmp_path, episodes, version, pictures)
    same(datasets.read(tmp_path), episodes, tolerance=tolerance)
    turned = datasets.read(tmp_path, rotate=True, image_size=SIZE // 2)
    assert turned.image.shape[2:] == (SIZE // 2, SIZE // 2, 3)
    assert turned.image[0, 0, 0].mean() > turned.image[0, 0, -1].mean()  # the ramp rises downwards, and upwards when turned


def test_lerobot_vectors_of_one_dimension_and_episodes_in_any_order(tmp_path, episodes):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_lerobot(tmp_path, episodes, "v3.0", "video")
    file = tmp_path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    gain = np.arange(8, dtype=np.float32)
    table = table.set_column(table.schema.get_field_index("action"), "action", pa.array(gain))  # stored as numbers, not lists
    pq.write_table(table.slice(LENGTHS[0]), file)  # the later episode is read first, so the video starts again
    pq.write_table(table.slice(0, LENGTHS[0]), file.with_name("file-001.parquet"))
    edit(tmp_path / "meta/episodes/chunk-000/file-000.parquet", **{"data/file_index": [1, 0]})
    data = datasets.read(tmp_path)
    assert data.action.tolist() == [[x] for x in [5, 6, 7, 0, 1, 2, 3, 4]] and data.chunks(2).shape == (8, 2, 1)
    assert np.abs(data.image[:3].astype(float) - episodes[1]["image"]).mean() <= 3
    assert np.abs(data.image[3:].astype(float) - episodes[0]["image"]).mean() <= 3


@pytest.mark.parametrize(
    "mode, replayed", [("pd_joint_pos", "pd_ee_delta_pose"), ("pd_ee_delta_pose", "pd_ee_delta_pose"), ("pd_joint_delta_pos",) * 2]
)
def test_replay_is_advised_in_a_control_mode_that_maniskill_can_convert_to(mode, replayed, tmp_path, episodes):
    write_maniskill(tmp_path / "t.h5", episodes, "none")
    description = tmp_path / "t.json"
    description.write_text(description.read_text().replace("pd_ee_delta_pose", mode))
    with pytest.raises(envs.EnvError, match=f"lacks /traj_0/obs: .* -c {replayed} --save-traj$"):
        datasets.read(tmp_path / "t.h5")


def test_cameras_of_different_sizes(tmp_path, episodes):
    write_libero(tmp_path / "t.h5", episodes, TEXTS[0])
    wide = episodes[0]["image"][:, 1, ::2]
    with h5py.File(tmp_path / "t.h5", "a") as opened:
        for i in range(2):
            del opened[f"data/demo_{i}/obs/eye_in_hand_rgb"]
            opened[f"data/demo_{i}/obs/eye_in_hand_rgb"] = wide[: LENGTHS[i], ::-1, ::-1]
    with pytest.raises(envs.EnvError, match=r"\(16, 32\) and \(32, 32\)"):
        datasets.read(tmp_path / "t.h5")
    for size in (24, 48):  # what the processor would make of each camera by itself
        image = datasets.read(tmp_path / "t.h5", image_size=size).image
        for camera, pictures in enumerate((episodes[0]["image"][:, 0], wide)):
            fitted = policies.processor.resize_with_padding(torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2), size)
            apart = image[: LENGTHS[0], camera].astype(int) - fitted.permute(0, 2, 3, 1).numpy()
            assert np.abs(apart).max() <= 1  # rounding


def test_without_pyarrow(tmp_path, episodes, monkeypatch):
    write_lerobot(tmp_path, episodes, "v2.1", "image")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(envs.EnvError, match="pip install pyarrow"):
        next(datasets.episodes(tmp_path, None, None))


def test_what_follows_an_episode():
    arrays = dict(image=np.zeros((3, 0, 0, 0, 3), np.uint8), state=np.zeros((3, 1)), objects=np.zeros((3, 0, 3)))
    data = demos.Demos(**arrays, action=np.array([[1.0, 1], [2, -1], [3, 1]]), start=np.array([0, 2]), attrs={},
                      instructions=["go"], told=np.zeros(3, np.int32))
    assert data.chunks(2)[1].tolist() == [[2, -1], [0, -1]]
    assert data.chunks(2, absolute=True)[1].tolist() == [[2, -1], [2, -1]]


@pytest.mark.parametrize(
    "spoil, named",
    [
        ("empty folder", "neither meta/info.json"),
        ("other hdf5", "neither /data (LIBERO) nor /traj_0"),
        ("no camera", "eye_in_hand_rgb"),
        ("no instruction", "language_instruction"),
        ("no observations", "replay_trajectory"),
        ("no description", "t.json"),
        ("another task", "'PickCube-v1', not 'StackCube-v1'"),
        ("only failures", "no successful episode"),
        ("a video is missing", "lacks the video"),
        ("no action", "action or actions"),
        ("old version", "version 1.6"),
        ("truncated", "cannot be read"),
        ("NaN", "NaN"),
        ("float pictures", "float64"),
        ("two tasks", "mixes env_id"),
        ("damaged parquet", "episode_000000.parquet cannot be read"),
        ("damaged info", "info.json cannot be read"),
        ("damaged picture", "episode_000000.parquet cannot be read"),
        ("no places of videos", "lacks episode 0 in meta/episodes"),
        ("fewer frames", "the nearest picture to row 3 of episode 0 (0.300 s) is 0.100 s away"),
    ],
)
def test_what_a_file_lacks_is_named_in_one_line(spoil, named, tmp_path, episodes):
    path, expected = tmp_path / "t.h5", {}
    if spoil == "other hdf5":
        h5py.File(path, "w").close()
    elif spoil in ("no camera", "no instruction", "truncated", "NaN", "float pictures"):
        if spoil == "NaN":
            episodes[0]["action"][1, 2] = np.nan
        write_libero(path, episodes, TEXTS[0])
        if spoil == "truncated":
            path.write_bytes(path.read_bytes()[:3000])
        else:
            with h5py.File(path, "a") as opened:
                if spoil == "no camera":
                    del opened["data/demo_1/obs/eye_in_hand_rgb"]
                elif spoil == "no instruction":
                    del opened["data"].attrs["problem_info"]
                elif spoil == "float pictures":
                    del opened["data/demo_0/obs/agentview_rgb"]
                    opened["data/demo_0/obs/agentview_rgb"] = episodes[0]["image"][:, 0] / 255
    elif spoil == "two tasks":
        path = tmp_path
        for name, env_id in dict(a="PickCube-v1", b="StackCube-v1").items():
            write_maniskill(path / f"{name}.h5", episodes, "rgb")
            description = path / f"{name}.json"
            description.write_text(description.read_text().replace("PickCube-v1", env_id))
    elif spoil in ("damaged parquet", "damaged info", "damaged picture", "no places of videos", "fewer frames"):
        path = tmp_path / "lerobot"
        write_lerobot(path, episodes, *{"damaged picture": ("v2.1", "image"), "no places of videos": ("v3.0", "video")}.get(
            spoil, ("v2.1", "video")))
        file = path / "data/chunk-000/episode_000000.parquet"
        if spoil == "damaged parquet":
            file.write_bytes(file.read_bytes()[:100])
        elif spoil == "damaged info":
            (path / "meta/info.json").write_text("{")
        elif spoil == "damaged picture":
            content = file.read_bytes()
            file.write_bytes(content.replace(b"\x89PNG", b"\x00\x00\x00\x00"))
        elif spoil == "no places of videos":
            shutil.rmtree(path / "meta/episodes")
        else:
            for key in ("front", "wrist"):
                video = path / f"videos/chunk-000/observation.images.{key}/episode_000000.mp4"
                iio.imwrite(video, episodes[0]["image"][:3, 0], fps=10, macro_block_size=1)
    elif spoil in ("a video is missing", "no action", "old version"):
        path = tmp_path / "lerobot"
        write_lerobot(path, episodes, "v2.1", "video")
        info = json.loads((path / "meta" / "info.json").read_text())
        if spoil == "a video is missing":
            next(path.rglob("*wrist/*.mp4")).unlink()
        elif spoil == "no action":
            del info["features"]["action"]
        else:
            info["codebase_version"] = "v1.6"
        (path / "meta" / "info.json").write_text(json.dumps(info))
    elif spoil == "empty folder":
        path = tmp_path
    else:
        mode = "none" if spoil == "no observations" else "rgb"
        write_maniskill(path, episodes, mode, success=(spoil != "only failures",) * 2)
        if spoil == "no description":
            path.with_suffix(".json").unlink()
        expected = dict(env_id="StackCube-v1") if spoil == "another task" else {}
    assert named in refusal_of(path, **expected)


def test_pictures_are_asked_for_where_there_are_none(tmp_path, episodes):
    write_maniskill(tmp_path / "t.h5", episodes, "state")
    with pytest.raises(envs.EnvError, match="holds no pictures"):
        datasets.read(tmp_path / "t.h5")


# ------------------------------------------------------------------ what a file says of itself is compared with what is in it


def write(layout: str, path: Path, episodes: list[dict]) -> Path:
    """Small demonstrations of that layout; returns what is to be read."""
    if layout in ("image", "video"):
        write_lerobot(path, episodes, "v2.1", layout)
        return path
    writer = dict(libero=lambda file: write_libero(file, episodes, TEXTS[0]), own=lambda file: write_own(file, episodes),
                  maniskill=lambda file: write_maniskill(file, episodes, "rgb"))[layout]
    writer(path / "t.h5")
    return path / "t.h5"


FIRST, SECOND = (f"data/chunk-000/episode_00000{i}.parquet" for i in (0, 1))
INFO = "meta/info.json"
VIDEO = "videos/chunk-000/observation.images.front/episode_000000.mp4"


def put(path: Path, name: str, value) -> None:
    """Replace a dataset of an HDF5 file."""
    with h5py.File(path, "a") as opened:
        del opened[name]
        opened[name] = value


def mark(path: Path, name: str, **attributes) -> None:
    with h5py.File(path, "a") as opened:
        opened[name].attrs.update(attributes)


def become(file: Path, kind: str) -> None:
    file.unlink()
    dict(pipe=os.mkfifo, folder=Path.mkdir, device=lambda it: it.symlink_to("/dev/zero"))[kind](file)


def virtual(path: Path) -> None:
    layout = h5py.VirtualLayout((5, 7), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "x", (5, 7))
    with h5py.File(path, "a") as opened:
        del opened["data/demo_0/actions"]
        opened["data/demo_0"].create_virtual_dataset("actions", layout)


def huge(path: Path) -> None:
    with h5py.File(path, "a") as opened:
        del opened["data/demo_0/actions"]
        opened["data/demo_0"].create_dataset("actions", (10**12, 7), np.float32, chunks=(10, 7), compression="gzip")


def endless(path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(dict(frame_index=np.zeros(10**7, int))), path / FIRST)  # a run of equal numbers takes next to no room


@pytest.mark.parametrize(
    "layout, spoil, named",
    [
        # numbers of episodes and rows
        ("image", lambda d: (d / SECOND).unlink(), f"lacks {SECOND}: 1 data files are there, and meta/ tells of 2 episodes"),
        ("image", lambda d: shutil.copy(d / FIRST, d / "data/copy (1).parquet"), "copy (1).parquet is none of the data files"),
        ("image", lambda d: edit_json(d / INFO, total_frames=9), "tells of 9 frames, data/ has 8"),
        ("image", lambda d: edit_json(d / INFO, total_episodes=3, data_path=None), "tells of 3 episodes, 2 are in data/"),
        ("image", lambda d: edit(d / SECOND, episode_index=[0] * 3), "episode 0 is in"),
        ("image", lambda d: edit(d / SECOND, frame_index=[0, 1, 1]), "the 3 rows of episode 1 are not frames 0 to 2"),
        ("image", lambda d: edit(d / SECOND, task_index=[0, 1, 5]), "lacks the text of task 5"),
        ("maniskill", lambda f: edit_json(f.with_suffix(".json"), episodes=[]), "describes 0 episodes, not the 2 of t.h5"),
        ("maniskill", lambda f: edit_json(f.with_suffix(".json"), episodes=[dict(episode_id=i, elapsed_steps=4) for i in (0, 1)]),
         "traj_0 has 5 actions, t.json says 4"),
        ("libero", lambda f: mark(f, "data/demo_0", num_samples=6), "has 5 actions, its attribute 'num_samples' says 6"),
        ("own", lambda f: mark(f, "episode_0", steps=6), "has 5 actions, its attribute 'steps' says 6"),
        ("own", lambda f: h5py.File(f, "a").move("episode_1", "episode_2"), "not episode_0 to episode_1"),
        # places outside the folder
        ("video", lambda d: edit_json(d / INFO, video_path="../{video_key}.mp4"), "video_path leads out of the dataset's folder"),
        ("video", lambda d: edit_json(d / INFO, video_path="{video_key.__class__}"), "video_path may hold {video_key}, "),
        ("video", lambda d: edit_json(d / INFO, video_path="{episode_index:999999999d}"), "video_path may hold {video_key}, "),
        ("video", lambda d: edit_json(d / INFO, data_path="/etc/{episode_index}"), "data_path leads out of the dataset's folder"),
        ("image", lambda d: edit(d / FIRST, **{KEYS[0]: 5 * [dict(bytes=None, path="/etc/passwd")]}), "of a picture leads out"),
        ("libero", lambda f: put(f, "data/demo_0/actions", h5py.ExternalLink("o.h5", "x")), "demo_0/actions is a link"),
        ("libero", virtual, "demo_0/actions lies in another file"),
        # what is not a file
        ("image", lambda d: become(d / INFO, "pipe"), "info.json is not a file"),
        ("image", lambda d: become(d / FIRST, "folder"), "episode_000000.parquet is not a file"),
        ("video", lambda d: become(d / VIDEO, "device"), "episode_000000.mp4 is not a file"),
        ("maniskill", lambda f: become(f.with_suffix(".json"), "device"), "t.json is not a file"),
        # other types
        ("image", lambda d: edit_json(d / INFO, features=[1]), "features must be dict, not [1]"),
        ("image", lambda d: edit_json(d / INFO, features={"state": 1, "action": {"dtype": [1]}}), "dtype must be str, not [1]"),
        ("image", lambda d: edit_json(d / INFO, total_frames=True), "total_frames must be int, not True"),
        ("video", lambda d: edit_json(d / INFO, fps="10"), "fps must be int or float, not '10'"),
        ("video", lambda d: edit_json(d / INFO, fps=0), "fps must be greater than 0, not 0"),
        ("image", lambda d: (d / "meta/tasks.jsonl").write_text("[1]"), "tasks.jsonl: each line must be a JSON object"),
        ("image", lambda d: (d / INFO).write_text("[" * 10**5), "info.json cannot be read"),
        ("maniskill", lambda f: edit_json(f.with_suffix(".json"), episodes=3), "t.json: episodes must be list, not 3"),
        ("libero", lambda f: put(f, "data/demo_0/actions", "text"), "demo_0/actions is not an array of numbers"),
        ("libero", lambda f: put(f, "data/demo_0", 1.0), "/data/demo_0 is not a group"),
        # more than is there
        ("libero", huge, "demo_0/actions claims 28000000.0 MB, more than the file holds"),
        ("image", endless, "episode_000000.parquet claims 10000000 rows"),
        ("video", lambda d: (d / VIDEO).write_bytes((d / VIDEO).read_bytes()[:-200]), "episode_000000.mp4 cannot be decoded"),
    ],
)
def test_what_a_file_says_of_itself_is_not_believed(layout, spoil, named, tmp_path, episodes):
    path = write(layout, tmp_path, episodes)
    spoil(path)
    assert named in refusal_of(path)


def test_a_reader_that_crashes_is_one_line():
    with pytest.raises(envs.EnvError, match=r"is damaged, or .*: reading it crashed \(signal 11, Segmentation fault\)$"):
        reading.gather(ctypes.string_at, 0, {}, expected={})  # reads at address 0


def test_pictures_are_those_of_the_time_of_their_row(tmp_path, episodes):
    """ffmpeg fills a pause of a video with copies of the picture before it, when it is not told otherwise."""
    write_lerobot(tmp_path, episodes[:1], "v2.1", "video")
    clip = np.stack([np.full((SIZE, SIZE, 3), 50 * t, np.uint8) for t in range(5)])
    for key in KEYS:
        file = tmp_path / f"videos/chunk-000/{key}/episode_000000.mp4"
        paused = f"-f rawvideo -s {SIZE}x{SIZE} -r 10 -pix_fmt rgb24 -i - -vf setpts=(N+7*gt(N\\,2))/10/TB -fps_mode vfr"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *f"-v error -y {paused}".split(), file]
        subprocess.run(command, input=clip.tobytes(), check=True)
    assert "the nearest picture to row 3 of episode 0 (0.300 s) is 0.100 s away" in refusal_of(tmp_path)
    edit(tmp_path / FIRST, timestamp=[0, 0.1, 0.2, 1, 1.1])
    data = datasets.read(tmp_path)
    np.testing.assert_allclose(data.image.mean((1, 2, 3, 4)), 50 * np.arange(5), atol=3)


def test_what_is_marked_as_a_failure_is_left_out(tmp_path, episodes):
    write_lerobot(tmp_path, episodes, "v2.1", "image")
    features = json.loads((tmp_path / INFO).read_text())["features"]
    edit_json(tmp_path / INFO, features=features | {"next.success": dict(dtype="bool")})
    edit(tmp_path / FIRST, **{"next.success": [False] * 5})
    edit(tmp_path / SECOND, **{"next.success": [False, False, True]})
    data = datasets.read(tmp_path, obs_mode="state")
    assert data.failed == 1 and data.state.shape == (3, 8) and data.text(np.arange(3)) == [TEXTS[1]] * 3
    edit(tmp_path / SECOND, **{"next.success": [False] * 3})
    assert "holds no successful episode: all 2 are marked as failures" in refusal_of(tmp_path)

    write_maniskill(tmp_path / "t.h5", episodes, "state", success=(False, True))
    with h5py.File(tmp_path / "t.h5", "a") as opened:
        for i in range(2):  # only the description tells
            del opened[f"traj_{i}/success"]
    data = datasets.read(tmp_path / "t.h5", obs_mode="state")
    assert data.failed == 1 and data.state.shape == (3, 8)


def test_each_row_is_told_its_own_instruction(tmp_path, episodes):
    write_lerobot(tmp_path, episodes, "v2.1", "image")
    edit(tmp_path / FIRST, task_index=[0, 0, 1, 1, 0])
    assert datasets.read(tmp_path).text(np.array([7, 2, 4])) == [TEXTS[1], TEXTS[1], TEXTS[0]]
    write_own(tmp_path / "own.h5", episodes)
    for read in (demos.read, datasets.read):
        same(read(tmp_path / "own.h5"), episodes)


def test_cameras_by_name(tmp_path, episodes):
    turned = [dict(episode, image=episode["image"][:, ::-1]) for episode in episodes]
    write_lerobot(tmp_path, turned, "v2.1", "image", keys=KEYS[::-1])
    features = json.loads((tmp_path / INFO).read_text())["features"]
    depth = {"observation.images.depth": dict(dtype="video", info={"video.is_depth_map": True})}
    edit_json(tmp_path / INFO, features=depth | features)
    data = datasets.read(tmp_path)  # what is on the wrist comes last
    assert data.cameras == KEYS and data.match(("agentview", "robot0_eye_in_hand")) and not data.match(("left", "top"))
    same(data, episodes)
    assert data.match(("hand_camera",)) and data.cameras == KEYS[1:]
    np.testing.assert_array_equal(data.image[:5, 0], episodes[0]["image"][:, 1])
    chosen = datasets.read(tmp_path, cameras=("wrist", KEYS[0]))
    assert chosen.cameras == KEYS[::-1]
    np.testing.assert_array_equal(chosen.image[:5], episodes[0]["image"][:, ::-1])
    write_own(tmp_path / "own.h5", episodes)
    for path in (tmp_path, tmp_path / "own.h5"):
        with pytest.raises(envs.EnvError, match="has the cameras .*, not top"):
            datasets.read(path, cameras=["top"])


def test_cameras_that_move_within_a_long_file():
    image = np.arange(600 * 3, dtype=np.uint16).reshape(600, 3, 1, 1, 1).repeat(3, -1)
    data = demos.Demos(image.copy(), *[np.zeros((600, 1))] * 2, np.zeros((600, 0, 3)), np.array([0]), {}, [""], np.zeros(600, int),
                       cameras=("left_rgb", "top_rgb", "hand_rgb"))
    assert data.match(("hand", "left")) and data.cameras == ("hand_rgb", "left_rgb")
    np.testing.assert_array_equal(data.image, image[:, [2, 0]])


def test_sft_from_a_dataset_without_a_simulator(tmp_path, episodes):
    write_lerobot(tmp_path / "data", episodes, "v2.1", "video")
    misfit = refusal("sft", "--dataset", "data", "--num-envs", 1, "--eval-episodes", 1, cwd=tmp_path)
    assert "the demonstrations have" in misfit
    arguments = "--dataset data --steps 2 --batch-size 4 --num-threads 1 --output out --image-size 48 --eval-episodes 0"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run("sft", "--env-id", "libero_object", *arguments.split(), "--cameras", "wrist", "front", cwd=tmp_path)
    assert f"cameras: {KEYS[1]}, {KEYS[0]}\n" in printed.getvalue()
    policy = policies.load(tmp_path / "out")
    assert policy.config.num_cameras == 2 and len(policy.processor.state_stats) == 8 and policy.meta["sft"]["demos"] == 2
    actions = policy.act(dict(image=episodes[0]["image"][:1], state=episodes[0]["state"][:1]), [TEXTS[0]], 1)
    assert actions.shape == (1, sft.Args.horizon, 7)
