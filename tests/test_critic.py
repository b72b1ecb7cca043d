"""Facts about replay with a chunk critic: sampler, choice, targets, critics; a bandit; and short runs."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import test_main
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_main import checkpoints, one_thread, only_run, run, same, scalars, weights  # noqa: F401 (fixtures)
from test_pi05 import random_policy
from test_rivals import Bandit, draw_lots  # noqa: F401 (a fixture)
from test_stepnft import prefix_and_state, succeeded

from pi_stepnft import policies
from pi_stepnft.algos import critic

K = 4
SOLVER = dict(num_steps=K, noise_level=0.5)


# -------------------------------------------------------------------------------------------------------------- the sampler


@torch.no_grad()
def test_candidates_are_what_each_noise_would_give_alone(policy):
    prefix, state = prefix_and_state(policy, 5)
    noise = torch.randn(5, 3, K + 1, 8, 8)
    x, v = critic.flow_sde_sample(policy, prefix, state, noise, **SOLVER)
    alone, _ = zip(*(critic.flow_sde_sample(policy, prefix, state, noise[:, i : i + 1], **SOLVER) for i in range(3)))
    torch.testing.assert_close(x, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    ode, _ = critic.flow_sde_sample(policy, prefix, state, noise, num_steps=K, noise_level=0.0)
    torch.testing.assert_close(ode[:, 2, -1], policy.sample(prefix, state, noise[:, 2, 0], num_steps=K), rtol=1e-4, atol=1e-4)
    assert (ode - x)[:, :, -1].abs().mean() > 0.05
    times = (1 - torch.arange(K) / K).expand(5, K)  # what an update asks at the stored path
    torch.testing.assert_close(policy.velocity(prefix, state, x[:, 1, :-1], times), v[:, 1], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- the choice


def test_a_chunk_is_drawn_as_often_as_the_softmax_says():
    chance, uniform = torch.tensor([0.2, 0.5, 0.4]), (torch.arange(10_000) + 0.5) / 10_000
    drawn = critic.choose(chance.expand(10_000, 3), uniform, 0.1)
    torch.testing.assert_close(drawn.bincount() / 10_000, (chance / 0.1).softmax(0), rtol=0, atol=1e-3)
    assert (critic.choose(chance.expand(9, 3), torch.arange(9) / 9, 1e-4) == 1).all()  # with little temperature the best
    assert critic.choose(torch.full((1, 8), 0.5), torch.tensor([1 - 2.0**-24]), 1.0).item() == 7


def test_the_row_of_a_later_chunk_is_of_the_same_episode():
    episode, turn = np.array([4, 0, 4, 0, 4, 1]), np.array([0, 1, 2, 0, 1, 0])  # as they come from a rollout: in any order
    assert critic.later_rows(episode, turn, 1).tolist() == [4, -1, -1, 1, 2, -1]
    assert critic.later_rows(episode, turn, 2).tolist() == [2, -1, -1, -1, -1, -1]
    assert critic.later_rows(episode, turn, 3).tolist() == [-1] * 6


# -------------------------------------------------------------------------------------------------------------- the critics


def test_targets_are_outcomes_at_the_end_and_before_it_what_the_next_draw_promises():
    chance = torch.tensor([[0.2, 0.6], [0.2, 0.6], [0.9, 0.9]])
    ended, outcome = torch.tensor([False, True, False]), torch.tensor([1.0, 0.0, 0.0])
    y = critic.critic_targets(chance, ended, outcome, 0.2)
    drawn = np.exp(2) / (1 + np.exp(2))  # how often the better one is drawn
    torch.testing.assert_close(y, torch.tensor([0.2 + 0.4 * drawn, 0.0, 0.9], dtype=torch.float32))
    torch.testing.assert_close(critic.critic_targets(chance, ended, outcome, 1e-3)[0], torch.tensor(0.6))  # the best
    torch.testing.assert_close(critic.critic_targets(chance, ended, outcome, 1e3)[0], torch.tensor(0.4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_critics_know_nothing_at_first_and_the_lower_one_counts(kind):
    torch.manual_seed(0)
    acting = policies.Pi0(policies.Pi0Config.tiny(num_cameras=0)) if kind == "pi0" else random_policy(num_cameras=0)
    prefix, state = prefix_and_state(acting.eval(), 6)
    critics, time, acts = critic.Critics(acting, 35, 32), torch.arange(6) / 8, torch.randn(6, 4, 35)
    seen = critics.see(acting, prefix, state, time)
    assert (critics.chance(seen, acts) == 0.5).all()
    assert torch.equal(seen[:, -1], time) and torch.equal(seen[:, -1 - state.shape[1] : -1], state)
    for net in critics.nets:
        torch.nn.init.normal_(net[-1].weight)
    one, other = critics(seen, acts).sigmoid()
    assert (one > other).any() and (one < other).any()
    torch.testing.assert_close(critics.chance(seen, acts), torch.minimum(one, other))
    torch.testing.assert_close(critics.chance(seen, acts)[:, 2], critics.chance(seen, acts[:, 2]))


def test_uphill_is_where_the_mean_chance_grows():
    torch.manual_seed(0)
    critics = critic.Critics(SimpleNamespace(critic_width=2, config=SimpleNamespace(state_dim=3)), 7, 16)
    for net in critics.nets:
        torch.nn.init.normal_(net[-1].weight)
    seen, acts = torch.randn(5, 6), torch.randn(5, 7)
    gradient, step = critic.uphill(critics, seen, acts), 1e-2 * torch.randn(5, 7)
    chance = lambda x: critics(seen, x).sigmoid().mean(0)
    torch.testing.assert_close((gradient * step).sum(1), (chance(acts + step) - chance(acts - step)) / 2, rtol=1e-2, atol=1e-5)
    assert all(parameter.grad is None for parameter in critics.parameters())


def test_the_chunk_that_a_path_is_headed_for_moves_by_the_shift():
    torch.manual_seed(0)
    v_old, t, mask = torch.randn(3, K, 8, 8), (1 - torch.arange(K) / K).expand(3, K), torch.zeros(8, 8, dtype=torch.bool)
    mask[:5, :7] = True
    shift = 0.1 * torch.randn(3, 35)
    full = torch.zeros(3, 1, 8, 8)
    full[:, 0, mask] = shift
    v_star = v_old - full / t[..., None, None]  # x_t − t·v, the chunk, is further by the shift
    junk = torch.where(mask, v_star, torch.randn(8, 8))
    for v, loss, pulled in ((v_old, shift.square().mean(), 0.0), (v_star, 0.0, 1.0), (junk, 0.0, 1.0),
                            ((v_old + v_star) / 2, shift.square().mean() / 4, 0.5)):
        found, metrics = critic.pull_loss(v, v_old, t, shift, mask)
        assert found.item() == pytest.approx(float(loss), abs=1e-8) and metrics["pulled"].item() == pytest.approx(pulled, abs=1e-4)


def test_the_judges_follow_slowly():
    new, slow = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = copy.deepcopy(slow)
    critic.follow(slow, new, 0.25)
    torch.testing.assert_close(slow.weight, 0.75 * before.weight + 0.25 * new.weight)
    assert new.weight.grad is None


# -------------------------------------------------------------------------------------------------------------- a bandit


def solve_bandit(flipped: bool = False, iterations: int = 20, episodes: int = 256) -> tuple[float, float]:
    """Success by the ODE before and after training on one-chunk episodes, all from one initial state."""
    torch.manual_seed(0)
    actor, seen = Bandit(), torch.zeros(episodes, 1)
    critics = critic.Critics(SimpleNamespace(critic_width=0, config=SimpleNamespace(state_dim=0)), 2, 64)
    judges = copy.deepcopy(critics).requires_grad_(False)
    groups = [dict(params=actor.parameters(), lr=3e-3), dict(params=critics.parameters(), lr=1e-3)]
    optimizer, replay = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5), []
    noise = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(1))
    success_rate = lambda: succeeded(actor.sample(noise, None, noise)).float().mean().item()
    mask, t, every = torch.ones(1, 2, dtype=torch.bool), (1 - torch.arange(K) / K).expand(episodes, K), torch.arange(episodes)
    before = success_rate()
    for iteration in range(iterations):
        with torch.no_grad():
            x, v = critic.flow_sde_sample(actor, None, None, torch.randn(episodes, 4, K + 1, 1, 2), **SOLVER)
            chosen = critic.choose(judges.chance(seen, x[:, :, -1, 0]), torch.rand(episodes), 0.05)
            x, v = x[every, chosen], v[every, chosen]
        executed = x[:, -1, 0]
        replay.append((executed, (succeeded(executed[:, None]) ^ flipped).float()))
        acts, outcome = map(torch.cat, zip(*replay))
        for _ in range(40):
            row = torch.randint(len(acts), (episodes,))
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(critics(seen, acts[row]), outcome[row].expand(2, -1)).backward()
            optimizer.step()
            critic.follow(judges, critics, 0.1)
        gradient = critic.uphill(judges, seen, executed)
        shift = 0.3 * gradient / gradient.square().mean().sqrt().clamp(min=1e-12)
        for _ in range(8 * (iteration > 1)):
            optimizer.zero_grad()
            critic.pull_loss(actor.velocity(None, None, x[:, :-1], t), v, t, shift, mask)[0].backward()
            optimizer.step()
    return before, success_rate()


def test_it_solves_the_bandit_and_learns_to_fail_with_flipped_outcomes():
    before, after = solve_bandit()
    assert 0.2 < before < 0.35 and after > 0.95
    assert solve_bandit(flipped=True)[1] < 0.05


# ------------------------------------------------------------------------------------------------------------ the program


def test_help_explains_every_option(monkeypatch, capsys):
    test_main.test_help_explains_every_option(critic, monkeypatch, capsys)


SHORT = (
    "--obs-mode state --num-envs 4 --rollout-epochs 2 --rollout-steps 10 --candidates 3 --n-step 1 --eval-episodes 2 "
    "--eval-every 0 --final-eval-episodes 2 --num-minibatches 1 --warmup-iterations 0 --critic-warmup 1 --num-threads 1 --no-video"
).split()


def start(cwd, checkpoint, *arguments):
    """A short run in `cwd`; returns its folder."""
    cwd.mkdir()
    run("critic", *SHORT, "--checkpoint", checkpoint, *arguments, cwd=cwd)
    return only_run(cwd)


def training(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "training.safetensors")


def test_critics_learn_first_and_a_run_goes_on_as_if_never_stopped(checkpoints, draw_lots, tmp_path):  # noqa: F811
    whole = start(tmp_path / "whole", checkpoints["state"], "--iterations", 2)
    parts = start(tmp_path / "parts", checkpoints["state"], "--iterations", 1)
    initial, first = weights(checkpoints["state"]), weights(parts / "policy")
    assert same(initial, first)  # --critic-warmup 1
    held = training(parts)
    assert held["trained.critics.0"].shape == held["trained.judges.0"].shape
    assert not torch.equal(held["trained.critics.0"], held["trained.judges.0"])  # which follow slowly
    run("critic", "--resume", parts, "--iterations", 2, cwd=tmp_path / "parts")
    last = weights(parts / "policy")
    changed = {name for name in initial if not torch.equal(initial[name], last[name])}
    assert changed and not any(name.startswith("language_model.") for name in changed)
    assert same(last, weights(whole / "policy")) and same(training(parts), training(whole))
    logged = scalars(whole)
    assert set(logged["losses/loss"]) == {2} and set(logged["losses/critic"]) == {1, 2}
    assert logged["charts/chance"][1] == 0.5 and logged["charts/prediction_error"][1] == 0.25
    assert logged["charts/chance"][2] != 0.5 and logged["charts/chance_spread"][2] > 0
    result = json.loads((parts / "result.json").read_text())
    assert result["algorithm"] == "critic_pi0" and result["iterations"] == 2 and result["forward_passes"] == K
    assert logged["losses/pulled"][2] == pytest.approx(0, abs=1e-3)  # one minibatch: before the step


@pytest.mark.parametrize("replay", [1, 2])
def test_critics_learn_from_as_many_iterations_as_they_are_told(replay, checkpoints, draw_lots, tmp_path):  # noqa: F811
    held = training(start(tmp_path / "run", checkpoints["state"], "--iterations", 2, "--replay", replay))
    fields = [[held[f"memory.{i}.{j}"] for j in range(6)] for i in range(replay)]
    assert f"memory.{replay}.0" not in held and {len(field) for field in fields[0]} == {16}  # 8 episodes of two chunks
    seen, acts, later_seen, later_acts, ended, outcome = fields[-1]
    assert later_acts.shape == (16, 3, 35) and acts.shape == (16, 35) and ended.tolist() == [False] * 4 + [True] * 4 + [
        False] * 4 + [True] * 4  # a turn of four environments after the other, twice
    assert torch.equal(later_seen[:4], seen[4:8]) and torch.equal(later_seen[8:12], seen[12:])
    assert (later_acts[:4] == acts[4:8, None]).all(-1).any(-1).all()  # one of the candidates was executed
    assert outcome.tolist() == [1.0, 0.0, 1.0, 1.0] * 4
