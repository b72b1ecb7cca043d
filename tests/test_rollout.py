"""The episodes of an iteration: what a turn holds, and that neither halves nor lost workers change the others."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_simulator

from pi_stepnft import envs
from pi_stepnft.harness.rollout import Rollout

SEEDS = np.array([7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12])  # of 12 episodes, six at a time


@pytest.fixture(params=[0])
def venv(request, monkeypatch):
    monkeypatch.setitem(envs.SIMULATORS, "toy", toy_simulator.Toy())
    venv = envs.make("Point-v0", 6, obs_mode="state", num_workers=request.param, chunk=4, speed=0.2)
    yield venv
    venv.close()


in_workers = pytest.mark.parametrize("venv", [3], indirect=True)


def play(venv, *, overlap: bool = False, during=lambda turn: None, **options) -> SimpleNamespace:
    """Episodes of a policy that heads for the goal with noise; what each saw and did, by episode and turn."""
    options = dict(execute=3, max_steps=18, shape=(4, 2), device=torch.device("cpu"), key=(1, 5), observe_cut=False) | options
    rollout = Rollout(venv, SEEDS, overlap=overlap, **options)
    seen, cut, order = {}, [], []
    for turn in rollout:
        during(turn)
        if turn.cut:
            cut += turn.episode.tolist()
            continue
        place, goal = np.split(turn.obs["state"], 2, axis=1)
        actions = torch.from_numpy((goal - place)[:, None] * 3).clip(-1, 1) + turn.noise(2)[:, 1, :3]
        for row, key in enumerate(zip(turn.episode.tolist(), turn.number.tolist())):
            seen[key] = turn.obs["state"][row].tolist(), actions[row].tolist(), turn.integers(100)[row].item()
        order.append((turn.number[0].item(), turn.episode.tolist()))
        turn.act(actions)
    return SimpleNamespace(rollout=rollout, seen=seen, cut=cut, order=order)


def test_a_rollout_plays_every_episode_to_its_end(venv):
    played = play(venv, observe_cut=True)
    rollout = played.rollout
    assert rollout.success.shape == (12,) and 2 <= rollout.success.sum() <= 10 and not rollout.lost.any()
    np.testing.assert_array_equal(rollout.terminated, rollout.success)
    assert rollout.rewards.shape == (12, 6) and (rollout.rewards.sum(1) == rollout.success).all()
    assert played.cut == np.flatnonzero(~rollout.success).tolist()
    lengths = np.bincount([episode for episode, _ in played.seen])
    assert (lengths[~rollout.success] == 6).all()
    np.testing.assert_array_equal(rollout.rewards[np.arange(12), lengths - 1], rollout.success)
    assert 3 * (lengths - 1).sum() < rollout.env_steps <= 3 * lengths.sum()
    first = {episode: played.seen[episode, 0] for episode in range(12)}
    assert first[0][0] == first[1][0] != first[2][0] and first[0][1] != first[1][1]  # one initial state, another noise


@in_workers
def test_halves_are_the_same_episodes_in_another_order(venv):
    whole, halves = play(venv, observe_cut=True), play(venv, overlap=True, observe_cut=True)
    assert halves.seen == whole.seen and sorted(halves.cut) == whole.cut
    for name in ("success", "lost", "terminated", "rewards", "env_steps"):
        np.testing.assert_array_equal(getattr(halves.rollout, name), getattr(whole.rollout, name))
    assert halves.order[:2] == [(0, [0, 1, 2]), (0, [3, 4, 5])] and whole.order[0] == (0, [0, 1, 2, 3, 4, 5])
    assert {*halves.order[2][1]} < {0, 1, 2}  # one half has its second turn while the other is under way


def test_noise_follows_from_seed_iteration_episode_and_turn(venv):
    one, same = play(venv).seen, play(venv).seen
    other_run, other_iteration = play(venv, key=(2, 5)).seen, play(venv, key=(1, 6)).seen
    assert one == same and all(one[0, 0][1:] != other[0, 0][1:] for other in (other_run, other_iteration))
    assert len({str(actions) for _, actions, _ in one.values()}) == len(one)
    drawn = [number for _, _, number in one.values()]
    assert len(set(drawn)) > 20 and min(drawn) < 20 and max(drawn) >= 80


@in_workers
@pytest.mark.parametrize("overlap", [False, True])
def test_a_worker_that_dies_costs_the_episodes_that_it_holds(overlap, venv):
    """Of both halves, where the other one's are under way."""

    def kill_once(turn):
        if venv._workers[1].process.pid == first and turn.number[0] == 1 and 0 in turn.episode:
            os.kill(first, signal.SIGKILL)
            time.sleep(0.1)

    first = venv._workers[1].process.pid
    quiet = play(venv, overlap=overlap)
    with pytest.warns(UserWarning, match="worker 1 died of SIGKILL"):
        played = play(venv, overlap=overlap, during=kill_once)
    lost = np.flatnonzero(played.rollout.lost)
    running = [episode for episode in (1, 4) if (episode, 1) in quiet.seen]  # slots 1 and 4 are worker 1's
    assert lost.tolist() == running and len(running)
    kept = ~played.rollout.lost
    np.testing.assert_array_equal(played.rollout.success[kept], quiet.rollout.success[kept])
    assert {key: value for key, value in played.seen.items() if key[0] not in lost} == {
        key: value for key, value in quiet.seen.items() if key[0] not in lost}
