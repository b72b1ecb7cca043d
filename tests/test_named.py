"""PickNamedCube-v1: which of two cubes is meant is in the sentence, and nowhere else."""

import numpy as np
import pytest
import torch

from pi_stepnft import envs, policies
from pi_stepnft.envs import demos, vulkan
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.maniskill import ManiSkillSpec, experts
from pi_stepnft.envs.maniskill import env as maniskill
from pi_stepnft.envs.maniskill.cuda import CudaVecEnv

try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)

TASK, COLORS = "PickNamedCube-v1", ("red", "blue")
EXCHANGED = dict(exchanged=True)
SEEDS = range(20, 32)


@pytest.fixture(scope="module")
def named():
    return maniskill.ManiSkillEnv(ManiSkillSpec(TASK, obs_mode="state"))


@pytest.fixture(scope="module")
def exchanged():
    return maniskill.ManiSkillEnv(ManiSkillSpec(TASK, obs_mode="state", kwargs=EXCHANGED))


class Reader(experts.PickNamedCube):
    """Does what the sentence says."""

    def cube(self):
        [told] = self.env.get_language_instruction()
        return self.env.cubes[next(i for i, color in enumerate(COLORS) if color in told)]


def observe(env) -> np.ndarray:
    image, state = np.zeros((len(env.cameras), 96, 96, 3), np.uint8), np.zeros(env.state_dim, np.float32)
    env.observe(image, state)
    return np.concatenate([image.ravel(), state])


def play(env, expert, seed: int) -> tuple[list[np.ndarray], bool]:
    """Observations and success of an episode of an expert."""
    env.reset(seed)
    expert.reset()
    seen = [observe(env)]
    while not env.success and env.steps < env.max_episode_steps:
        env.step(expert.act()[None])
        seen.append(observe(env))
    return seen, env.success


def test_a_seed_is_a_scene_and_a_sentence_and_both_colours_occur(named):
    told, first = [], {}
    for seed in (*SEEDS, *SEEDS):
        named.reset(seed)
        told.append(named.instruction)
        np.testing.assert_array_equal(observe(named), first.setdefault(seed, observe(named)))
        red, blue = named.object_positions()
        assert np.linalg.norm(red - blue) >= 0.08 - 1e-6 and np.abs([red[:2], blue[:2]]).max() <= 0.1
    assert told[: len(SEEDS)] == told[len(SEEDS) :]
    assert set(told) == {f"pick up the {color} cube and move it to the goal" for color in COLORS}
    assert len(np.unique(list(first.values()), axis=0)) == len(SEEDS)


def test_the_expert_picks_the_cube_that_is_meant_and_the_other_does_not_count(named):
    expert = named.expert()
    assert sum(play(named, expert, seed)[1] for seed in SEEDS) >= 0.9 * len(SEEDS)
    expert.cube = lambda: named.base.cubes[1 - named.base.meant[0]]
    assert not any(play(named, expert, seed)[1] for seed in SEEDS[:4])


@pytest.mark.parametrize("obs_mode", ["state", "rgb"])
def test_no_observation_tells_which_cube_is_meant(named, obs_mode):
    env = named if obs_mode == "state" else maniskill.ManiSkillEnv(ManiSkillSpec(TASK))
    expert = env.expert()
    for seed in SEEDS[:1]:
        env.reset(seed)
        expert.reset()
        for _ in range(12):  # the cube is in the hand then
            seen = []
            for _ in COLORS:
                env.base.meant = 1 - env.base.meant
                env._info = None
                seen.append(observe(env))
            np.testing.assert_array_equal(*seen)
            env.step(expert.act()[None])
        assert env.info["is_grasped"].sum() == 1


def test_exchanged_sentences_change_nothing_else_and_who_reads_fails(named, exchanged):
    for seed in SEEDS[:4]:
        (scenes, won), (others, won_too) = (play(env, env.expert(), seed) for env in (named, exchanged))
        np.testing.assert_array_equal(scenes, others)
        assert won and won_too
        red, blue = COLORS if "red" in named.instruction else COLORS[::-1]
        assert exchanged.instruction == named.instruction.replace(red, blue)
    outcomes = [[play(env, Reader(env.base), seed)[1] for seed in SEEDS[:4]] for env in (named, exchanged)]
    assert all(outcomes[0]) and not any(outcomes[1])


def test_workers_and_the_batched_simulation_tell_the_same_sentences(exchanged):
    venv = envs.make(TASK, 4, num_workers=2, obs_mode="state", backend="cpu", kwargs=EXCHANGED)
    obs, _ = venv.reset(seed=list(SEEDS[:4]))
    batch = CudaVecEnv(exchanged.spec, 1, chunk=4, seed=0, backend="cpu")
    for i, seed in enumerate(SEEDS[:4]):
        exchanged.reset(seed)
        alone, _ = batch.reset(seed=int(seed))
        assert venv.instructions[i] == batch.instructions[0] == exchanged.instruction
        np.testing.assert_array_equal(obs["state"][i], observe(exchanged))
        np.testing.assert_allclose(alone["state"][0], observe(exchanged), atol=1e-6)
    venv.close()
    batch.close()


def test_demonstrations_hold_the_sentence_of_each_episode(tmp_path):
    venv = envs.make(TASK, 4, num_workers=0, obs_mode="state", backend="cpu")
    data = demos.collect(tmp_path / "named.h5", venv, 6, progress=False)
    venv.close()
    assert len(data.instructions) == 2 and set(data.told[data.start]) == {0, 1}


def test_the_start_that_ships_goes_to_the_cube_that_the_sentence_names(named):
    policy, states, ways = policies.load("pi0-tiny-picknamedcube-state").eval(), [], []
    for seed in SEEDS:
        named.reset(seed)
        states.append(observe(named))
        ways.append(named.object_positions()[:, :2] - named.base.agent.tcp_pose.p[0, :2].numpy())
    ways = np.array(ways) / np.linalg.norm(ways, axis=2, keepdims=True)  # (scenes, cubes, 2)
    torch.manual_seed(0)
    for i, color in enumerate(COLORS):
        actions = policy.act(dict(state=np.array(states)), [f"pick up the {color} cube and move it to the goal"] * len(SEEDS))
        towards = np.einsum("sci,si->sc", ways, actions[:, 0, :2])
        assert (towards[:, i] > towards[:, 1 - i]).mean() >= 0.9


def test_there_is_no_dense_reward():
    with pytest.raises(EnvError, match="reward mode: dense"):
        envs.make(TASK, 1, num_workers=0, obs_mode="state", backend="cpu", reward_mode="dense")
