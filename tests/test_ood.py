"""Variants on the real simulator: each changes what it says, in the strength it says, and nothing else."""

import pickle
import weakref

import gymnasium as gym
import numpy as np
import pytest

from pi_stepnft import envs
from pi_stepnft.envs import demos, vulkan
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.maniskill import Camera, ManiSkillSpec, randomised, tasks, variants
from pi_stepnft.envs.maniskill import env as maniskill
from pi_stepnft.envs.maniskill.changes import Change
from pi_stepnft.envs.maniskill.cuda import CudaVecEnv

try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)

PICK = "PickCube-v1"
CUBE, GOAL, QPOS = slice(29, 32), slice(26, 29), slice(0, 7)  # in PickCube's state vector of obs_mode "state"


@pytest.fixture(scope="module")
def env():
    """`env(variant, obs_mode)`: PickCube or a variant of it in this process; made once."""
    made = {}

    def make(variant: str = "", obs_mode: str = "state") -> maniskill.ManiSkillEnv:
        key = variant, obs_mode
        if key not in made:
            camera = Camera() if obs_mode == "rgb" else None
            spec = ManiSkillSpec(f"{PICK}/{variant}" if variant else PICK, obs_mode=obs_mode, camera=camera)
            made[key] = maniskill.ManiSkillEnv(pickle.loads(pickle.dumps(spec)))
        return made[key]

    return make


def observe(env: maniskill.ManiSkillEnv) -> tuple[np.ndarray, np.ndarray]:
    """The policy's picture (96, 96, 3) as float and state."""
    image, state = np.zeros((len(env.cameras), 96, 96, 3), np.uint8), np.zeros(env.state_dim, np.float32)
    env.observe(image, state)
    return image.astype(float)[0] if len(image) else image, state


def start(env: maniskill.ManiSkillEnv, seed: int) -> tuple[np.ndarray, np.ndarray]:
    env.reset(seed)
    return observe(env)


def starts(env: maniskill.ManiSkillEnv, count: int = 40) -> np.ndarray:
    """States at the start of the episodes 0, 1, …"""
    return np.stack([start(env, seed)[1] for seed in range(count)])


# -------------------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("env_id", variants.TASKS)
def test_every_task_has_variants_of_every_family_at_two_strengths(env_id):
    ids = variants.variants(env_id)
    families = [variants.family(i) for i in ids]
    assert families == sorted(families, key=["vision", "semantic", "execution"].index) and len(set(families)) == 3
    assert len(set(ids)) == len(ids) and all(i.startswith(f"{env_id}/") for i in ids)
    for mild, strong in zip(ids[::2], ids[1::2], strict=True):
        assert mild[:-1] == strong[:-1] and mild[-1] + strong[-1] == "12"
        assert Change() != variants.find(mild) != variants.find(strong) != Change()
    for i in ids:
        envs.check(i)
        assert i in gym.registry
    assert tasks.registry()[0][env_id].max_episode_steps == 50  # as registered


def test_plain_tasks_have_no_change_and_others_no_variants():
    assert variants.find(PICK) == Change() and variants.task_of(PICK) == PICK
    assert variants.variants("RollBall-v1") == []


@pytest.mark.parametrize(
    ("env_id", "near"),
    [
        (f"{PICK}/vision-table_colour-1", f"{PICK}/vision-table_color-1"),
        (f"{PICK}/vision-table_color-3", f"{PICK}/vision-table_color-2"),
        ("PickCub-v1/vision-table_color-1", PICK),
        ("RollBall-v1/vision-table_color-1", "unknown variant"),
    ],
)
def test_an_unknown_variant_is_told_in_one_line(env_id, near):
    for call in (envs.check, lambda i: envs.make(i, 1, obs_mode="state", backend="cpu")):
        with pytest.raises(EnvError, match=near) as error:
            call(env_id)
        assert "\n" not in str(error.value)
    with pytest.raises(EnvError):
        variants.family(PICK)


def test_gymnasium_makes_variants_too(env):
    made = gym.make(f"{PICK}/execution-robot_pose-2", obs_mode="state", control_mode="pd_ee_delta_pose", render_backend="cpu")
    obs, _ = made.reset(seed=5)
    np.testing.assert_allclose(obs[0, :7], start(env("execution-robot_pose-2"), 5)[1][QPOS], atol=1e-6)
    ends = [bool(made.step(np.zeros(7, np.float32))[3]) for _ in range(50)]
    assert ends == [False] * 49 + [True]
    made.close()


# ----------------------------------------------------------------------------------------------------------------------- vision


@pytest.mark.parametrize("name", variants.VISION)
def test_vision_changes_the_picture_and_not_the_state(name, env):
    before, state = start(env("", "rgb"), 3)
    changes = []
    for strength in (1, 2):
        picture, same = start(env(f"{name}-{strength}", "rgb"), 3)
        np.testing.assert_array_equal(same, state)
        changes.append(np.abs(picture - before).mean())
    assert 3 < changes[0] < changes[1]  # grey levels
    assert env(f"{name}-1", "rgb").instruction == env().instruction


def test_the_camera_turns_by_the_angle_about_a_point_ahead(env):
    def pose(env):
        return env.base._sensors["base_camera"].camera.get_local_pose().sp.to_transformation_matrix()

    plain, turned = pose(env("", "rgb")), pose(env("vision-camera_pose-2", "rgb"))
    ahead = np.array([variants.PIVOT, 0, 0, 1])
    np.testing.assert_allclose(turned @ ahead, plain @ ahead, atol=1e-5)
    assert np.rad2deg(np.arctan2(*turned[1::-1, 0]) - np.arctan2(*plain[1::-1, 0])) % 360 == pytest.approx(360 - 25, abs=0.1)
    assert np.rad2deg(np.arcsin(plain[2, 0]) - np.arcsin(turned[2, 0])) == pytest.approx(8, abs=0.1)
    assert abs(turned[2, 1]) < 1e-6  # level


def test_noise_belongs_to_the_seed_and_the_step(env):
    clean, _ = start(env("", "rgb"), 3)
    noisy = env("vision-image_noise-1", "rgb")
    first, _ = start(noisy, 3)
    middle = (clean > 60) & (clean < 195)  # where nothing is cut off
    assert (first - clean)[middle].std() == pytest.approx(15, rel=0.05)
    np.testing.assert_array_equal(observe(noisy)[0], first)
    noisy.step(np.zeros((1, 7), np.float32))
    second = observe(noisy)[0]
    assert abs(np.corrcoef((first - clean)[middle], (second - clean)[middle])[0, 1]) < 0.1
    np.testing.assert_array_equal(start(noisy, 3)[0], first)


# --------------------------------------------------------------------------------------------------------------------- semantic


def test_another_color_is_seen_at_the_object_alone(env):
    before, state = start(env("", "rgb"), 3)
    blue = env("semantic-object_color-2", "rgb")
    picture, same = start(blue, 3)
    np.testing.assert_array_equal(same, state)
    rows, columns = np.nonzero(np.abs(picture - before).max(2))
    assert 30 < len(rows) < 250 and np.ptp(rows) < 20 and np.ptp(columns) < 20  # a cube 10 px wide
    red, _, most = picture[rows, columns].mean(0)
    assert most > red + 80
    assert blue.instruction == "pick up the blue cube and move it to the goal"


@pytest.mark.parametrize(
    ("variant", "half_size"), [("", 0.02), ("semantic-object_size-1", 0.016), ("semantic-object_size-2", 0.012)]
)
def test_size(variant, half_size, env):
    small = env(variant)
    np.testing.assert_allclose(small.base.cube._bodies[0].collision_shapes[0].half_size, [half_size] * 3, atol=1e-6)
    state, plain = start(small, 3)[1], start(env(), 3)[1]
    np.testing.assert_allclose(state[CUBE] - plain[CUBE], [0, 0, half_size - 0.02], atol=1e-6)
    np.testing.assert_array_equal(state[QPOS], plain[QPOS])
    assert len(state) == len(plain) == 42


@pytest.mark.parametrize(("variant", "shape"), [("semantic-object_shape-1", "Cylinder"), ("semantic-object_shape-2", "Sphere")])
def test_shape(variant, shape, env):
    other = env(variant)
    (collision,) = other.base.cube._bodies[0].collision_shapes
    assert shape in type(collision).__name__
    np.testing.assert_allclose(start(other, 3)[1], start(env(), 3)[1], atol=1e-6)
    assert other.instruction != env().instruction
    assert demos.demonstrate(other, 3, noise=0.0) is not None  # held and carried, as the contacts of another body tell


def test_distractors_stand_clear_and_are_not_in_the_state(env):
    crowd = env("semantic-distractors-2")
    for seed in range(20):
        state, plain = start(crowd, seed)[1], start(env(), seed)[1]
        np.testing.assert_array_equal(state, plain)
        cube, goal = state[CUBE][:2], state[GOAL][:2]
        places = np.array([actor.pose.p[0].numpy() for actor in crowd.base._distractors])
        assert len(places) == 4
        np.testing.assert_allclose(places[:, 2], 0.02, atol=1e-6)
        way = cube + np.linspace(0, 1, 50)[:, None] * (goal - cube)
        assert np.linalg.norm(places[:, None, :2] - way, axis=2).min() > 0.06
        between = np.linalg.norm(places[:, None] - places, axis=2)[np.triu_indices(4, 1)]
        assert between.min() > 0.06
    assert crowd.object_positions().shape == env().object_positions().shape == (1, 3)


# ----------------------------------------------------------------------------------------------------------- randomised scenes


@pytest.mark.parametrize("task", variants.TASKS)
def test_randomised_scenes_leave_out_what_is_evaluated(task):
    evaluated = [variants.find(variant) for variant in variants.variants(task)]
    drawn = [variants.find(f"{task}/random-{number}") for number in range(300)]
    for change in evaluated:
        assert not any(randomised.near(scene, change) for scene in drawn)
        shown = change.tablecloth or change.lights or any(change.camera) or change.image_noise
        assert randomised.near(change, change) == bool(shown)
        assert not any(scene.instruction == change.instruction for scene in drawn)
        assert not any(set(scene.colors.values()) & set(change.colors.values()) for scene in drawn)
        assert not any(scene.distractors and scene.distractors == change.distractors for scene in drawn)
    for name in ("tablecloth", "lights", "camera", "image_noise", "distractors"):  # each is drawn, and at times left as it is
        assert 20 < sum(getattr(scene, name) != getattr(Change(), name) for scene in drawn) < 290
    assert variants.find(f"{task}/random-7") == drawn[7] != drawn[8]
    if task == "PickCube-v1":
        assert len({scene.instruction for scene in drawn}) == len(randomised.COLORS)


def test_a_randomised_scene_looks_different_and_has_the_task_s_states(env):
    image, state = start(env(obs_mode="rgb"), 5)
    pictures = [start(env(f"random-{number}", "rgb"), 5) for number in (0, 1)]
    assert all(np.abs(picture - image).mean() > 10 and np.array_equal(other, state) for picture, other in pictures)
    assert np.abs(pictures[0][0] - pictures[1][0]).mean() > 10
    assert env("random-0", "rgb").instruction == variants.find(f"{PICK}/random-0").instruction


def test_a_scene_s_demonstrations_stay_together_where_some_fail(monkeypatch):
    """So that those who hold out the last ones hold out scenes."""
    monkeypatch.setattr(demos, "demonstrate", lambda env, seed, noise: None if seed in (1, 3) else seed)
    env = maniskill.ManiSkillEnv(ManiSkillSpec(PICK, obs_mode="state"))
    assert demos.demonstrate_in(env, f"{PICK}/random-0", range(20), count=3, noise=0.0) == [0, None, 2, None, 4]
    env.close()


def test_a_scene_is_gone_when_its_demonstrations_are_made(monkeypatch):
    """Of SAPIEN's scenes each takes one of a process's 1024 keys for threads, and without any left Python aborts."""
    made = []
    monkeypatch.setattr(demos, "demonstrate", lambda env, seed, noise: made.append(weakref.ref(env.base)))
    env = maniskill.ManiSkillEnv(ManiSkillSpec(PICK, obs_mode="state"))
    demos.demonstrate_in(env, f"{PICK}/random-0", [1], count=1, noise=0.0)
    assert made[0]() is None
    env.close()


def test_demonstrations_are_spread_over_scenes(tmp_path):
    scenes = [f"{PICK}/random-{number}" for number in range(3)]
    venv = envs.make(PICK, 1, obs_mode="rgb", image_size=48)
    data = demos.collect(tmp_path / "demos.h5", venv, 5, scenes=scenes, progress=False)
    venv.close()
    first = [data.text(data.start[[i]])[0] for i in range(5)]
    told = [variants.find(scene).instruction for scene in scenes]
    assert first == [told[0], told[0], told[1], told[1], told[2]] and len(set(told)) > 1


# -------------------------------------------------------------------------------------------------------------------- execution


def test_spawn_range(env):
    plain, wide = starts(env()), starts(env("execution-spawn_range-2"))
    scale, shift = [1.7, 1.6], [-0.05, 0]
    np.testing.assert_allclose(wide[:, CUBE][:, :2], plain[:, CUBE][:, :2] * scale + shift, atol=1e-6)
    np.testing.assert_array_equal(wide[:, GOAL], plain[:, GOAL])
    np.testing.assert_array_equal(wide[:, QPOS], plain[:, QPOS])
    assert np.abs(plain[:, CUBE][:, :2]).max() <= 0.1 < 0.15 < np.abs(wide[:, CUBE][:, :2]).max()


def test_goal_range(env):
    plain, wide = starts(env(), 20), starts(env("execution-goal_range-2"), 20)
    np.testing.assert_allclose(wide[:, GOAL], plain[:, GOAL] * [1.6, 1.8, 1.2] + [-0.08, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(wide[:, CUBE], plain[:, CUBE])


def test_robot_start(env):
    plain, turned, shaky = (starts(env(name)) for name in ("", "execution-robot_pose-1", "execution-robot_noise-2"))
    np.testing.assert_allclose((turned - plain)[:, QPOS], [[0.13, 0, 0, 0, 0, 0, 0]] * len(plain), atol=1e-6)
    rest = np.array([0, np.pi / 8, 0, -np.pi * 5 / 8, 0, np.pi * 3 / 4, np.pi / 4])
    np.testing.assert_allclose((shaky[:, QPOS] - rest), (plain[:, QPOS] - rest) * 0.07 / 0.02, atol=1e-5)
    for other in (turned, shaky):
        np.testing.assert_array_equal(other[:, CUBE], plain[:, CUBE])
        np.testing.assert_array_equal(other[:, GOAL], plain[:, GOAL])


def test_the_object_jumps_once(env):
    moved = env("execution-object_moved-2")
    jumps = []
    for seed in (3, 4, 3):
        np.testing.assert_array_equal(start(moved, seed)[1], start(env(), seed)[1])
        way = [moved.object_positions()[0]]
        for _ in range(10):
            moved.step(np.zeros((1, 7), np.float32))
            way.append(moved.object_positions()[0])
        steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
        assert steps.argmax() == variants.JUMP_STEP and steps.max() == pytest.approx(0.06, abs=1e-3)
        assert np.delete(steps, variants.JUMP_STEP).max() < 1e-3
        jumps.append(way[-1] - way[0])
    assert abs(jumps[0][2]) < 1e-3
    np.testing.assert_array_equal(jumps[0], jumps[2])
    assert np.linalg.norm(jumps[0] - jumps[1]) > 0.01


def test_goals_turn_about_the_object_and_objects_jump_away_from_what_they_could_hit():
    push = maniskill.ManiSkillEnv(ManiSkillSpec("PushCube-v1/execution-goal_range-2", obs_mode="state"))
    angles = []
    for seed in range(20):
        push.reset(seed)
        x, y, _ = (push.base.goal_region.pose.p - push.base.obj.pose.p)[0].tolist()
        assert np.hypot(x, y) == pytest.approx(0.2, abs=1e-5)
        angles.append(np.rad2deg(np.arctan2(y, x)))
    assert -35 < min(angles) < -15 and 15 < max(angles) < 35
    push.close()

    place = maniskill.ManiSkillEnv(ManiSkillSpec("PlaceSphere-v1/execution-object_moved-2", obs_mode="state"))
    for seed in range(5):
        place.reset(seed)
        away = place.object_positions()[0] - place.base.bin.pose.p[0].numpy()
        before = np.linalg.norm(away[:2])
        place.step(np.zeros((variants.JUMP_STEP + 1, 7), np.float32))
        away = place.object_positions()[0] - place.base.bin.pose.p[0].numpy()
        assert np.linalg.norm(away[:2]) > before
    place.close()


def test_stacked_cubes_of_another_size_count():
    env_id = "StackCube-v1/semantic-object_size-2"
    stack = maniskill.ManiSkillEnv(ManiSkillSpec(env_id, obs_mode="state"))
    stack.reset(0)
    np.testing.assert_allclose(stack.object_positions()[:, 2], 0.015, atol=1e-6)
    assert any(demos.demonstrate(stack, seed, noise=0.0) for seed in range(3))
    stack.close()


# ---------------------------------------------------------------------------------------------------------- the other back ends


def test_variants_in_a_pool_and_in_a_batch(env):
    """The path that a GPU takes too, here with its one environment."""
    variant = f"{PICK}/execution-object_moved-2"
    pool = envs.make(variant, 2, num_workers=1, obs_mode="state", backend="cpu", chunk=10)
    batch = CudaVecEnv(pool.spec, 1, chunk=10, seed=0, backend="cpu")
    assert pool.instructions == [env().instruction] * 2 and batch.instruction == env().instruction
    obs, _ = pool.reset(seed=3)
    np.testing.assert_array_equal(obs["state"][0], start(env(), 3)[1])
    np.testing.assert_allclose(batch.reset(seed=3)[0]["state"][0], obs["state"][0], atol=1e-6)
    ends = [venv.step(np.zeros((venv.num_envs, 10, 7)))[0]["state"][0, CUBE] for venv in (pool, batch)]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)
    assert np.linalg.norm(ends[0] - obs["state"][0, CUBE]) == pytest.approx(0.06, abs=2e-3)
    pool.close()
    batch.close()


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for t in variants.TASKS for v in variants.variants(t) if variants.family(v) != "vision"])
def test_experts_solve_four_of_five_episodes_of_every_variant(variant):
    env = maniskill.ManiSkillEnv(ManiSkillSpec(variant, obs_mode="state"))
    assert sum(demos.demonstrate(env, seed, noise=0.0) is not None for seed in range(20)) >= 16
    env.close()
