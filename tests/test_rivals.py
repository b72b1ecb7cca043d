"""Facts about GRPO, DiffusionNFT and rejection fine-tuning: what they compute, a bandit they must solve, whole short runs."""

import ast
import contextlib
import copy
import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import test_main
import torch
from test_main import checkpoints, one_thread, only_run, refusal, run, same, scalars, weights  # noqa: F401
from test_stepnft import Field, prefix_and_state, succeeded
from torch.distributions import Normal

from pi_stepnft import envs, policies
from pi_stepnft.algos import critic, grpo, nft, ppo, rft, stepnft_pi0, stepnft_pi05

K = 4
MODULES = dict(grpo=grpo, nft=nft, rft=rft)
EACH = pytest.mark.parametrize("name", MODULES)
SOLVER = dict(num_steps=K, noise_level=0.5)


def executed(positions: int = 5, dims: int = 7) -> torch.Tensor:
    """The mask of what is executed of the tiny policy's chunks (8, 8)."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:positions, :dims] = True
    return mask


# -------------------------------------------------------------------------------------------------------------- GRPO


@torch.no_grad()
def test_one_solver_step_of_a_chunk_is_noisy_and_its_density_is_that_gaussians(policy):
    prefix, state = prefix_and_state(policy, 32)
    step = torch.randint(K, (32,))
    x, log_probs = grpo.flow_sde_sample(policy, prefix, state, step, torch.randn(32, K + 1, 8, 8), **SOLVER, mask=executed())
    assert x.shape == (32, K + 1, 8, 8) and set(step.tolist()) == set(range(K))
    for i in range(K):
        v = policy.velocity(prefix, state, x[:, i], torch.full((32,), 1 - i / K))
        noise = (x[:, i + 1] - (x[:, i] - v / K)).abs().amax((1, 2))  # what an Euler step does not explain
        assert (noise[step != i] < 1e-5).all() and (noise[step == i] > 1e-2).all()
        mean, std = stepnft_pi0.flow_sde_step(x[:, i], v, torch.full((32,), i), **SOLVER)
        expected = Normal(mean, std).log_prob(x[:, i + 1])[:, executed()].sum(1)
        torch.testing.assert_close(log_probs[step == i], expected[step == i], rtol=1e-4, atol=1e-3)


def test_the_ratio_is_one_at_the_first_minibatch_and_no_longer_after_a_step(policy):
    policy = copy.deepcopy(policy)
    prefix, state = prefix_and_state(policy, 16)
    with torch.no_grad():
        step = torch.randint(K, (16,))
        x, old = grpo.flow_sde_sample(policy, prefix, state, step, torch.randn(16, K + 1, 8, 8), **SOLVER, mask=executed())
    mb = torch.randperm(16)[:7]
    x_t, x_next = x[mb, step[mb]], x[mb, step[mb] + 1]

    def loss_now():
        v = policy.velocity(prefix[mb], state[mb], x_t, 1 - step[mb] / K)
        new = grpo.log_prob(x_next, *grpo.flow_sde_step(x_t, v, step[mb], **SOLVER), executed())
        return grpo.grpo_loss(new, old[mb], torch.ones(7), clip=0.2)

    loss, metrics = loss_now()
    assert loss.item() == pytest.approx(-1, abs=1e-4) and metrics["ratio_deviation"].item() < 1e-4
    assert metrics["clip_fraction"].item() == 0 and metrics["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    optimizer = torch.optim.SGD(policy.expert_parameters(), lr=1e-4)
    loss.backward()
    optimizer.step()
    after, metrics = loss_now()
    assert after < loss and metrics["ratio_deviation"].item() > 1e-3 and metrics["approx_kl"].item() > 0


def test_what_is_not_executed_has_no_part_in_the_density():
    x_next, mean, std = torch.randn(4, 8, 8), torch.randn(4, 8, 8), torch.full((4, 1, 1), 0.3)
    junk = torch.where(executed(), x_next, 50 * torch.randn(4, 8, 8))
    torch.testing.assert_close(grpo.log_prob(x_next, mean, std, executed()), grpo.log_prob(junk, mean, std, executed()))
    assert not torch.equal(grpo.log_prob(x_next, mean, std, executed()), grpo.log_prob(x_next, mean, std, executed(4)))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_the_clip_stops_pulling_one_way_only(advantage):
    for ratio in (0.5, 0.9, 1.0, 1.1, 2.0):
        new = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, metrics = grpo.grpo_loss(new, torch.zeros(1), torch.tensor([advantage]), clip=0.2)
        loss.backward()
        beyond = ratio > 1.2 if advantage > 0 else ratio < 0.8
        assert new.grad.item() == pytest.approx(0 if beyond else -advantage * ratio)  # descent raises what had an advantage
        assert metrics["clip_fraction"].item() == (abs(ratio - 1) > 0.2)
        assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


def test_advantages_sum_to_zero_in_a_group_and_groups_without_contrast_vanish():
    success = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 0], bool)
    group = np.array([7, 7, 7, 7, 2, 2, 5, 5, 9, 9])
    advantages, keep = grpo.group_advantages(success, group)
    assert keep.tolist() == [True] * 4 + [False] * 4 + [True] * 2  # 2: all succeed, 5: none does
    assert advantages[:4] == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, rel=1e-4)  # p = 1/4, deviation √3/4
    assert (advantages[4:8] == 0).all() and advantages[8:] == pytest.approx([1, -1], rel=1e-4)
    rng = np.random.default_rng(0)
    success, group = rng.random(256) < 0.7, np.arange(256) // 16
    advantages, keep = grpo.group_advantages(success, group)
    assert keep.any() and np.abs(advantages.reshape(16, 16).sum(1)).max() < 1e-9
    assert (np.sign(advantages[keep]) == np.where(success[keep], 1, -1)).all()


# -------------------------------------------------------------------------------------------------------------- NFT


def nft_gradient(v_theta, v_old, target_v, r, **options) -> torch.Tensor:
    v_theta = v_theta.clone().requires_grad_()
    nft.nft_loss(v_theta, v_old, target_v, r, **options)[0].backward()
    return v_theta.grad


def one_dimension(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([[[value]]]) for value in values]


@pytest.mark.parametrize("r", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_at_the_rollout_policy_descent_goes_towards_what_succeeded_and_away_from_what_failed(r, beta):
    v_old, target_v = one_dimension(0.3, -1.1)
    t = torch.tensor([0.6])
    gradient = nft_gradient(v_old, v_old, target_v, torch.tensor([r]), beta=beta).item()
    assert gradient == pytest.approx(2 * beta * (2 * r - 1) * (0.3 + 1.1), abs=1e-6)
    adaptive = nft_gradient(v_old, v_old, target_v, torch.tensor([r]), beta=beta, t=t).item()
    assert adaptive == pytest.approx(2 * beta * (2 * r - 1) * 0.6, abs=1e-6)  # t times the sign of v_old − v
    # It comes to rest where the two branches weigh the same: v_old + (2r − 1)·(v − v_old) / β
    v_star = v_old + (2 * r - 1) * (target_v - v_old) / beta
    assert nft_gradient(v_star, v_old, target_v, torch.tensor([r]), beta=beta).item() == pytest.approx(0, abs=1e-6)


def test_full_optimality_is_flow_matching_and_none_is_its_mirror():
    torch.manual_seed(0)
    v_theta, v_old, target_v = torch.randn(3, 6, 8, 8)
    flow = v_theta.clone().requires_grad_()
    (flow - target_v).square().mean().backward()
    torch.testing.assert_close(nft_gradient(v_theta, v_old, target_v, torch.ones(6), beta=1.0), flow.grad)
    loss, metrics = nft.nft_loss(v_theta, v_old, target_v, torch.ones(6))
    assert loss.item() == pytest.approx((v_theta - target_v).square().mean().item()) == pytest.approx(metrics["positive"].item())
    mirrored, _ = nft.nft_loss(2 * v_old - v_theta, v_old, target_v, torch.zeros(6))
    torch.testing.assert_close(mirrored, loss)
    assert metrics["drift"].item() == pytest.approx((v_theta - v_old).norm(dim=-1).mean().item())


def test_adaptive_errors_are_those_of_the_chunk_over_their_mean_size():
    torch.manual_seed(0)
    x_0, noise, v_theta, v_old = torch.randn(4, 6, 8, 8)
    t, r = torch.rand(6), torch.rand(6)
    x_t = (1 - t).view(-1, 1, 1) * x_0 + t.view(-1, 1, 1) * noise
    expected = 0.0
    for weight, v in ((r, v_theta), (1 - r, 2 * v_old - v_theta)):
        error = x_t - t.view(-1, 1, 1) * v - x_0
        expected += (weight * error.square().mean((1, 2)) / error.abs().mean((1, 2))).mean()
    torch.testing.assert_close(nft.nft_loss(v_theta, v_old, noise - x_0, r, t=t)[0], expected)


@pytest.mark.parametrize("t", [None, torch.rand(6)])
def test_nft_learns_nothing_from_what_is_not_executed(t):
    torch.manual_seed(0)
    tensors = torch.randn(3, 6, 8, 8)
    r, mask = torch.rand(6), executed()
    junk = torch.where(mask, tensors, 50 * torch.randn_like(tensors))
    cut = [x[:, :5, :7] for x in tensors]
    for other in (nft.nft_loss(*junk, r, t=t, mask=mask), nft.nft_loss(*cut, r, t=t)):
        torch.testing.assert_close(nft.nft_loss(*tensors, r, t=t, mask=mask), other)
    gradient = nft_gradient(*junk, r, t=t, mask=mask)
    assert (gradient[:, ~mask] == 0).all() and (gradient[:, mask] != 0).all()


@pytest.mark.parametrize("kind", ["binary", "group"])
def test_optimality_is_the_label_of_stepnft_between_zero_and_one(kind):
    rng = np.random.default_rng(0)
    length = rng.integers(1, 6, 32)
    success, group, episode = rng.random(32) < 0.5, np.arange(32) // 8, np.repeat(np.arange(32), length)
    chunks = (success, group, episode, np.concatenate([np.arange(n) for n in length]), kind)
    r, keep = nft.chunk_optimality(*chunks)
    labels, expected = stepnft_pi0.chunk_labels(*chunks)
    np.testing.assert_allclose(r, (labels + 1) / 2)
    assert (keep == expected).all() and set(r[success[episode]] > 0.5) | {keep.all()} >= {True}


# -------------------------------------------------------------------------------------------------------------- RFT


def test_rft_is_flow_matching_on_what_was_executed(policy):
    torch.manual_seed(0)
    prefix, state = prefix_and_state(policy, 3)
    actions, noise, t = torch.randn(3, 8, 8), torch.randn(3, 2, 8, 8), torch.rand(3, 2)
    loss = rft.rft_loss(policy, prefix, state, actions, noise, t, mask=executed())
    errors = [policy.flow_loss(prefix, state, actions, noise[:, i], t[:, i])[:, executed()] for i in range(2)]
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_rft_clones_successful_episodes_and_with_contrast_only_those_that_could_fail():
    success = np.array([1, 1, 0, 1, 0, 0], bool)
    group = np.array([4, 4, 8, 8, 6, 6])  # 4: all succeed, 6: none does
    episode = np.array([0, 1, 2, 3, 4, 5, 3, 2, 0])
    assert rft.chunks_to_clone(success, group, episode, False).tolist() == success[episode].tolist()
    assert rft.chunks_to_clone(success, group, episode, True).tolist() == (episode == 3).tolist()


@torch.no_grad()
def test_rft_samples_by_the_ode_unless_noise_is_asked_for(policy):
    prefix, state = prefix_and_state(policy, 5)
    noise = torch.randn(5, K + 1, 8, 8)
    x = rft.flow_sde_sample(policy, prefix, state, noise, num_steps=K, noise_level=0.0)
    noisy = rft.flow_sde_sample(policy, prefix, state, noise, **SOLVER)
    torch.testing.assert_close(x, policy.sample(prefix, state, noise=noise[:, 0], num_steps=K))
    assert (x - noisy).abs().mean() > 0.05


# -------------------------------------------------------------------------------------------------------------- a bandit


class Bandit(Field):
    """The bandit of test_stepnft.py as a policy: chunks of one action in two dimensions, and nothing to observe."""

    config = SimpleNamespace(horizon=1, action_dim=2, num_steps=K)
    sample, flow_loss = policies.Pi0.sample, policies.Pi0.flow_loss

    def velocity(self, prefix, state, x_t, t):
        return self(x_t.reshape(-1, 1, 2), t.flatten()).view_as(x_t)


def solve_bandit(name: str, flipped: bool = False, iterations: int = 25, episodes: int = 512, **options) -> tuple[float, float]:
    """Success by the ODE before and after training on one-chunk episodes, all from one initial state."""
    torch.manual_seed(0)
    module, none, mask, first = MODULES[name], torch.zeros(episodes, 1), torch.ones(1, 2, dtype=torch.bool), np.zeros(episodes, int)
    policy = Bandit()
    rollout_policy = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5)

    def success_rate() -> float:
        noise = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(1))
        return succeeded(policy.sample(noise, None, noise)).float().mean().item()

    before = success_rate()
    for iteration in range(iterations):
        with torch.no_grad():
            noise = torch.randn(episodes, 1 if name == "nft" else K + 1, 1, 2)
            if name == "grpo":
                step = torch.randint(K, (episodes,))
                xs, old = module.flow_sde_sample(policy, None, none, step, noise, **SOLVER, mask=mask)
                x = xs[:, -1]
            elif name == "nft":
                x = rollout_policy.sample(none, None, noise[:, 0])
            else:
                noise_level = options.get("noise_level", module.Args.noise_level)
                x = module.flow_sde_sample(policy, None, none, noise, num_steps=K, noise_level=noise_level)
        success = succeeded(x).numpy() ^ flipped
        if name == "grpo":
            values, keep = module.group_advantages(success, first)
        elif name == "nft":
            values, keep = module.chunk_optimality(success, first, np.arange(episodes), first, options.get("labels", "group"))
        else:
            values = keep = module.chunks_to_clone(success, first, np.arange(episodes), False)
        values, used = torch.from_numpy(values).float(), torch.from_numpy(np.flatnonzero(keep))
        for mb in used[torch.randperm(len(used)).repeat(2)].chunk(8):
            if name == "grpo":
                x_t, x_next = xs[mb, step[mb]], xs[mb, step[mb] + 1]
                v = policy.velocity(None, None, x_t, 1 - step[mb] / K)
                new = module.log_prob(x_next, *module.flow_sde_step(x_t, v, step[mb], **SOLVER), mask)
                loss, _ = module.grpo_loss(new, old[mb], values[mb], clip=0.2)
            else:
                noise, t = torch.randn(len(mb), 4, 1, 2), module.sample_time((len(mb), 4))
                if name == "rft":
                    loss = module.rft_loss(policy, None, None, x[mb], noise, t, mask=mask)
                else:
                    x_0, r = (y[mb].repeat_interleave(4, 0) for y in (x, values))
                    noise, t = noise.flatten(0, 1), t.flatten()
                    x_t = (1 - t.view(-1, 1, 1)) * x_0 + t.view(-1, 1, 1) * noise
                    with torch.no_grad():
                        v_old = rollout_policy(x_t, t)
                    adaptive = t if options.get("weighting") == "adaptive" else None
                    loss, _ = module.nft_loss(policy(x_t, t), v_old, noise - x_0, r, t=adaptive, mask=mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if name == "nft":
            decay = module.ema_decay(iteration, 0.1, 0.5, iterations)
            module.update_rollout_policy(rollout_policy.parameters(), policy.parameters(), decay)
    return before, success_rate()


BANDITS = pytest.mark.parametrize(
    "name, options, least",
    [("grpo", {}, 0.95), ("nft", {}, 0.95), ("nft", dict(labels="binary"), 0.95), ("nft", dict(weighting="adaptive"), 0.93),
     ("rft", {}, 0.95), ("rft", dict(noise_level=0.0), 0.7)],
)


@BANDITS
def test_each_method_solves_the_bandit(name, options, least):
    before, after = solve_bandit(name, **options)
    assert 0.2 < before < 0.35
    assert after > least


@BANDITS
def test_with_flipped_outcomes_it_learns_to_fail(name, options, least):
    _, after = solve_bandit(name, flipped=True, **options)
    assert after < 0.05


# ------------------------------------------------------------------------------------------------------------ the programs


@EACH
def test_help_explains_every_option(name, monkeypatch, capsys):
    test_main.test_help_explains_every_option(MODULES[name], monkeypatch, capsys)


def test_what_all_algorithms_share_word_for_word_is_their_rollout_and_sampler():
    """No group of more than five lines, imports aside, stands in all files but there: what all need alike is the harness's."""
    files = []
    for module in (stepnft_pi0, stepnft_pi05, ppo, grpo, nft, rft, critic):
        lines = Path(module.__file__).read_text().splitlines()
        (begin,) = (i for i, line in enumerate(lines) if re.match(" +# -+ rollout", line))
        (end,) = (i for i, line in enumerate(lines) if line.strip() == 'run.lap("rollout")')
        apart = set(range(begin, end + 1))
        for node in ast.parse("\n".join(lines)).body:
            imported = isinstance(node, ast.Import | ast.ImportFrom) or lines[node.lineno - 1].startswith("sys.path")
            if imported or getattr(node, "name", "") in ("flow_sde_step", "flow_sde_sample"):
                apart |= set(range(node.lineno - 1, node.end_lineno))
                assert not (imported and "algos" in lines[node.lineno - 1])  # each is read alone
        lines = [line.strip() for i, line in enumerate(lines) if line.strip() and i not in apart]
        files.append({tuple(lines[i : i + 6]) for i in range(len(lines) - 5)})
    assert set.intersection(*files) == set()
    assert len(files[0] & files[1]) > 200  # what stands in some of them is seen


SHORT = (
    "--obs-mode state --num-envs 4 --rollout-epochs 2 --group-size 4 --rollout-steps 10 --eval-episodes 2 --final-eval-episodes 2 "
    "--eval-every 0 --num-minibatches 1 --warmup-iterations 0 --num-threads 1 --no-video"
).split()


@contextlib.contextmanager
def lots():
    """Weights drawn at random never succeed, so here outcomes are allotted: three of four environments have succeeded."""
    make = envs.make

    def make_with_lots(*arguments, **options):
        venv = make(*arguments, **options)
        step = venv.step_wait

        def step_with_lots():
            *outcome, info = step()
            return *outcome, info | {"success": np.arange(venv.num_envs) % 4 != 1}

        venv.step_wait = step_with_lots
        return venv

    with mock.patch.object(envs, "make", make_with_lots):
        yield


@pytest.fixture
def draw_lots():
    with lots():
        yield


GROUPS = {"nft": ("--labels", "group", "--noise-level", 0)}
"""What makes an algorithm one that compares episodes from one initial state, where that is not its default."""


def start(cwd, name: str, *arguments):
    """A short run of an algorithm in `cwd`; returns its folder."""
    cwd.mkdir()
    run(name, *SHORT, *arguments, cwd=cwd)
    return only_run(cwd)


@pytest.fixture(scope="module")
def straight(checkpoints, tmp_path_factory):  # noqa: F811
    """Two uninterrupted iterations of each algorithm: name -> run folder."""
    folder, arguments = tmp_path_factory.mktemp("straight"), ["--checkpoint", checkpoints["state"], "--iterations", 2]
    with lots():
        return {name: start(folder / name, name, *arguments, *GROUPS.get(name, ())) for name in MODULES}


@pytest.mark.parametrize("name", ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nft", "rft"))])
def test_a_run_is_resumed_as_if_never_stopped(name, straight, checkpoints, draw_lots, tmp_path):  # noqa: F811
    whole, one = straight[name], ["--iterations", 1, *GROUPS.get(name, ())]
    arguments = [name, "--checkpoint", checkpoints["state"], *one]
    parts = start(tmp_path / "parts", *arguments)
    assert parts.name.startswith(f"{name}-PickCube-v1-state-1-")
    initial, first = weights(checkpoints["state"]), weights(parts / "policy")
    trained = {n for n in initial if not torch.equal(initial[n], first[n])}
    assert trained and not any(n.startswith("language_model.") for n in trained)
    if name == "nft":  # in pieces it is the same step, at the same noise and times
        for n, value in weights(start(tmp_path / "pieces", *arguments, "--micro-batch", 3) / "policy").items():
            torch.testing.assert_close(value, first[n], rtol=0, atol=2e-5)

    run(name, "--resume", parts, "--iterations", 2, cwd=tmp_path / "parts")
    assert same(weights(whole / "policy"), weights(parts / "policy")) and not same(first, weights(parts / "policy"))
    assert (whole / "rollout_policy").exists() == (name == "nft")
    if name == "nft":
        assert same(weights(whole / "rollout_policy"), weights(parts / "rollout_policy"))

    logged = scalars(whole)
    assert scalars(parts)["losses/loss"][2] == logged["losses/loss"][2] and logged["losses/grad_norm"][1] > 0
    if name == "grpo":  # one minibatch per iteration: it is the first
        assert max(logged["losses/ratio_deviation"].values()) < 1e-3 and logged["losses/clip_fraction"][2] == 0
        assert logged["charts/advantage_mean"][1] == pytest.approx(0, abs=1e-6)  # all episodes have as many chunks
    elif name == "nft":  # θ_old is θ at first, and a tenth of it stays behind
        assert logged["losses/drift"][1] == 0 < logged["losses/drift"][2]

    result = json.loads((parts / "result.json").read_text())
    keys = {"command", "commit", "algorithm", "env_id", "obs_mode", "seed", "checkpoint", "iterations", "env_steps",
            "training_minutes", "args", "parameters_trained", "peak_memory_gb", "lost_episodes", "bad_updates", "forward_passes",
            "before", "after", "versions", "curve", "processes", "machine"}
    assert set(result) == keys | ({"after_rollout_policy"} if name == "nft" else set())
    assert result["algorithm"] == f"{name}_pi0" and result["iterations"] == 2 and len(result["curve"]) == 3
    assert result["forward_passes"] == dict(grpo=1, nft=8, rft=4)[name] and result["peak_memory_gb"] > 0.1
    assert result["parameters_trained"] == sum(initial[n].numel() for n in trained)


def test_nft_asks_both_policies_at_the_same_points_each_with_its_own_prefix(straight, checkpoints, draw_lots, tmp_path):  # noqa: F811
    """All is trained, and the rollout policy stands still: after an update the two read the prompt differently."""
    calls, velocity = [], policies.Pi0.velocity

    def spy(policy, prefix, state, x_t, t):
        if x_t.ndim == 4:  # several points per chunk: an update
            calls.append((policy.training, prefix.keys.detach().clone(), x_t.clone(), t.clone()))
        return velocity(policy, prefix, state, x_t, t)

    options = "--train all --ema-start 1 --ema-end 1 --draws 3 --labels binary --iterations 2".split()
    with mock.patch.object(policies.Pi0, "velocity", spy):
        folder = start(tmp_path / "all", "nft", "--checkpoint", checkpoints["state"], *options)
    assert [training for training, *_ in calls] == [True, False] * 2
    for iteration, (new, old) in enumerate((calls[:2], calls[2:])):
        assert torch.equal(new[2], old[2]) and torch.equal(new[3], old[3]) and new[2].shape[1] == 3
        assert torch.equal(new[1], old[1]) == (iteration == 0)
    assert same(weights(checkpoints["state"]), weights(folder / "rollout_policy"))
    assert scalars(folder)["charts/optimality_mean"][1] == pytest.approx(0.75)  # binary: the share of success
    assert scalars(straight["nft"])["charts/optimality_mean"][1] == pytest.approx(0.5)  # group


@contextlib.contextmanager
def updates():
    """Collects (state, t) of the velocities that updates ask for: several points per chunk."""
    calls, velocity = [], policies.Pi0.velocity

    def spy(policy, prefix, state, x_t, t):
        if x_t.ndim == 4:
            calls.append((state.clone(), t.clone()))
        return velocity(policy, prefix, state, x_t, t)

    with mock.patch.object(policies.Pi0, "velocity", spy):
        yield calls


@pytest.mark.parametrize("times", ["flow", "solver"])
def test_nft_draws_the_times_it_is_told_to(times, checkpoints, draw_lots, tmp_path):  # noqa: F811
    with updates() as calls:
        start(tmp_path / "run", "nft", "--checkpoint", checkpoints["state"], "--iterations", 1, "--times", times)
    on_grid = [t in (0.25, 0.5, 0.75, 1.0) for t in torch.cat([t.flatten() for _, t in calls]).tolist()]
    assert all(on_grid) if times == "solver" else not any(on_grid)


def test_nfts_predictor_is_stepnfts():
    for name in ("SuccessPredictor", "advantages"):  # whose facts test_stepnft.py holds
        assert inspect.getsource(getattr(nft, name)) == inspect.getsource(getattr(stepnft_pi0, name))


def test_nft_with_predicted_labels_learns_from_every_chunk_by_what_the_predictor_did_not_expect(
    checkpoints, draw_lots, tmp_path  # noqa: F811
):
    options = "--labels predicted --group-size 1 --gae-lambda 1 --noise-level 0.7 --iterations 2".split()
    folder = start(tmp_path / "run", "nft", "--checkpoint", checkpoints["state"], *options)
    logged = scalars(folder)
    # At first it expects one half of everything: labels of ±½, a deviation of the change being ½. Three of four have succeeded.
    assert logged["charts/optimality_mean"][1] == pytest.approx(0.75 * 0.75 + 0.25 * 0.25)
    assert logged["charts/signal"] == {1: 1, 2: 1}
    first, second = logged["losses/predictor"].values()
    assert second < first < math.log(2) + 1e-3
    assert logged["charts/optimality_mean"][2] < logged["charts/optimality_mean"][1]  # it expects more successes than failures


@pytest.mark.parametrize("replay", [1, 2])
def test_rft_replays_successes_of_earlier_iterations_where_told_to(replay, checkpoints, draw_lots, tmp_path):  # noqa: F811
    with updates() as calls:
        start(tmp_path / "run", "rft", "--checkpoint", checkpoints["state"], "--iterations", 2, "--replay", replay)
    first, second = (set(map(tuple, state.tolist())) for state, _ in calls)
    assert len(second) > 2 and second - first  # of this iteration
    assert bool(second & first) == (replay == 2)


@pytest.mark.parametrize("name, options, tag", [
    ("grpo", "--clip 0.001 --update-epochs 2", "losses/clip_fraction"),
    ("nft", "--weighting none", "losses/loss"),
    ("rft", "--noise-level 0", "losses/loss"),
    ("rft", "--contrast --group-size 2", "charts/signal"),
])
def test_every_switch_changes_what_it_says(name, options, tag, straight, checkpoints, draw_lots, tmp_path):  # noqa: F811
    before = scalars(straight[name])[tag][1]
    options = ["--checkpoint", checkpoints["state"], "--iterations", 1, *options.split(), *GROUPS.get(name, ())]
    after = scalars(start(tmp_path / "run", name, *options))[tag][1]
    if tag == "losses/clip_fraction":
        assert before == 0 and after > 0.4  # all of the second pass
    elif tag == "charts/signal":  # of each four episodes the last two, from one initial state, both succeed
        assert (before, after) == (pytest.approx(0.75), pytest.approx(0.25))
    else:
        assert abs(after / before - 1) > 0.01
