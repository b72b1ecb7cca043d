"""lerobot's view of the environments (benchmarks/lerobot_export.py runs its own evaluation on them)."""

import gymnasium as gym
import numpy as np
import pytest
import toy_simulator

from pi_stepnft import envs
from pi_stepnft.envs.envhub import hub


@pytest.fixture
def make_env(monkeypatch):
    monkeypatch.setitem(envs.SIMULATORS, "toy", toy_simulator.Toy())
    made = []

    def make(n_envs, **options):
        ((suite, by_task),) = hub("Point-v0", image_size=16, **options)(n_envs=n_envs, use_async_envs=False).items()
        made.append(by_task[0])
        assert suite == "Point-v0" and list(by_task) == [0]
        return by_task[0]

    yield make
    for env in made:
        env.close()


def test_observations_and_what_lerobot_asks_for_have_its_names(make_env):
    env = make_env(3, cameras=["top"])
    assert isinstance(env, gym.vector.VectorEnv) and env.single_action_space.shape == (2,)
    obs, info = env.reset(seed=[5, 6, 7], options={"lerobot_new_rollout": True})
    assert obs in env.observation_space and set(obs) == {"pixels", "agent_pos"} and set(obs["pixels"]) == {"top"}
    assert obs["pixels"]["top"].shape == (3, 16, 16, 3) and obs["agent_pos"].shape == (3, 2)
    assert env.call("task_description") == ("go to the goal",) * 3 and env.get_attr("task") == ("Point-v0",) * 3
    assert env.call("_max_episode_steps") == (30,) * 3 and len(env.call("render")) == 3
    with pytest.raises(AttributeError, match="has no 'colour', only task_description"):
        env.get_attr("colour")
    with pytest.raises(envs.EnvError, match="cameras are ; expected names for above"):
        make_env(1, cameras=())


def test_single_steps_are_those_of_chunks_and_what_has_ended_stays(make_env):
    env = make_env(2, obs_mode="state")
    venv = envs.make("Point-v0", 2, obs_mode="state", chunk=5, num_workers=1)
    seeds, rng = [1, 2], np.random.default_rng(0)
    obs, _ = env.reset(seed=seeds)
    chunked, _ = venv.reset(seed=seeds)
    goal = obs["agent_pos"][0, 2:].copy()
    ended = np.zeros(2, bool)
    for _ in range(6):
        at = chunked["state"][0, :2]
        chunk = rng.uniform(-1, 1, (2, 5, 2))
        chunk[0] = np.clip((goal - at) / 0.5, -1, 1)  # the first goes straight there, the other anywhere
        chunked, _, terminated, truncated, info = venv.step(chunk)
        for action in chunk.swapaxes(0, 1):
            obs, _, done, cut, told = env.step(action)
            ended |= done | cut
        np.testing.assert_array_equal(obs["agent_pos"], chunked["state"])
        np.testing.assert_array_equal(told["is_success"], info["success"])
    venv.close()
    assert told["is_success"].tolist() == [True, False] and ended.all() and "pixels" not in obs
    (again, _), still = env.reset(seed=seeds), obs["agent_pos"]
    assert not np.array_equal(again["agent_pos"], still) and not env.step(np.zeros((2, 2)))[4]["is_success"].any()
