"""The simulator side: ManiSkill's own states at a fraction of its time, chunks that stop where they should, and one-line errors."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from types import SimpleNamespace

import gymnasium as gym
import h5py
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from pi_stepnft import envs
from pi_stepnft.envs import demos, vulkan, worker
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.maniskill import Camera, ManiSkillSpec, experts, tasks
from pi_stepnft.envs.maniskill import env as maniskill
from pi_stepnft.envs.maniskill.cuda import CudaVecEnv
from pi_stepnft.envs.pool import MAX_RESTARTS
from pi_stepnft.harness import evaluation, films, statistics

try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)
import sapien  # noqa: E402 (the driver is chosen before)
from mani_skill.envs.utils.observations import parse_obs_mode_to_struct  # noqa: E402

from pi_stepnft.envs.maniskill import fast_info, shaders  # noqa: E402

STATE = dict(obs_mode="state", backend="cpu")


@pytest.fixture(scope="module")
def pick():
    """PickCube in this process, in state mode."""
    return maniskill.ManiSkillEnv(ManiSkillSpec("PickCube-v1", obs_mode="state"))


@pytest.fixture(scope="module")
def eye():
    """PickCube in this process, in rgb mode."""
    return maniskill.ManiSkillEnv(ManiSkillSpec("PickCube-v1", camera=Camera()))


@pytest.fixture(scope="module")
def pool():
    """Four PickCubes in state mode in two processes."""
    venv = envs.make("PickCube-v1", 4, num_workers=2, seed=3, **STATE)
    yield venv
    venv.close()


@pytest.fixture(scope="module")
def short():
    """Two PickCubes in one process whose episodes end after 12 steps."""
    venv = envs.make("PickCube-v1", 2, num_workers=1, max_episode_steps=12, **STATE)
    yield venv
    venv.close()


@pytest.fixture(scope="module")
def eyes():
    """Two PickCubes in rgb mode in one process."""
    venv = envs.make("PickCube-v1", 2, num_workers=1, image_size=64, backend="cpu")
    yield venv
    venv.close()


@pytest.fixture(scope="module")
def solved(pick):
    """The expert's episodes from seeds 10, 11, … that take no whole number of chunks of 8."""
    episodes = [demos.demonstrate(pick, seed, noise=0.0) for seed in range(10, 16)]
    return [episode for episode in episodes if len(episode["action"]) % 8]


def observe(env: maniskill.ManiSkillEnv) -> tuple[np.ndarray, np.ndarray]:
    size = env.spec.image_size
    image, state = np.zeros((len(env.cameras), size, size, 3), np.uint8), np.zeros(env.state_dim, np.float32)
    env.observe(image, state)
    return image, state


def random_actions(seed: int, *shape: int) -> np.ndarray:
    """Actions of which a third is out of range, with rotations longer than 1."""
    return np.random.default_rng(seed).normal(size=(*shape, 7)).astype(np.float32)


def replay(venv, episode: dict, pad: np.ndarray) -> tuple[int, int, dict]:
    """Replay a recorded episode, filled up with `pad`, in every environment: (chunks, steps of environment 0, last results)."""
    actions = np.concatenate([episode["action"], pad])
    venv.reset(seed=np.full(venv.num_envs, episode["seed"]))
    steps = 0
    for n in range(len(actions) // 8):
        chunk = np.tile(actions[8 * n : 8 * n + 8], (venv.num_envs, 1, 1))
        obs, reward, terminated, truncated, info = venv.step(chunk)
        steps += info["steps"][0]
        if terminated[0] or truncated[0]:
            break
    return n + 1, steps, dict(obs=obs, reward=reward, terminated=terminated, truncated=truncated, **info)


# ------------------------------------------------------------------------------------------------------------- the same physics


@pytest.mark.parametrize("env_id", ["PickCube-v1", "StackCube-v1"])
def test_states_and_grasps_are_those_of_maniskills_own_step(env_id, pick):
    ours = pick if env_id == "PickCube-v1" else maniskill.ManiSkillEnv(ManiSkillSpec(env_id, obs_mode="state"))
    assert ours._set_action is not None  # the fast controller is what is tested
    theirs = gym.make(
        env_id, num_envs=1, obs_mode="state", control_mode="pd_ee_delta_pose", reward_mode="sparse",
        sim_backend="physx_cpu", render_backend="cpu",
    )
    rise = np.array([0, 0, 0.3, 0, 0, 0, 0], np.float32)  # away from the table
    beyond = np.tile(np.array([1, 0.5, 0.5, 0, 0, 0, 1], np.float32), (24, 1))  # soon out of the arm's reach
    expert = demos.demonstrate(ours, seed=5, noise=0.0)
    grasped = []
    # Contacts magnify differences of rounding: ManiSkill differs as much from itself when its actions differ by 1e-6.
    for seed, actions, tolerance in [(6, random_actions(6, 24) + rise, 1e-4), (7, random_actions(7, 24) + rise, 1e-4),
                                     (1, beyond, 1e-4), (5, expert["action"], 1e-3)]:
        ours.reset(seed)
        obs, _ = theirs.reset(seed=seed)
        np.testing.assert_allclose(observe(ours)[1], obs[0].numpy(), atol=1e-6)
        for start in range(0, len(actions), 8):
            reward, terminated, _, steps = ours.step(actions[start : start + 8])
            for action in actions[start : start + steps]:
                obs, their_reward, their_terminated, _, info = theirs.step(action)
            np.testing.assert_allclose(observe(ours)[1], obs[0].numpy(), atol=tolerance)
            assert (terminated, reward) == (their_terminated.item(), their_reward.item())
            for name in info.keys() - {"elapsed_steps"}:
                assert ours.info[name].item() == info[name].item(), name
            grasped.append(info[next(name for name in info if "grasped" in name)].item())
    assert terminated and any(grasped) and not all(grasped)
    theirs.close()


@pytest.mark.parametrize("env_id", ["PickCube-v1", *(
    pytest.param(env_id, marks=pytest.mark.slow) for env_id in experts.available() if env_id != "PickCube-v1")])
def test_what_is_told_without_torch_is_what_maniskill_tells(env_id, pick, monkeypatch):
    """Observations, to the last bit, with and without pictures; success is told of no scene that is far from it."""
    env = pick if env_id == "PickCube-v1" else maniskill.ManiSkillEnv(ManiSkillSpec(env_id, obs_mode="state"))
    base, known = env.base, env._known
    assert type(known).__name__ + "-v1" == env_id
    far, success = [], []
    for seed in range(3):
        env.reset(seed)
        expert, rng = env.expert(), np.random.default_rng(seed)
        expert.reset()
        for _ in range(30):
            env.step(np.clip(expert.act() + rng.normal(0, 0.1, 7), -1, 1).astype(np.float32)[None])
            info = base.get_info()
            far.append(known.is_far())
            success.append(info["success"].item())
            assert env.success == success[-1] and not (success[-1] and far[-1])
            np.testing.assert_array_equal(observe(env)[1], maniskill.state_vector(base, info)[0].numpy())
            with monkeypatch.context() as patch:
                patch.setattr(base, "_obs_mode", "rgb")
                patch.setattr(base, "obs_mode_struct", parse_obs_mode_to_struct("rgb"))
                seen = np.concatenate([np.ravel(part) for part in known.extra()], dtype=np.float32)
                parts = [part.numpy().ravel() for part in base._get_obs_extra(info).values()]
                np.testing.assert_array_equal(seen, np.concatenate(parts, dtype=np.float32))
    assert any(success) and sum(far) > 10 and not all(far)


def test_a_task_or_robot_that_is_not_the_known_one_is_asked_itself(pick):
    cls = type(pick.base)

    def known(agent=pick.base.agent, **methods) -> fast_info.Known | None:
        task = object.__new__(type("Own", (cls,), methods))
        task.agent = agent
        return fast_info.known(task)

    own = lambda self, *_: {}
    assert isinstance(known(), fast_info.PickCube) and known(agent=SimpleNamespace()) is None
    assert known(evaluate=own) is known(_get_obs_extra=own) is known(get_info=own) is None


def test_the_dense_reward_is_maniskills_summed_over_the_chunk(solved):
    ours = maniskill.ManiSkillEnv(ManiSkillSpec("PickCube-v1", obs_mode="state", reward_mode="normalized_dense"))
    theirs = gym.make("PickCube-v1", obs_mode="state", control_mode="pd_ee_delta_pose", reward_mode="normalized_dense",
                      sim_backend="physx_cpu", render_backend="cpu")
    ours.reset(solved[0]["seed"])
    theirs.reset(seed=solved[0]["seed"])
    actions = solved[0]["action"][:8]
    assert ours.step(actions)[0] == pytest.approx(sum(theirs.step(a)[1].item() for a in actions), abs=1e-3)
    theirs.close()


def test_lighter_meshes_change_the_picture_little_and_the_physics_not_at_all(eye, solved):
    assert eye.spec.mesh_keep < 1
    heavy = maniskill.ManiSkillEnv(ManiSkillSpec("PickCube-v1", camera=Camera(), mesh_keep=1.0))
    for env in (eye, heavy):
        env.reset(solved[0]["seed"])
    for start in (0, 8):
        for env in (eye, heavy):
            env.step(solved[0]["action"][start : start + 8])
        light, full = observe(eye), observe(heavy)
        np.testing.assert_array_equal(light[1], full[1])
        assert torch.equal(eye.base.get_state(), heavy.base.get_state())
        assert np.abs(light[0].astype(float) - full[0]).mean() < 2.0  # of 255
    heavy.close()


@pytest.mark.skipif(vulkan.renders_on_gpu(), reason="a GPU gets the full shaders")
@pytest.mark.parametrize("env_id", ["PickCube-v1", "PlaceSphere-v1", "PickCube-v1/vision-table_color-2"])
def test_leaner_shaders_draw_the_same_picture(env_id, monkeypatch):
    assert shaders.lean_pack(), "SAPIEN's shaders have changed: look at envs/maniskill/shaders.py again"
    pictures, chosen, shader_dir = [], [], sapien.render.set_camera_shader_dir
    monkeypatch.setattr(sapien.render, "set_camera_shader_dir", lambda name: chosen.append(name) or shader_dir(name))
    for pack in (shaders.lean_pack(), None):
        chosen.clear()
        monkeypatch.setattr(shaders, "lean_pack", lambda pack=pack: pack)
        env = maniskill.ManiSkillEnv(ManiSkillSpec(env_id, camera=Camera()))
        assert str(pack or "minimal") in chosen
        env.reset(10)
        pictures.append([])
        for seed in range(4):
            env.step(random_actions(seed, 8))
            pictures[-1].append(observe(env)[0])
        env.close()
    assert np.std(pictures[0]) > 10
    np.testing.assert_array_equal(*pictures)


def test_an_environment_map_and_a_gpu_get_the_full_shaders(monkeypatch):
    chosen = []
    monkeypatch.setattr(sapien.render, "set_camera_shader_dir", chosen.append)
    monkeypatch.setattr(sapien.Scene, "set_environment_map", lambda scene, cubemap: None)
    with shaders.lean_shaders(True):
        for name in ("minimal", "default"):
            sapien.render.set_camera_shader_dir(name)
        sapien.Scene.set_environment_map(None, "map.ktx")
        sapien.render.set_camera_shader_dir("minimal")
    with shaders.lean_shaders(False):
        sapien.render.set_camera_shader_dir("minimal")
    assert chosen == [str(shaders.lean_pack()), "default", "minimal", "minimal"]


# --------------------------------------------------------------------------------------------------------------------- episodes


def test_success_within_a_chunk_stops_there_and_counts_the_steps(pool, pick, solved):
    for episode in solved[:2]:
        length = len(episode["action"])
        chunks, steps, last = replay(pool, episode, pad=random_actions(5, 8))
        assert (chunks, steps) == (-(-length // 8), length)
        assert last["success"].all() and last["terminated"].all() and not last["truncated"].any()
        assert (last["steps"] == length % 8).all() and (last["reward"] == 1).all()
        pick.reset(episode["seed"])
        pick.step(episode["action"])
        np.testing.assert_array_equal(last["obs"]["state"][0], observe(pick)[1])  # what was to follow has not been executed


def test_a_finished_environment_rests_until_it_is_reset(pool, short, solved):
    _, _, last = replay(pool, solved[0], pad=np.zeros((8, 7), np.float32))
    for seed in range(2):
        obs, reward, _, _, info = pool.step(random_actions(seed, 4, 8))
        np.testing.assert_array_equal(obs["state"], last["obs"]["state"])
        assert not reward.any() and not info["steps"].any() and info["success"].all()
    pool.step(np.full((4, 8, 7), np.nan))  # nor does anyone look at actions that nobody executes
    obs, info = pool.reset(seed=0)
    assert not info["success"].any()
    np.testing.assert_array_equal(obs["state"][:2], short.reset(seed=0)[0]["state"])  # the cube of the last episode is not held
    assert (pool.step(random_actions(0, 4, 8))[4]["steps"] == 8).all()


def test_episodes_are_cut_off_at_the_limit(pool, short):
    for venv, limit in ((pool, 50), (short, 12)):
        assert venv.max_episode_steps == limit
        venv.reset(seed=0)
        counts = []
        for _ in range(-(-limit // 8)):
            _, _, terminated, truncated, info = venv.step(np.zeros((venv.num_envs, 8, 7)))
            counts.append(info["steps"].tolist())
            assert not terminated.any() and truncated.all() == (np.sum(counts, axis=0) == limit).all()
        assert np.sum(counts, axis=0).tolist() == [limit] * venv.num_envs and counts[-1] == [limit % 8] * venv.num_envs
    venv.reset(seed=0)
    assert venv.step(np.zeros((2, 100, 7)))[4]["steps"].tolist() == [12, 12]  # a chunk may be longer than what is left


def test_seeds_determine_initial_states_across_pools(pool, short):
    obs, _ = pool.reset(seed=[7, 7, 8, 7])
    states = obs["state"]
    np.testing.assert_array_equal(states[[1, 3]], states[[0, 0]])
    assert np.abs(states[2] - states[0]).max() > 1e-3
    np.testing.assert_array_equal(short.reset(seed=7)[0]["state"], states[[0, 2]])  # an integer counts up
    drawn = pool.reset()[0]["state"]
    assert len(np.unique(drawn, axis=0)) == 4 and not np.array_equal(drawn, pool.reset()[0]["state"])


def test_episodes_are_deterministic_whatever_ran_before(pool, short):
    actions = np.clip(random_actions(3, 8), -1, 1)
    runs = []
    for _ in range(2):
        pool.reset(seed=[5, 5, 6, 6])
        runs.append(pool.step(np.stack([actions] * 4))[0]["state"])
        pool.step(random_actions(9, 4, 8))
    short.reset(seed=5)
    runs.append(short.step(np.stack([actions] * 2))[0]["state"][[0, 0, 1, 1]])
    for run in runs:
        np.testing.assert_array_equal(run, runs[0])
    np.testing.assert_array_equal(runs[0][0], runs[0][1])


def test_a_group_gets_the_picture_that_each_of_its_environments_would_draw(eyes):
    together = eyes.reset(seed=np.array([31, 31]))[0]
    for slot in (0, 1):
        eyes.reset(seed=np.array([50, 51]))
        alone = eyes.reset(seed=31 - slot, options={"reset_mask": np.arange(2) == slot})[0]
        for name in ("image", "state"):
            assert (alone[name][0] != alone[name][1]).any()
            np.testing.assert_array_equal(together[name][slot], alone[name][slot])


def test_a_reset_mask_leaves_the_others_alone(pool):
    pool.reset(seed=20)
    before = pool.step(random_actions(1, 4, 46))[0]["state"]
    mask = np.array([True, False, False, True])
    obs, _ = pool.reset(seed=30, options={"reset_mask": mask})
    np.testing.assert_array_equal(obs["state"][~mask], before[~mask])
    np.testing.assert_array_equal(obs["state"][mask], pool.reset(seed=30, options={"reset_mask": mask})[0]["state"][mask])
    _, _, _, truncated, info = pool.step(np.zeros((4, 8, 7)))
    assert info["steps"].tolist() == [8, 4, 4, 8] and truncated.tolist() == (~mask).tolist()


# ----------------------------------------------------------------------------------------------------------------- observations


def test_the_picture_shows_the_cube_and_the_state_does_not_tell_where_it_is(eyes, pool):
    obs, _ = eyes.reset(seed=40)
    image, state = obs["image"], obs["state"]
    assert image.shape == (2, 1, 64, 64, 3) and image.dtype == np.uint8 and obs in eyes.observation_space
    red = (image[..., 0] > 120) & (image[..., 1] < 60) & (image[..., 2] < 60)
    assert image.mean() > 50 and (red.sum((1, 2, 3)) > 15).all()
    assert state.shape == (2, 29) and state.dtype == np.float32
    privileged, _ = pool.reset(seed=40)
    assert privileged["state"].shape == (4, 42) and privileged["image"].size == 0 and privileged in pool.observation_space
    np.testing.assert_array_equal(privileged["state"][:2, :29], state)  # what it adds are the cube's pose and distances


def test_without_terminal_observations_all_else_is_the_same(eyes, solved):
    results = []
    for eyes.observe_terminal in (True, False):
        results.append(replay(eyes, solved[0], pad=np.zeros((8, 7), np.float32)))
    eyes.observe_terminal = True
    (chunks, steps, seen), (chunks_2, steps_2, unseen) = results
    assert (chunks, steps) == (chunks_2, steps_2)
    for name in ("reward", "terminated", "truncated", "success", "steps", "lost"):
        np.testing.assert_array_equal(seen[name], unseen[name])
    eyes.reset(seed=np.full(2, solved[0]["seed"]))
    for n in range(chunks - 1):
        before = eyes.step(np.tile(solved[0]["action"][8 * n : 8 * n + 8], (2, 1, 1)))[0]
    np.testing.assert_array_equal(unseen["obs"]["image"], before["image"])
    np.testing.assert_array_equal(unseen["obs"]["state"], before["state"])
    assert (seen["obs"]["image"] != before["image"]).any()


# ---------------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(env_id="PickCubes-v1"), "did you mean PickCube-v1"),
        (dict(env_id="PickSingleYCB-v1"), "download_asset"),
        (dict(num_envs=0), "num_envs"),
        (dict(chunk=0), "chunk"),
        (dict(num_workers=-1), "num_workers"),
        (dict(obs_mode="depth"), "'rgb' or 'state'"),
        (dict(backend="tpu"), "'cpu'"),
        (dict(colour="red"), "no option 'colour': there are image_size"),
        (dict(control_mod="pd_joint_pos"), "did you mean control_mode"),
        (dict(cameras=3), "cameras must be a list or text, got 3"),
        (dict(robot=("panda", "panda")), "robot must be text, got ('panda', 'panda')"),
        (dict(sim_obs_mode="depth"), "'rgb+segmentation'"),
        (dict(env_id="TwoRobotPickCube-v1"), "several robots"),
        (dict(env_id="AnymalC-Reach-v1"), "download_asset anymal_c"),
        (dict(env_id="ReplicaCAD_SceneManipulation-v1"), "download_asset ReplicaCAD"),
        (dict(robot="widowxai"), "download_asset widowxai"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(chunk=51), "50 steps"),
    ],
)
def test_bad_arguments_are_told_in_one_line(given, told, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises(EnvError) as error:
        envs.make(**{"env_id": "PickCube-v1", "num_envs": 1, **STATE, **given})
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option", [dict(control_mode="telepathy"), dict(reward_mode="karma"), dict(kwargs=dict(colour="red"))])
def test_what_maniskill_refuses_is_told_in_one_line(option, pick):
    with pytest.raises(EnvError) as error:
        maniskill.ManiSkillEnv(ManiSkillSpec("PickCube-v1", obs_mode="state", **option))
    assert "PickCube-v1" in str(error.value) and "\n" not in str(error.value)


def test_bad_actions_and_seeds_are_told_in_one_line(pool):
    pool.reset(seed=0)
    for bad in (lambda: pool.step(np.zeros((4, 7))), lambda: pool.step(np.zeros((3, 8, 7))), lambda: pool.step(np.zeros((4, 8, 6))),
                lambda: pool.reset(seed=[1, 2]), lambda: pool.reset(seed=-1), lambda: pool.reset(seed=2**32 - 3),
                lambda: pool.reset(seed=[0, 1, 2, 2**63]), lambda: pool.reset(seed=[0.5] * 4),
                lambda: pool.reset(options={"reset_mask": [True]})):
        with pytest.raises(EnvError) as error:
            bad()
        assert "\n" not in str(error.value)
    assert (pool.step(np.zeros((4, 8, 7)))[4]["steps"] == 8).all()  # and the pool goes on
    assert np.isfinite(pool.reset(seed=2**32 - 4)[0]["state"]).all()


SCRIPT = """
import numpy as np
from pi_stepnft import envs
print("this program runs once")
venv = envs.make("PickCube-v1", num_envs=2, num_workers=2, obs_mode="state", backend="cpu", chunk=4)
obs, info = venv.reset(seed=0)
obs, reward, terminated, truncated, info = venv.step(np.zeros((2, 4, 7)))
print(info["steps"])
"""


def test_a_program_without_a_main_guard_is_not_imported_by_workers(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")  # nor is the folder where it is started
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "program.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "scripts/program.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["this program runs once", "[4 4]"], done.stderr
    assert "Traceback" not in done.stderr


def test_without_memory_for_the_observations_no_worker_dies(monkeypatch):
    with pytest.raises(EnvError, match="no memory for the observations of 2 environments.*take fewer") as error:
        envs.make("PickCube-v1", 2, num_workers=1, max_episode_steps=10**12, **STATE)  # room for that many actions
    assert "\n" not in str(error.value) and "worker" not in str(error.value)


def test_the_action_space_has_the_simulators_bounds():
    venv = envs.make("PickCube-v1", 1, control_mode="pd_joint_pos", chunk=2, **STATE)
    theirs = gym.make("PickCube-v1", obs_mode="state", control_mode="pd_joint_pos", render_backend="cpu").unwrapped
    assert venv.action_dim == 8 and venv.single_action_space.shape == (2, 8)
    for bound in ("low", "high"):
        expected = np.tile(getattr(theirs.single_action_space, bound), (2, 1))
        np.testing.assert_array_equal(getattr(venv.single_action_space, bound), expected)
    assert venv.single_action_space.high.max() > 2
    venv.close()


def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert envs.num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert envs.num_cores() == len(allowed)


def test_a_killed_worker_costs_its_episodes_and_nothing_else(pool):
    obs, _ = pool.reset(seed=50)
    pool.step(np.zeros((4, 8, 7)))
    os.kill(pool._workers[1].process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="worker 1 died of SIGKILL"):
        _, _, terminated, truncated, info = pool.step(np.zeros((4, 8, 7)))
    assert info["lost"].tolist() == truncated.tolist() == [False, True, False, True] and not terminated.any()
    assert info["steps"].tolist() == [8, 0, 8, 0]
    _, _, _, _, info = pool.step(np.zeros((4, 8, 7)))
    assert not info["lost"].any() and info["steps"].tolist() == [8, 0, 8, 0]
    again, _ = pool.reset(seed=50)
    np.testing.assert_array_equal(again["state"], obs["state"])
    assert (pool.step(np.zeros((4, 8, 7)))[4]["steps"] == 8).all()

    # Death while some are reset: the others of that worker are lost as well, and told so by the next step.
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="worker 0 died"):
        again, _ = pool.reset(seed=50, options={"reset_mask": np.array([True, True, False, False])})
    np.testing.assert_array_equal(again["state"][:2], obs["state"][:2])
    _, _, _, truncated, info = pool.step(np.zeros((4, 8, 7)))
    assert info["lost"].tolist() == truncated.tolist() == [False, False, True, False]
    assert info["steps"].tolist() == [8, 8, 0, 8]


def test_a_signal_to_the_whole_group_is_the_programs_to_handle(pool):
    pool.reset(seed=50)
    for each in pool._workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            each.process.send_signal(number)
    assert not pool.step(np.zeros((4, 8, 7)))[-1]["lost"].any()


def test_a_hung_worker_is_replaced(pool, monkeypatch):
    pool.reset(seed=50)
    monkeypatch.setattr(pool, "step_timeout", 1.0)
    stopped = pool._workers[1].process
    os.kill(stopped.pid, signal.SIGSTOP)
    with pytest.warns(UserWarning, match="worker 1 was silent for 1 s: .*--step-timeout. It is replaced"):
        info = pool.step(np.zeros((4, 8, 7)))[-1]
    assert info["lost"].tolist() == [False, True, False, True] and stopped.poll() == -signal.SIGKILL
    assert not pool.step(np.zeros((4, 8, 7)))[-1]["lost"].any()


@pytest.mark.parametrize(
    "number, cause",
    [(signal.SIGKILL, "memory runs out"), (signal.SIGBUS, "no room"), (signal.SIGSEGV, "driver")],
)
def test_how_a_worker_died_is_told(number, cause):
    dead = worker.Worker.__new__(worker.Worker)
    dead.spec, dead.process = envs.simulator("PickCube-v1").spec("PickCube-v1"), subprocess.Popen(["sleep", "9"])
    dead.pipe, end = worker.Pipe()
    end.close()
    dead.process.send_signal(number)
    with pytest.raises(worker.Died, match=f"died of {number.name}: .*{cause}"):
        dead.receive()


def test_workers_that_die_all_the_time_are_given_up(pool, monkeypatch):
    pool.reset(seed=50)
    now = time.monotonic()
    monkeypatch.setattr(pool, "_restarts", deque([now - 3000] + [now] * (MAX_RESTARTS - 1), maxlen=MAX_RESTARTS))
    death = worker.Died("died of boredom")
    with pytest.raises(envs.EnvError, match="died 31 times within an hour; the last one died of boredom"):
        pool._replace(pool._workers[0], death)


def test_actions_that_are_no_numbers_cost_their_episode_alone(pool):
    pool.reset(seed=50)
    chunk = np.zeros((4, 8, 7))
    chunk[2, 3, 1], chunk[3, 7, 6] = np.nan, np.inf
    _, _, terminated, truncated, info = pool.step(chunk)
    assert info["lost"].tolist() == truncated.tolist() == [False, False, True, True] and not terminated.any()
    assert info["steps"].tolist() == [8, 8, 0, 0]
    assert pool.step(chunk)[-1]["steps"].tolist() == [8, 8, 0, 0]


def test_an_episode_is_a_function_of_its_seed_and_its_actions(pick):
    state = np.zeros(pick.state_dim, np.float32)

    def play(seed: int, actions: list | None = None) -> tuple[list, np.ndarray]:
        """By the expert, with noise, or by the actions given; what was seen after each step."""
        pick.reset(seed)
        expert, rng, told, seen = pick.expert(), np.random.default_rng(seed), [], []
        expert.reset()
        for t in range(32):
            action = actions[t] if actions else np.clip(expert.act() + rng.normal(0, 0.2, 7), -1, 1).astype(np.float32)
            pick.step(action[None])
            pick.observe(np.zeros((0, 0, 0, 3), np.uint8), state)
            told.append(action)
            seen.append(state.copy())
        return told, np.stack(seen)

    played = {seed: play(seed) for seed in range(20)}
    for seed in np.random.default_rng(0).permutation(20):
        told, seen = played[seed]
        np.testing.assert_array_equal(play(int(seed), told)[1], seen)


# --------------------------------------------------------------------------------------------- experts, demonstrations, evaluation


def test_demonstrations_are_written_and_read_back(pool, solved, tmp_path):
    data = demos.collect(tmp_path / "new" / "pick.h5", pool, 3, first_seed=10, progress=False)
    assert os.listdir(tmp_path / "new") == ["pick.h5"]
    assert data.attrs["env_id"] == "PickCube-v1" and data.attrs["instruction"] == pool.instruction
    lengths = np.diff(np.append(data.start, len(data.action)))
    assert len(lengths) == 3 and data.state.shape == (lengths.sum(), 42) and data.image.shape == (lengths.sum(), 0, 96, 96, 3)
    with h5py.File(tmp_path / "new" / "pick.h5") as file:
        seeds = [file[f"episode_{i}"].attrs["seed"] for i in range(3)]
    assert seeds == [10, 11, 12]  # the expert fails on none of these
    for episode in solved:
        if episode["seed"] in seeds:
            first = data.start[seeds.index(episode["seed"])]
            rows = slice(first, first + len(episode["action"]))
            np.testing.assert_array_equal(data.action[rows], episode["action"])
            np.testing.assert_array_equal(data.objects[rows, 0], data.state[rows, 29:32])  # the cube

    chunks = data.chunks(8)
    last = data.start[1] - 1  # of the first episode
    assert chunks.shape == (len(data.action), 8, 7)
    np.testing.assert_array_equal(chunks[:, 0], data.action)
    np.testing.assert_array_equal(chunks[last - 2, :3], data.action[last - 2 : last + 1])
    assert not chunks[last - 2, 3:, :6].any() and (chunks[last - 2, 3:, 6] == data.action[last, 6]).all()
    np.testing.assert_array_equal(chunks[-8], data.action[-8:])


def test_bad_demonstration_files_are_told_in_one_line(tmp_path):
    (tmp_path / "corrupt.h5").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["weights"] = np.zeros(3)
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.attrs["format"] = demos.FORMAT
    with h5py.File(tmp_path / "partial.h5", "w") as file:
        file.attrs["format"] = demos.FORMAT
        file.create_group("episode_0")["action"] = np.zeros((3, 7))
    for name in ("missing", "corrupt", "foreign", "empty", "partial"):
        with pytest.raises(EnvError) as error:
            demos.read(tmp_path / f"{name}.h5")
        assert name in str(error.value) and "\n" not in str(error.value)


def test_demonstrations_of_another_task_or_mode_are_refused(tmp_path):
    with h5py.File(tmp_path / "push.h5", "w") as file:
        file.attrs.update(format=demos.FORMAT, env_id="PushCube-v1", obs_mode="state")
        group = file.create_group("episode_0")
        for name, shape in dict(image=(3, 0, 8, 8, 3), state=(3, 5), action=(3, 7), objects=(3, 1, 3)).items():
            group[name] = np.zeros(shape)
    assert len(demos.read(tmp_path / "push.h5", env_id="PushCube-v1", obs_mode="state").action) == 3
    for attribute, value in (("env_id", "PickCube-v1"), ("obs_mode", "rgb")):
        with pytest.raises(EnvError, match=f"made for {attribute}.*{value}"):
            demos.read(tmp_path / "push.h5", **{attribute: value})


def test_a_task_without_an_expert_has_no_demonstrations(tmp_path, monkeypatch, pool):
    monkeypatch.setattr(pool, "spec", ManiSkillSpec("RollBall-v1", obs_mode="state"))
    with pytest.raises(EnvError, match="no scripted expert for 'RollBall-v1'.*PickCube-v1.*--dataset"):
        demos.collect(tmp_path / "roll.h5", pool, 1)
    assert not os.listdir(tmp_path)


def test_the_expert_picks_cubes(pick):
    assert all(demos.demonstrate(pick, seed, noise=0.0) for seed in range(100, 105))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", experts.available())
def test_experts_solve_nine_of_ten_episodes(env_id):
    env = maniskill.ManiSkillEnv(ManiSkillSpec(env_id, obs_mode="state"))
    assert sum(demos.demonstrate(env, seed, noise=0.0) is not None for seed in range(20)) >= 18
    env.close()


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # by hand: (p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96
    [(0, 10, 0.0, 0.27754), (5, 10, 0.23659, 0.76341), (10, 10, 0.72246, 1.0), (81, 263, 0.25527, 0.36621)],
)
def test_wilson_interval(successes, episodes, low, high):
    assert statistics.wilson(successes, episodes) == pytest.approx((low, high), abs=1e-4)


class Replay:
    """A policy for `evaluate` that recognises the initial states of known episodes and replays them; elsewhere it stands still."""

    def __init__(self, episodes: list[dict], n: int):
        self.episodes, self.n = episodes, n

    def __call__(self, obs: dict, instructions: list[str], turns: np.ndarray) -> np.ndarray:
        assert len(obs["state"]) == len(obs["image"]) == len(instructions) == len(turns)
        chunks = np.zeros((len(instructions), self.n, 7), np.float32)
        for chunk, state in zip(chunks, obs["state"]):
            for episode in self.episodes:
                for t in range(0, len(episode["action"]), self.n):
                    if np.allclose(state, episode["state"][t, : len(state)], atol=1e-6):
                        chunk[: len(episode["action"]) - t] = episode["action"][t : t + self.n]
        return chunks


def test_evaluation_counts_every_episode_once(pool, solved):
    known = solved[:2]
    result = evaluation.evaluate(pool, Replay(known, 8), 6, execute=8, seed=10)  # rounds of 4 and 2
    assert result.seeds.tolist() == list(range(10, 16))
    lengths = {episode["seed"]: len(episode["action"]) for episode in known}
    assert result.success.tolist() == [seed in lengths for seed in result.seeds]
    assert result.steps.tolist() == [lengths.get(seed, 50) for seed in result.seeds]
    assert result.rate == pytest.approx(2 / 6) and result.interval == statistics.wilson(2, 6)
    nothing = evaluation.evaluate(pool, Replay([], 8), 3, execute=4)
    assert nothing.rate == 0 and nothing.steps.tolist() == [50] * 3 and nothing.seeds[0] == envs.EVAL_SEED


class Plague:
    """The policy, and one of the pool's workers killed, or stopped, at some of its turns."""

    def __init__(self, policy: Replay, pool, signals: dict[int, signal.Signals]):
        self.policy, self.pool, self.signals, self.turn = policy, pool, signals, 0

    def __call__(self, *seen) -> np.ndarray:
        if self.turn in self.signals:
            os.kill(self.pool._workers[self.turn % 2].process.pid, self.signals[self.turn])
        self.turn += 1
        return self.policy(*seen)


def test_evaluation_does_not_depend_on_workers_that_die(pool, solved, monkeypatch):
    monkeypatch.setattr(pool, "step_timeout", 2.0)
    policy, options = Replay(solved, 8), dict(execute=8, seed=10)
    quiet = evaluation.evaluate(pool, policy, 6, **options)
    with pytest.warns(UserWarning, match="is replaced"):
        ill = evaluation.evaluate(pool, Plague(policy, pool, {1: signal.SIGKILL, 3: signal.SIGSTOP}), 6, **options)
    assert quiet.success.any() and (quiet.repeated, ill.repeated > 1) == (0, True)
    for name in ("success", "steps", "seeds", "actions"):
        np.testing.assert_array_equal(getattr(quiet, name), getattr(ill, name))


def test_a_film_of_an_evaluation_plays_and_tells_the_outcomes(eyes, solved, tmp_path):
    episode = solved[0]
    result = evaluation.evaluate(eyes, Replay([episode], 8), 2, execute=8, seed=episode["seed"])
    films.record(eyes, result, tmp_path / "new" / "pick.mp4", "PickCube")
    film = iio.imread(tmp_path / "new" / "pick.mp4")  # (T, H, W, 3)
    side, steps = eyes.spec.video_size, max(result.steps)
    assert result.success[0] and film.shape[2] == 2 * side + 12 and len(film) == 1 + steps + 30  # at its end there is time to read
    green, background = np.array(films.GREEN), np.array((20, 20, 20))
    edge = film[-1, film.shape[1] // 2, 5].astype(int)  # of the left tile
    assert np.abs(edge - green).max() < 60 < np.abs(edge - background).max()
    assert np.abs(film[0].astype(float) - film[-1]).mean() > 1  # and something has moved


# -------------------------------------------------------------------------------------------------------- the batched simulation


def test_the_batched_simulation_does_what_the_pool_does(short, solved):
    batched = CudaVecEnv(short.spec, 1, chunk=8, seed=0, backend="cpu")
    assert batched.single_observation_space == short.single_observation_space
    for name in ("single_action_space", "instruction", "max_episode_steps", "action_dim"):
        assert getattr(batched, name) == getattr(short, name)
    actions = np.stack([random_actions(2, 24), 0.3 * random_actions(3, 24)])
    for seed, who in ((5, 0), (6, 1)):
        np.testing.assert_allclose(batched.reset(seed=seed)[0]["state"][0], short.reset(seed=5)[0]["state"][who], atol=1e-6)
        for n in range(0, 24, 8):  # over the limit of 12
            ours, theirs = batched.step(actions[who : who + 1, n : n + 8]), short.step(actions[:, n : n + 8])
            np.testing.assert_allclose(ours[0]["state"][0], theirs[0]["state"][who], atol=1e-4)
            assert [x[0] for x in ours[1:4]] == [x[who] for x in theirs[1:4]]
            assert {k: v[0] for k, v in ours[4].items()} == {k: v[who] for k, v in theirs[4].items()}
    batched.close()

    batched = CudaVecEnv(ManiSkillSpec("PickCube-v1", obs_mode="state"), 1, chunk=8, seed=0, backend="cpu")
    chunks, steps, last = replay(batched, solved[0], pad=random_actions(5, 8))
    assert steps == len(solved[0]["action"]) and last["success"].all() and last["terminated"].all() and last["reward"] == 1
    assert not batched.step(random_actions(0, 1, 8))[4]["steps"].any()
    with pytest.raises(EnvError, match="shape"):
        batched.step(np.zeros((1, 7)))
    batched.close()


class BatchedTask:
    """What `CudaVecEnv` uses of a batched ManiSkill task, for a scene of one thing per environment, whose "pose" is (x, y, noise of
    the start, distance pushed, simulation steps). It succeeds when pushed 3 far."""

    device, _obs_mode, agent = torch.device("cpu"), "rgb", SimpleNamespace()
    single_action_space = gym.spaces.Box(-1, 1, (7,))

    def __init__(self, num_envs: int):
        self.num_envs, self.pose, self.bookkeeping = num_envs, torch.zeros(num_envs, 5), torch.zeros(num_envs)
        self._elapsed_steps = torch.zeros(num_envs)
        self.scene = SimpleNamespace(sensors={"camera": None}, _reset_mask=torch.ones(num_envs, dtype=torch.bool))

    def reset(self, seed, options):
        self._batched_episode_rng = [np.random.RandomState(s) for s in seed]
        self._episode_rng = self._batched_episode_rng[0]
        self.scene._reset_mask[:] = False
        self.scene._reset_mask[options["env_idx"]] = True
        self._initialize_episode(options["env_idx"], options)
        self.scene._reset_mask[:] = True

    def _initialize_episode(self, env_idx, options):  # draws for the whole batch, as ManiSkill's tasks do
        n = len(env_idx)
        noise = torch.as_tensor(self._episode_rng.normal(size=n)).float()
        columns = [torch.rand(n), torch.rand(n), noise, torch.zeros(n), torch.zeros(n)]
        self.pose[self.scene._reset_mask] = torch.stack(columns, dim=1)
        self.bookkeeping[env_idx] += 1

    def get_state_dict(self):
        return {"actors": {"thing": self.pose.clone()}}

    def set_state_dict(self, state, env_idx):
        self.pose[env_idx] = state["actors"]["thing"]

    def get_info(self):
        return {"success": self.pose[:, 3] >= 3}

    def _step_action(self, action):
        self.pose[:, 3] += action[:, 0]
        self.pose[:, 4] += 1

    def _get_obs_agent(self):
        return {"pose": self.pose.clone()}

    def _get_obs_extra(self, info):
        return {}

    def _get_obs_sensor_data(self):
        return {"camera": {"rgb": self.render_rgb_array()}}

    def render_rgb_array(self):  # as bright as there were simulation steps
        return self.pose[:, 4].byte()[:, None, None, None].expand(-1, 4, 4, 3)


@pytest.fixture
def batch(monkeypatch):
    task = BatchedTask(6)
    monkeypatch.setattr(maniskill, "create", lambda *_: SimpleNamespace(unwrapped=task, close=lambda: None))
    return CudaVecEnv(ManiSkillSpec("PickCube-v1", image_size=4, max_episode_steps=10), 6, chunk=4, seed=0)


def test_equal_seeds_start_alike_in_a_batch_whatever_else_is_in_it(batch):
    first = batch.reset(seed=[5, 9, 5, 9, 5, 3])[0]["state"]
    np.testing.assert_array_equal(first[[2, 3, 4]], first[[0, 1, 0]])
    assert len(np.unique(first[:, 0])) == 3
    second = batch.reset(seed=[1, 1, 1, 5, 9, 2])[0]["state"]
    np.testing.assert_array_equal(second[[3, 4]], first[[0, 1]])
    third = batch.reset(seed=[3, 0, 0, 3, 9, 0], options={"reset_mask": np.array([1, 0, 0, 1, 1, 0], bool)})[0]["state"]
    np.testing.assert_array_equal(third, [first[5], second[1], second[2], first[5], first[1], second[5]])
    assert batch.base.bookkeeping.tolist() == [4, 3, 3, 4, 4, 3]  # followers are initialised as well (the first time by __init__)


def test_what_ends_in_a_batch_stays_as_it_was(batch):
    batch.reset(seed=0)
    chunk = np.zeros((6, 4, 7))
    chunk[:3, :, 0] = np.array([[1.5], [1.0], [0.5]])  # succeed in steps 2, 3 and 6; the limit is 10

    def outcome(result):
        obs, reward, terminated, truncated, info = result
        steps_seen = [obs["state"][:, 4].tolist(), obs["image"][:, 0, 0, 0, 0].tolist(), [int(f[0, 0, 0]) for f in batch.render()]]
        assert steps_seen[0] == steps_seen[1] == steps_seen[2]
        return info["steps"].tolist(), steps_seen[0], terminated.tolist(), truncated.tolist(), reward.tolist()

    no = [False] * 6
    assert outcome(batch.step(chunk)) == ([2, 3, 4, 4, 4, 4], [2, 3, 4, 4, 4, 4], [True, True, *no[2:]], no, [1, 1, 0, 0, 0, 0])
    chunk[0] = np.nan
    assert outcome(batch.step(chunk)) == ([0, 0, 2, 4, 4, 4], [2, 3, 6, 8, 8, 8], [*[True] * 3, *no[3:]], no, [0, 0, 1, 0, 0, 0])
    batch.reset(seed=9, options={"reset_mask": np.arange(6) == 2})
    steps, seen, _, truncated, _ = outcome(batch.step(np.zeros((6, 4, 7))))
    assert steps == [0, 0, 4, 2, 2, 2] and seen == [2, 3, 4, 10, 10, 10] and truncated == [False] * 3 + [True] * 3


class GridTask(BatchedTask):
    """One like RLinf's: an episode is a number, told at a reset, and only the whole batch can be reset."""

    total_num_trials = 1000

    def reset(self, seed, options):
        self._initialize_episode(torch.arange(self.num_envs), options)

    def _initialize_episode(self, env_idx, options):
        self._reset_episode_idx(env_idx, self.total_num_trials, options)

    def _reset_episode_idx(self, env_idx, number, options):
        assert len(env_idx) == self.num_envs and options["episode_id"].max() < number
        self.pose[:] = 0
        self.pose[:, 0] = options["episode_id"]


def test_a_task_whose_episodes_are_numbered_begins_them_all_at_once(monkeypatch):
    task = GridTask(3)
    monkeypatch.setattr(maniskill, "create", lambda *_: SimpleNamespace(unwrapped=task, close=lambda: None))
    batch = CudaVecEnv(ManiSkillSpec("PickCube-v1", image_size=4, max_episode_steps=4), 3, chunk=4, seed=0)
    first = batch.reset(seed=[5, 9, 5])[0]["state"][:, 0]
    assert first[0] == first[2] != first[1]
    one = dict(options={"reset_mask": np.arange(3) == 0})
    with pytest.raises(EnvError, match="PickCube-v1 begins all its episodes at once"):
        batch.reset(seed=9, **one)
    end = batch.step(np.zeros((3, 4, 7)))[0]["state"]
    again = batch.reset(seed=9, **one)[0]["state"]
    assert again[0, 0] == first[1] and again[0, 4] == 0
    np.testing.assert_array_equal(again[1:], end[1:])
    assert [int(frame[0, 0, 0]) for frame in batch.render()] == [0, 4, 4]


def test_processes_take_over_where_physx_cannot_simulate_on_the_gpu(monkeypatch):
    """A GPU without PhysX's library for it, which is downloaded at the first use: a warning, and the pool."""
    tasks.registry()
    from sapien import physx

    def offline():
        raise ConnectionError("no network")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(physx, "enable_gpu", offline)
    tasks.gpu_simulation.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no network"):
            assert tasks.gpu_simulation() is False
    finally:
        tasks.gpu_simulation.cache_clear()
