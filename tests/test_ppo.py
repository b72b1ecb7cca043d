"""Facts about PPO's own functions: the sampler, the likelihood, the advantages, the losses; a bandit; and a short run."""

import copy
import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import test_main
import torch
from test_main import one_thread, only_run, random_checkpoint, refusal, run, same, scalars, weights  # noqa: F401 (a fixture)
from test_pi05 import random_policy
from torch import nn
from torch.distributions import Normal

from pi_stepnft import envs, policies
from pi_stepnft.algos import ppo, stepnft_pi0

K, NOISE = 4, 0.5  # the authors' solver
SOLVER = dict(num_steps=K, noise_level=NOISE)
BOTH = pytest.mark.parametrize("noise", ["sde", "learned"])


def draw(batch: int, shape: tuple[int, int], noise_head) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy steps and noise of a rollout's turn."""
    step = torch.randint(K, (batch, 1)) if noise_head is None else torch.arange(K).expand(batch, K)
    return step, torch.randn(batch, K + 1, *shape)


class Case(SimpleNamespace):
    """A tiny policy with velocities of order one, its heads, and a batch of observations: the update's and the rollout's inputs."""

    def __init__(self, noise: str, kind: str = "pi0", batch: int = 32):
        torch.manual_seed(0)
        policy = policies.Pi0(policies.Pi0Config.tiny(num_cameras=0)) if kind == "pi0" else random_policy(num_cameras=0)
        c = policy.config
        nn.init.normal_(policy.action_out_proj.weight, std=0.1)
        value_head = ppo.ValueHead(policy.critic_width)
        noise_head = ppo.NoiseHead(c.expert_width, c.action_dim, 0.08, 0.16) if noise == "learned" else None
        for head in filter(None, (value_head, noise_head)):
            nn.init.normal_(head.net[-1].weight, std=1.0)  # values and deviations that differ
        tokens = torch.randint(3, 448, (batch, c.max_token_len))
        mask = torch.zeros(c.horizon, c.action_dim, dtype=torch.bool)
        mask[:5, :7] = True
        with torch.no_grad():
            prefix = policy.eval().encode_prefix(None, None, tokens, torch.ones_like(tokens))
        state = torch.randn(batch, c.state_dim)
        super().__init__(policy=policy, value_head=value_head, noise_head=noise_head, prefix=prefix, state=state, mask=mask)

    def sample(self):
        """What the rollout does: path, noisy steps, log-probability, value."""
        step, noise = draw(len(self.state), self.mask.shape, self.noise_head)
        with torch.inference_mode():
            sampled = ppo.flow_sde_sample(
                self.policy, self.value_head, self.noise_head, self.prefix, self.state, step, noise, self.mask, **SOLVER
            )
        x, log_prob, value = (x.clone() for x in sampled)
        return x, step, log_prob, value

    def transitions(self, x: torch.Tensor, step: torch.Tensor):
        """x_t and x_next at the noisy steps, each (B, n, H, A)."""
        row = torch.arange(len(x))[:, None]
        return x[row, step], x[row, step + 1]

    def update(self, x: torch.Tensor, step: torch.Tensor, rows=slice(None), **options):
        """What the update does: log-probability and value of remembered chunks, after self.policy.train()."""
        x_t, x_next = self.transitions(x[rows], step[rows])
        _, mean, std, value = ppo.actor_critic(
            self.policy.train(), self.value_head, self.noise_head, self.prefix[rows], self.state[rows], x_t, step[rows],
            **SOLVER, **options,
        )
        return ppo.log_prob(x_next, mean, std, self.mask), value


# -------------------------------------------------------------------------------------------------------------- the sampler


def test_the_noisy_step_is_stepnfts():
    step = torch.arange(K)
    x, v = torch.randn(K, 3, 2), torch.randn(K, 3, 2)
    ours, theirs = (m.flow_sde_step(x, v, step, **SOLVER) for m in (ppo, stepnft_pi0))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert [round(s, 2) for s in ours[1].flatten().tolist()] == [0.5, 0.43, 0.25, 0.14]


@torch.no_grad()
def test_one_step_of_each_chunk_is_noisy_and_all_others_are_eulers():
    case = Case("sde", batch=64)
    x, step, _, _ = case.sample()
    assert x.shape == (64, K + 1, 8, 8) and step.shape == (64, 1)
    assert set(step.flatten().tolist()) == {0, 1, 2, 3}  # drawn for each chunk
    for i in range(K):
        v = case.policy.velocity(case.prefix, case.state, x[:, i], torch.full((64,), 1 - i / K))
        assert v.abs().mean() > 0.1  # the policy matters in what follows
        noisy = step[:, 0] == i
        torch.testing.assert_close(x[~noisy, i + 1], (x[:, i] - v / K)[~noisy], rtol=1e-4, atol=1e-5)
        mean, std = ppo.flow_sde_step(x[:, i], v, torch.full((64,), i), **SOLVER)
        z = ((x[:, i + 1] - mean) / std)[noisy]  # a thousand standard normal draws
        assert abs(z.mean()) < 0.15 and abs(z.std() - 1) < 0.1


@torch.no_grad()
def test_every_step_of_flow_noise_is_eulers_with_noise_between_the_bounds():
    case = Case("learned")
    x, step, _, _ = case.sample()
    assert step.tolist() == [[0, 1, 2, 3]] * 32
    x_t, x_next = case.transitions(x, step)
    v, mean, std, _ = ppo.actor_critic(
        case.policy, case.value_head, case.noise_head, case.prefix, case.state, x_t, step, **SOLVER
    )
    torch.testing.assert_close(mean, x_t - v / K)
    assert std.shape == x.shape[:1] + (K, 8, 8) and 0.08 <= std.min() < 0.1 and 0.14 < std.max() <= 0.16
    z = (x_next - mean) / std
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    new = ppo.NoiseHead(128, 8, 0.08, 0.16)(torch.randn(2, 3, 128))
    torch.testing.assert_close(new, torch.full_like(new, math.sqrt(0.08 * 0.16)))


# -------------------------------------------------------------------------------------------------- likelihood, ratio, value


@BOTH
def test_the_log_probability_is_the_gaussian_of_the_sampler_over_the_executed_part(noise):
    case = Case(noise)
    x, step, log_prob, _ = case.sample()
    x_t, x_next = case.transitions(x, step)
    expected = torch.zeros(32)
    for i in range(K):
        now = torch.full((32,), i)
        with torch.no_grad():
            v = case.policy.velocity(case.prefix, case.state, x[:, i], 1 - now / K)
            features = case.policy.features(case.prefix, case.state, x[:, i], 1 - now / K)
        mean, std = ppo.flow_sde_step(x[:, i], v, now, **SOLVER)
        if noise == "learned":
            mean, std = x[:, i] - v / K, case.noise_head(features).detach()
        density = Normal(mean, std.expand_as(mean)).log_prob(x[:, i + 1])[:, :5, :7].sum((1, 2))
        expected += torch.where((step == i).any(1), density, 0)
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        x_next[:, :, 5:], x_next[:, :, :, 7:] = 7.0, -7.0  # neither executed nor real
        _, mean, std, _ = ppo.actor_critic(
            case.policy, case.value_head, case.noise_head, case.prefix, case.state, x_t, step, **SOLVER
        )
        torch.testing.assert_close(ppo.log_prob(x_next, mean, std, case.mask), log_prob, rtol=1e-4, atol=1e-3)
        x_next[:, :, 4, 6] += 1.0  # the last that counts
        assert (ppo.log_prob(x_next, mean, std, case.mask) - log_prob).abs().min() > 0.01


@BOTH
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_in_the_first_minibatch_the_ratio_is_one_and_the_value_the_rollouts(noise, kind):
    case = Case(noise, kind)
    x, step, old, old_value = case.sample()
    assert old.std() > 1 and old_value.std() > 1e-3  # there is something to be equal to
    rows = torch.randperm(32)[:7]
    new, value = case.update(x, step, rows)
    assert new.requires_grad and value.requires_grad
    torch.testing.assert_close(new, old[rows], rtol=0, atol=2e-4)
    torch.testing.assert_close(value, old_value[rows], rtol=1e-5, atol=1e-5)
    _, metrics = ppo.ppo_loss(new, old[rows], torch.randn(7), clip=0.2)
    assert metrics["ratio_deviation"] < 2e-4 and metrics["clip_fraction"] == 0 and metrics["approx_kl"].abs() < 1e-6
    with torch.no_grad():  # and no longer once the policy has moved
        case.policy.action_out_proj.bias += 0.1
    assert (case.update(x, step, rows)[0] - old[rows]).abs().min() > 1e-2


def test_the_value_is_read_before_the_noise_that_the_likelihood_counts():
    """π0: at the noisy step's x_t. Another draw of that step's noise changes the chunk and its likelihood, not the value."""
    case = Case("sde")
    x, step, old, old_value = case.sample()
    other = x.clone()
    other[torch.arange(32), step[:, 0] + 1] += 0.1
    new, value = case.update(other, step)
    assert (new - old).abs().min() > 1e-3
    torch.testing.assert_close(value, old_value, rtol=1e-5, atol=1e-5)


def test_pi05s_value_is_that_of_the_observation_and_ignores_padding():
    case = Case("sde", "pi05")
    _, _, _, value = case.sample()
    torch.testing.assert_close(case.sample()[3], value)  # whatever chunk is sampled
    longer = copy.copy(case.prefix)
    longer.keys, longer.values = (torch.cat((y, torch.full_like(y, 9.0)), 2) for y in (longer.keys, longer.values))
    longer.mask = torch.cat((longer.mask, torch.zeros_like(longer.mask)), 1)
    case.prefix = longer
    torch.testing.assert_close(case.sample()[3], value)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_detached_critic_leaves_the_policy_alone(kind):
    for detach in (True, False):
        case = Case("sde", kind)
        case.prefix.keys.requires_grad_()
        x, step, _, _ = Case("sde", kind).sample()
        _, value = case.update(x, step, detach_critic=detach)
        value.sum().backward()
        reached = case.prefix.keys.grad is not None
        assert reached == (not detach) and all(p.grad is not None for p in case.value_head.parameters())
        if kind == "pi0":  # the expert's last layer, not the action head
            assert (case.policy.expert.norm.weight.grad is not None) == (not detach)
        assert case.policy.action_out_proj.weight.grad is None


# -------------------------------------------------------------------------------------------------------------- advantages


def test_gae_by_hand_with_success_time_limit_and_different_lengths():
    g, lam = 0.9, 0.5
    rewards = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    values = np.array([[0.4, 0.6, 9.0], [0.2, 0.3, 0.5], [0.1, 9.0, 9.0]])
    valid = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0]], bool)
    terminated, last_values = np.array([True, False, False]), np.array([8.0, 0.7, 0.3])  # 8.0 must not be looked at
    advantages, returns = ppo.gae(rewards, values, valid, terminated, last_values, gamma=g, gae_lambda=lam)
    d01, d00 = 1.0 - 0.6, 0.9 * 0.6 - 0.4  # success at the second chunk: nothing follows
    d12, d11, d10 = 0.9 * 0.7 - 0.5, 0.9 * 0.5 - 0.3, 0.9 * 0.3 - 0.2  # cut off: V of the last observation follows
    d20 = 0.5 + 0.9 * 0.3 - 0.1  # cut off after one chunk
    assert advantages[0, :2] == pytest.approx([d00 + 0.45 * d01, d01])
    assert advantages[1] == pytest.approx([d10 + 0.45 * (d11 + 0.45 * d12), d11 + 0.45 * d12, d12])
    assert advantages[2, 0] == pytest.approx(d20)
    assert returns[valid] == pytest.approx((advantages + values)[valid])


def test_gae_without_lambda_is_the_td_error_and_with_all_of_it_the_monte_carlo_return():
    rng = np.random.default_rng(0)
    rewards, values, last = rng.random((5, 6)), rng.random((5, 6)), rng.random(5)
    valid, terminated = np.ones((5, 6), bool), np.arange(5) % 2 == 0
    following = np.concatenate((values[:, 1:], np.where(terminated, 0, last)[:, None]), 1)
    td, _ = ppo.gae(rewards, values, valid, terminated, last, gamma=0.9, gae_lambda=0.0)
    assert td == pytest.approx(rewards + 0.9 * following - values)
    _, returns = ppo.gae(rewards, values, valid, terminated, last, gamma=0.9, gae_lambda=1.0)
    discounted = (rewards * 0.9 ** np.arange(6)).sum(1) + 0.9**6 * np.where(terminated, 0, last)
    assert returns[:, 0] == pytest.approx(discounted)


# -------------------------------------------------------------------------------------------------------------- the losses


def slope(log_ratio: float, advantage: float) -> float:
    """d loss / d log-probability of a single chunk."""
    new = torch.tensor([log_ratio], requires_grad=True)
    ppo.ppo_loss(new, torch.zeros(1), torch.tensor([advantage]), clip=0.2)[0].backward()
    return new.grad.item()


def test_the_surrogate_has_the_right_sign_and_no_gradient_where_the_ratio_has_gone_far_enough():
    assert slope(0.0, 2.0) == pytest.approx(-2.0) and slope(0.0, -2.0) == pytest.approx(2.0)  # descent raises what was good
    far, inside = math.log(1.3), math.log(1.1)
    assert slope(far, 1.0) == 0 and slope(-far, -1.0) == 0  # far enough in the right direction
    assert slope(far, -1.0) == pytest.approx(1.3) and slope(-far, 1.0) == pytest.approx(-1 / 1.3)  # back from the wrong one
    assert slope(inside, 1.0) == pytest.approx(-1.1) and slope(inside, -1.0) == pytest.approx(1.1)


def test_what_the_surrogate_reports():
    ratio = torch.tensor([1.0, 1.3, 0.7, 1.1])
    loss, metrics = ppo.ppo_loss(ratio.log(), torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, -1.0]), clip=0.2)
    assert loss.item() == pytest.approx(-(1.0 + 1.2 + 0.7 - 1.1) / 4) == metrics["policy"].item()
    assert metrics["clip_fraction"].item() == 0.5 and metrics["ratio_deviation"].item() == pytest.approx(0.7 / 4)
    assert metrics["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item())


def test_descending_moves_the_mean_towards_good_chunks_and_away_from_bad_ones():
    """One dimension: the velocity's change has the sign that brings the mean of the step nearer to x_next, or away from it."""
    x_t, v, step, mask = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, requires_grad=True), torch.tensor([1]), torch.ones(1, 1)
    for x_next in (0.3, -0.3):
        for advantage in (1.0, -1.0):
            mean, std = ppo.flow_sde_step(x_t, v, step, **SOLVER)
            new = ppo.log_prob(torch.full((1, 1, 1, 1), x_next), mean[None], std[None], mask)
            loss, _ = ppo.ppo_loss(new, new.detach(), torch.tensor([advantage]), clip=0.2)
            (gradient,) = torch.autograd.grad(loss, v)
            moved, _ = ppo.flow_sde_step(x_t, v - 1e-2 * gradient, step, **SOLVER)
            assert (moved - mean).item() * x_next * advantage > 0


@pytest.mark.parametrize("new, returns, loss, gradient", [
    (0.1, 1.0, 0.405, -0.9),  # within the clip: the squared error
    (0.5, 1.0, 0.32, 0.0),  # further towards the return than allowed: no gradient
    (-0.5, 1.0, 1.125, -1.5),  # far away from it: all of it
    (0.5, 0.0, 0.125, 0.5),
])
def test_values_move_no_further_than_the_clip_lets_them(new, returns, loss, gradient):
    new = torch.tensor([new], requires_grad=True)
    value_loss = ppo.value_loss(new, torch.zeros(1), torch.tensor([returns]), clip=0.2)
    value_loss.backward()
    assert value_loss.item() == pytest.approx(loss) and new.grad.item() == pytest.approx(gradient)


# -------------------------------------------------------------------------------------------------------------- a bandit


class Field(nn.Module):
    """A stand-in for a policy over x (B, n, 1, 2): exact for standard normal actions, plus an MLP whose output starts at zero."""

    config = SimpleNamespace(horizon=1, action_dim=2)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.out = nn.Linear(64, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def features(self, prefix, state, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t[..., None, None]
        base = (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        return torch.cat((self.net(torch.cat((x, t.expand_as(x[..., :1])), -1)), base), -1)

    def critic_features(self, prefix, features: torch.Tensor) -> torch.Tensor:
        return features.mean(1)

    def action_out_proj(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., 64:] + self.out(features[..., :64])


def solve_bandit(noise: str, sign: float = 1.0, iterations: int = 25, episodes: int = 512) -> tuple[float, float]:
    """Success by the ODE before and after PPO on one-chunk episodes: a disc that holds a quarter of the standard normal actions."""
    torch.manual_seed(0)
    field, value_head = Field(), ppo.ValueHead(66)
    noise_head = ppo.NoiseHead(66, 2, 0.1, 0.3) if noise == "learned" else None
    parts = nn.ModuleList(filter(None, (field, value_head, noise_head)))
    optimizer = torch.optim.Adam(parts.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5)
    mask, none, one = torch.ones(1, 2, dtype=torch.bool), torch.zeros(episodes), np.ones((episodes, 1), bool)

    @torch.no_grad()
    def success_rate() -> float:
        x = torch.randn(2000, 1, 1, 2, generator=torch.Generator().manual_seed(1))
        for i in range(K):
            x = x - field.action_out_proj(field.features(None, None, x, torch.full((2000, 1), 1 - i / K))) / K
        return succeeded(x[:, 0]).float().mean().item()

    def succeeded(action: torch.Tensor) -> torch.Tensor:
        return (action[:, 0] - torch.tensor([1.2, 0.0])).norm(dim=-1) < 1.0

    before = success_rate()
    for _ in range(iterations):
        with torch.no_grad():
            step, epsilon = draw(episodes, mask.shape, noise_head)
            x, old, values = ppo.flow_sde_sample(field, value_head, noise_head, None, none, step, epsilon, mask, **SOLVER)
        rewards = succeeded(x[:, -1]).double().numpy()[:, None]
        advantages, returns = ppo.gae(
            rewards, values.double().numpy()[:, None], one, one[:, 0], np.zeros(episodes), gamma=0.99, gae_lambda=0.95
        )
        advantages, returns = (torch.from_numpy(y[:, 0]).float() for y in (advantages, returns))
        advantages = sign * (advantages - advantages.mean()) / advantages.std()
        for mb in torch.randperm(episodes).repeat(2).chunk(8):
            row = mb[:, None]
            x_t, x_next = x[row, step[mb]], x[row, step[mb] + 1]
            _, mean, std, value = ppo.actor_critic(field, value_head, noise_head, None, none[mb], x_t, step[mb], **SOLVER)
            loss, _ = ppo.ppo_loss(ppo.log_prob(x_next, mean, std, mask), old[mb], advantages[mb], clip=0.2)
            loss = loss + ppo.value_loss(value, values[mb], returns[mb], clip=0.2)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            optimizer.step()
    return before, success_rate()


@BOTH
def test_the_method_solves_a_bandit(noise):
    before, after = solve_bandit(noise)
    assert 0.2 < before < 0.35
    assert after > 0.9


@BOTH
def test_with_the_sign_flipped_it_does_not(noise):
    _, after = solve_bandit(noise, sign=-1.0)
    assert after < 0.1


# -------------------------------------------------------------------------------------------------------------- the program


def test_help_explains_every_option(monkeypatch, capsys):
    test_main.test_help_explains_every_option(ppo, monkeypatch, capsys)


SHORT = (
    "--obs-mode state --num-envs 4 --rollout-epochs 1 --rollout-steps 20 --eval-episodes 1 --final-eval-episodes 1 --eval-every 0 "
    "--num-minibatches 1 --update-epochs 1 --critic-warmup 1 --warmup-iterations 0 --num-threads 1 --no-video"
).split()


@pytest.fixture(scope="module")
def simulator():
    """One real simulator for all runs, with the task's dense reward: a random policy never sees the sparse one."""
    make, shared = envs.make, []

    def once(*args, **kwargs):
        if not shared:
            shared.append(make(*args, **kwargs, reward_mode="normalized_dense"))
            shared[0].close = lambda: None  # the program closes what it made
        return shared[0]

    with mock.patch.object(envs, "make", once):
        yield shared
    for venv in shared:
        type(venv).close(venv)


@pytest.fixture(scope="module")
def train(simulator, tmp_path_factory):
    """A function that runs the program in a new folder, from a random policy, and returns the run's."""
    start = random_checkpoint(tmp_path_factory.mktemp("ppo") / "start", "state")

    def train(cwd, *arguments, checkpoint=start):
        cwd.mkdir(exist_ok=True)
        run("ppo", "--checkpoint", checkpoint, *SHORT, *arguments, cwd=cwd)
        return only_run(cwd)

    train.start = start
    return train


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """Two iterations, the first with only the critic."""
    return train(tmp_path_factory.mktemp("straight"), "--iterations", 2)


def test_a_run_warms_its_critic_up_and_then_learns(straight, train):
    assert straight.name.startswith("ppo-PickCube-v1-state-1-") and not (straight / "rollout_policy").exists()
    logged = scalars(straight)
    assert logged["losses/grad_norm"][1] == 0 < logged["losses/value_grad_norm"][1]
    assert list(logged["charts/learning_rate"].values()) == pytest.approx([0, ppo.Args.learning_rate])
    assert logged["losses/grad_norm"][2] > 0
    for i in (1, 2):  # one minibatch per iteration, which is its first
        assert logged["losses/ratio_deviation"][i] < 1e-4 and logged["losses/clip_fraction"][i] == 0
        assert abs(logged["losses/policy"][i]) < 1e-4  # −mean A of normalised advantages
    assert logged["charts/value_mean"][1] == 0 < logged["charts/value_mean"][2]

    result = json.loads((straight / "result.json").read_text())
    assert result["algorithm"] == "ppo_pi0" and result["forward_passes"] == 1 and "after_rollout_policy" not in result
    assert policies.load(straight / "policy").meta["ppo"]["iteration"] == 2
    start, after = policies.load(train.start).freeze_vlm(), weights(straight / "policy")
    trained = {name: p.numel() for name, p in start.named_parameters() if p.requires_grad}
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, after[name])}
    assert changed and changed <= trained.keys()
    assert result["parameters_trained"] == sum(trained.values()) + sum(p.numel() for p in ppo.ValueHead(128).parameters())
    memory = [v for name in ("rollout", "update") for v in logged[f"charts/memory_{name}_gb"].values()]
    assert result["peak_memory_gb"] == pytest.approx(max(memory), rel=1e-6)


def test_resuming_restores_the_value_head_and_changes_nothing(straight, train, tmp_path):
    parts = train(tmp_path, "--iterations", 1)
    assert same(weights(parts / "policy"), weights(train.start))  # only the critic has been updated
    train(tmp_path, "--resume", parts, "--iterations", 2)
    assert same(weights(straight / "policy"), weights(parts / "policy")) and not same(
        weights(straight / "policy"), weights(train.start)
    )
    for tag in ("losses/value", "losses/grad_norm", "charts/value_mean", "charts/explained_variance"):
        assert scalars(parts)[tag][2] == scalars(straight)[tag][2]


def test_options_for_large_policies_change_nothing(straight, train, tmp_path):
    options = "--iterations 2 --prefix-cache off --micro-batch 3 --gradient-checkpointing"
    logged, expected = scalars(train(tmp_path, *options.split())), scalars(straight)
    for tag in ("losses/value", "losses/value_grad_norm", "losses/grad_norm", "charts/value_mean", "charts/env_steps"):
        assert logged[tag][2] == pytest.approx(expected[tag][2], rel=1e-3)


@pytest.mark.slow
def test_switches_do_what_they_say(straight, train, tmp_path):
    expected = scalars(straight)

    def with_(options: str):
        return scalars(train(tmp_path / options.replace(" ", ""), "--iterations", "2", *options.split()))

    plain = with_("--no-normalize-advantages")  # then the loss is the mean of returns − values, at a ratio of 1
    for i in (1, 2):
        mean = plain["charts/return_mean"][i] - plain["charts/value_mean"][i]
        assert plain["losses/policy"][i] == pytest.approx(-mean, rel=1e-3)
    failed = with_("--no-bootstrap")
    assert failed["charts/return_mean"][1] == expected["charts/return_mean"][1]  # all values are still zero
    assert failed["charts/value_mean"][2] == pytest.approx(expected["charts/value_mean"][2], rel=0.1) != 0
    assert failed["charts/return_mean"][2] < expected["charts/return_mean"][2]
    short = with_("--rollout-steps 10 --critic-warmup 0")
    assert short["charts/env_steps"][1] == 4 * 10 < expected["charts/env_steps"][1] == 4 * 20
    assert short["losses/grad_norm"][1] > 0 == expected["losses/grad_norm"][1]
    fast = with_("--value-learning-rate 0.01")
    assert fast["charts/value_mean"][2] > 2 * expected["charts/value_mean"][2]
    twice = with_("--update-epochs 2 --learning-rate 1e-3")  # in the second pass the ratio is no longer one
    assert twice["losses/approx_kl"][2] > 1e-3 and twice["losses/clip_fraction"][2] > 0


@pytest.mark.parametrize("ends", [True, False])
def test_after_termination_nothing_follows_and_after_a_cut_the_value_does(ends, simulator, train, tmp_path):
    """Environment i gets its only reward, 1, with its (i + 1)th chunk, which ends its episode or does not; γ = λ = 1."""
    venv, count = simulator[0], 0
    reset, step = venv.reset_wait, venv.step_wait

    def scripted_reset():
        nonlocal count
        count = 0
        return reset()

    def scripted_step():
        nonlocal count
        obs, _, _, truncated, info = step()
        now = np.arange(4) == count
        count += 1
        return obs, now.astype(np.float32), now & ends, truncated, info

    options = "--iterations 3 --gamma 1 --gae-lambda 1 --value-learning-rate 0.01 --value-clip 10 --critic-warmup 3".split()
    with mock.patch.object(venv, "reset_wait", scripted_reset), mock.patch.object(venv, "step_wait", scripted_step):
        logged = scalars(train(tmp_path, *options))
    assert logged["charts/value_mean"][1] == 0 < logged["charts/value_mean"][2] < logged["charts/value_mean"][3]
    for i in (1, 2, 3):
        if ends:  # 1 + 2 + 3 + 4 chunks, each with the whole reward ahead
            assert logged["charts/return_mean"][i] == pytest.approx(1)
        else:  # 16 chunks, 10 of them with the reward ahead, all with the value of the last observation
            value = logged["charts/return_mean"][i] - 10 / 16
            assert value == pytest.approx(logged["charts/value_mean"][i], rel=0.2)


def test_flow_noise_trains_its_network_towards_more_entropy(train, tmp_path):
    logged = {}
    for coefficient in ("0", "1000"):
        options = f"--noise learned --iterations 3 --learning-rate 1e-2 --entropy-coef {coefficient}"
        folder = train(tmp_path / coefficient, *options.split())
        logged[coefficient] = scalars(folder)["losses/noise_std"]
        assert json.loads((folder / "result.json").read_text())["forward_passes"] == K
        assert scalars(folder)["losses/ratio_deviation"][2] < 1e-4
        assert logged[coefficient][2] == pytest.approx(math.sqrt(0.08 * 0.16))
    assert 0.16 > logged["1000"][3] > logged["0"][3] > 0.08


def test_pi05_runs_where_the_checkpoint_says_so(train, tmp_path):
    config = policies.Pi05Config.tiny(num_cameras=0, vlm_depth=2, horizon=8)
    policy = policies.Pi05(config)
    statistics = [policies.NormStats.identity(n) for n in (42, 7)]
    policy.processor = policies.Processor(config, policies.Tokenizer(), *statistics)
    policy.meta = dict(env_id="PickCube-v1", obs_mode="state", execute=5)
    policies.save(policy, tmp_path / "start")
    folder = train(tmp_path, "--iterations", 2, checkpoint=tmp_path / "start")
    assert folder.name.startswith("ppo-pi05-PickCube-v1-state-1-")
    logged = scalars(folder)
    assert logged["losses/ratio_deviation"][2] < 1e-4 and logged["charts/value_mean"][2] > 0
    assert not same(weights(folder / "policy"), weights(tmp_path / "start"))
    result = json.loads((folder / "result.json").read_text())
    assert result["algorithm"] == "ppo_pi05" and result["args"]["policy"] == "pi05"
