"""Facts about π-StepNFT's own functions: the sampler, the loss, the labels, the rollout policy; and a bandit they must solve."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pi_stepnft import policies
from pi_stepnft.algos import stepnft_pi0 as nft

K, NOISE = 4, 0.2  # the authors' solver
BOTH = pytest.mark.parametrize("granularity", ["position", "chunk"])


def coefficients(step: int, num_steps: int, noise: float) -> tuple[float, float, float]:
    """U, B and std of μ(v) = U·x_t + B·v, written out in plain floats."""
    delta = 1 / num_steps
    t = 1 - step * delta
    sigma = noise * math.sqrt(t / (delta if step == 0 else 1 - t))
    return 1 - sigma**2 * delta / (2 * t), -delta - (1 - t) * sigma**2 * delta / (2 * t), sigma * math.sqrt(delta)


def transition(batch: int = 8, horizon: int = 3, width: int = 4, seed: int = 0, drift: float = 0.1) -> dict[str, torch.Tensor]:
    """A batch of remembered transitions and a v_theta that has moved by about `drift` per entry, in double precision."""
    g = torch.Generator().manual_seed(seed)
    x_t, v_old, noise, move = (torch.randn(batch, horizon, width, generator=g, dtype=torch.float64) for _ in range(4))
    step = torch.arange(batch) % K
    mean, std = nft.flow_sde_step(x_t, v_old, step, num_steps=K, noise_level=NOISE)
    labels = torch.where(torch.rand(batch, generator=g) < 0.5, 1.0, -1.0).double()
    return dict(v_theta=v_old + drift * move, v_old=v_old, x_t=x_t, x_next=mean + std * noise, step=step, labels=labels)


def loss_of(data: dict, **options):
    return nft.stepnft_loss(**data, **{**dict(num_steps=K, noise_level=NOISE), **options})


def gradient(data: dict, **options) -> torch.Tensor:
    v_theta = data["v_theta"].clone().requires_grad_()
    loss_of({**data, "v_theta": v_theta}, **options)[0].backward()
    return v_theta.grad


def rows(data: dict, index) -> dict:
    return {name: value[index] for name, value in data.items()}


# -------------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_without_noise_a_step_is_eulers(num_steps):
    x, v = torch.randn(num_steps, 3, 2), torch.randn(num_steps, 3, 2)
    mean, std = nft.flow_sde_step(x, v, torch.arange(num_steps), num_steps=num_steps, noise_level=0.0)
    torch.testing.assert_close(mean, x - v / num_steps)
    assert (std == 0).all()


def test_the_mean_is_affine_in_the_velocity():
    for num_steps, noise in ((4, 0.2), (4, 0.5), (10, 0.3)):
        step = torch.arange(num_steps)
        x, v = torch.randn(num_steps, 3, 2), torch.randn(num_steps, 3, 2)
        mean, std = nft.flow_sde_step(x, v, step, num_steps=num_steps, noise_level=noise)
        for i in range(num_steps):
            U, B, expected_std = coefficients(i, num_steps, noise)
            torch.testing.assert_close(mean[i], U * x[i] + B * v[i])
            assert std[i].item() == pytest.approx(expected_std, rel=1e-5)


def test_the_deviations_of_the_authors_solver():
    x = torch.zeros(4, 1, 1)
    _, std = nft.flow_sde_step(x, x, torch.arange(4), num_steps=4, noise_level=0.2)
    assert [round(s, 3) for s in std.flatten().tolist()] == [0.2, 0.173, 0.1, 0.058]


def test_the_noise_keeps_the_distribution_of_the_flow():
    """For Gaussian actions the velocity is known, and with many steps noisy sampling ends in the same Gaussian as the ODE."""
    torch.manual_seed(0)
    scale, mean, n, num_steps = 0.3, 1.0, 20_000, 200
    x = torch.randn(n, 1, 1)
    for i in range(num_steps):
        t = 1 - i / num_steps
        v = (t - (1 - t) * scale**2) / (t**2 + (1 - t) ** 2 * scale**2) * (x - (1 - t) * mean) - mean
        mu, std = nft.flow_sde_step(x, v, torch.full((n,), i), num_steps=num_steps, noise_level=0.5)
        x = mu + std * torch.randn_like(x)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(scale, rel=0.05)


def prefix_and_state(policy: policies.Pi0, batch: int):
    tokens = torch.randint(3, 448, (batch, policy.config.max_token_len))
    return policy.encode_prefix(None, None, tokens, torch.ones_like(tokens)), torch.randn(batch, policy.config.state_dim)


@torch.no_grad()
def test_sampling_without_noise_is_the_policys_ode(policy):
    prefix, state = prefix_and_state(policy, 5)
    noise = torch.randn(5, K + 1, 8, 8)
    x, _ = nft.flow_sde_sample(policy, prefix, state, noise, num_steps=K, noise_level=0.0)
    torch.testing.assert_close(x[:, -1], policy.sample(prefix, state, noise=noise[:, 0], num_steps=K))


@torch.no_grad()
def test_a_sampled_path_holds_its_velocities_and_gaussian_steps(policy):
    prefix, state = prefix_and_state(policy, 32)
    x, v = nft.flow_sde_sample(policy, prefix, state, torch.randn(32, K + 1, 8, 8), num_steps=K, noise_level=NOISE)
    assert x.shape == (32, K + 1, 8, 8) and v.shape == (32, K, 8, 8)
    assert v.abs().mean() > 0.1  # the policy matters in what follows
    for i in range(K):
        torch.testing.assert_close(v[:, i], policy.velocity(prefix, state, x[:, i], torch.full((32,), 1 - i / K)))
        U, B, std = coefficients(i, K, NOISE)
        z = (x[:, i + 1] - (U * x[:, i] + B * v[:, i])) / std  # 2048 standard normal draws
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


# -------------------------------------------------------------------------------------------------------------- the loss


@BOTH
def test_at_the_rollout_policy_the_loss_is_log_2(granularity):
    data = transition(drift=0.0)
    loss, metrics = loss_of(data, granularity=granularity)
    assert loss.item() == pytest.approx(math.log(2)) and metrics["ranking"].item() == pytest.approx(math.log(2))
    assert metrics["drift"].item() < 1e-5 and metrics["drift_limited"].item() == 0
    assert gradient(data, granularity=granularity).isfinite().all()  # the limit's root is differentiable at zero


@BOTH
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_margin_is_the_projection_of_the_noise_on_the_drift(granularity, beta):
    """E⁺ − E⁻ = −4⟨Σ⁻¹e, β·B·Δv⟩, recovered from the loss of single samples; the batch's loss is the mean of theirs."""
    data = transition()
    options = dict(granularity=granularity, beta=beta, max_drift=1e6, tr_coef=0.0, std_eps=1e-3)
    losses = []
    for b in range(8):
        U, B, std = coefficients(int(data["step"][b]), K, NOISE)
        error = data["x_next"][b] - (U * data["x_t"][b] + B * data["v_old"][b])
        expected = -4 * (error * beta * B * (data["v_theta"] - data["v_old"])[b]).sum(-1) / (std**2 + 1e-3)  # (H,)
        if granularity == "chunk":
            parts, expected = [rows(data, slice(b, b + 1))], expected.sum(0, keepdim=True)
        else:  # each position is a sample of its own
            parts = [{k: (x[b : b + 1, h : h + 1] if x.ndim == 3 else x[b : b + 1]) for k, x in data.items()} for h in range(3)]
        for part, difference in zip(parts, expected, strict=True):
            loss, _ = loss_of(part, **options)
            margin = math.log(math.expm1(loss.item()))  # the inverse of softplus
            assert margin == pytest.approx(0.5 * data["labels"][b].item() * difference.item(), rel=1e-4, abs=1e-5)
            losses.append(loss.item())
    assert loss_of(data, **options)[0].item() == pytest.approx(np.mean(losses))


@BOTH
def test_the_loss_ranks_by_the_samplers_own_mean(granularity):
    """A step that lies exactly on the sampler's mean of v⁺ costs that branch nothing and the mirrored one twice the way."""
    data = transition(drift=0.05)
    data["x_next"], std = nft.flow_sde_step(data["x_t"], data["v_theta"], data["step"], num_steps=K, noise_level=NOISE)
    mirrored, _ = nft.flow_sde_step(data["x_t"], 2 * data["v_old"] - data["v_theta"], data["step"], num_steps=K, noise_level=NOISE)
    energy = ((data["x_next"] - mirrored) ** 2 / (std**2 + 1e-4)).sum(-1)  # (B, H) of v⁻
    if granularity == "chunk":
        energy = energy.sum(1, keepdim=True)
    expected = F.softplus(-0.5 * data["labels"][:, None] * energy).mean()
    torch.testing.assert_close(loss_of(data, granularity=granularity, tr_coef=0.0)[0], expected)


def test_opposite_positions_cancel_in_the_chunk_and_not_by_themselves():
    data = transition(batch=1, horizon=1)
    mean, _ = nft.flow_sde_step(data["x_t"], data["v_old"], data["step"], num_steps=K, noise_level=NOISE)
    twice = {name: torch.cat((x, x), 1) if x.ndim == 3 else x for name, x in data.items()}
    twice["x_next"] = torch.cat((data["x_next"], 2 * mean - data["x_next"]), 1)  # the second position's noise is mirrored
    assert loss_of(twice, granularity="chunk", tr_coef=0.0)[0].item() == pytest.approx(math.log(2))
    assert loss_of(twice, granularity="position", tr_coef=0.0)[0].item() > math.log(2) + 1e-4
    one = [loss_of(data, granularity=granularity)[0] for granularity in ("position", "chunk")]
    torch.testing.assert_close(*one)  # with one position they are the same


@BOTH
@pytest.mark.parametrize("label", [1.0, -1.0])
def test_descending_moves_towards_successful_steps_and_away_from_failed_ones(granularity, label):
    data = transition(drift=0.0)
    data["labels"][:] = label
    moved = data["v_old"] - 1e-3 * gradient(data, granularity=granularity)
    kwargs = dict(num_steps=K, noise_level=NOISE)
    before, after = (nft.flow_sde_step(data["x_t"], v, data["step"], **kwargs)[0] for v in (data["v_old"], moved))
    closer = ((data["x_next"] - before) ** 2 - (data["x_next"] - after) ** 2).sum((1, 2))  # (B,)
    assert (label * closer > 0).all()
    _, metrics = loss_of({**data, "v_theta": moved}, granularity=granularity)
    assert metrics["pref_acc"].item() == 1.0  # every ranking now agrees with its label
    _, metrics = loss_of({**data, "v_theta": moved, "labels": -data["labels"]}, granularity=granularity)
    assert metrics["pref_acc"].item() == 0.0


@BOTH
def test_flipped_labels_turn_the_gradient_around(granularity):
    data = transition(batch=1, horizon=1)
    there, back = (
        gradient({**data, "labels": y * data["labels"]}, granularity=granularity, tr_coef=0.0).flatten() for y in (1, -1)
    )
    assert there.norm() > 1e-3 and F.cosine_similarity(there, back, dim=0).item() == pytest.approx(-1)


@BOTH
def test_a_label_of_zero_teaches_nothing(granularity):
    data = transition()
    data["labels"][:] = 0
    assert loss_of(data, granularity=granularity, tr_coef=0.0)[0].item() == pytest.approx(math.log(2))
    assert (gradient(data, granularity=granularity, tr_coef=0.0) == 0).all()


def test_the_drift_is_limited_per_position_and_the_limit_carries_gradient():
    data = transition(batch=4, horizon=2)
    direction = F.normalize(torch.randn(4, 2, 4, dtype=torch.float64), dim=-1)
    size = torch.tensor([0.2, 3.0], dtype=torch.float64)[:, None]  # the second position is beyond 0.5
    far = {**data, "v_theta": data["v_old"] + size * direction}
    near = {**data, "v_theta": data["v_old"] + size.clamp(max=0.5) * direction}
    options = dict(tr_coef=0.0, granularity="position", max_drift=0.5)
    loss, metrics = loss_of(far, **options)
    torch.testing.assert_close(loss, loss_of(near, **{**options, "max_drift": 1e6})[0])
    assert metrics["drift"].item() == pytest.approx(1.6) and metrics["drift_limited"].item() == 0.5
    grad = gradient(far, **options)
    radial, whole = (grad * direction).sum(-1).abs(), grad.norm(dim=-1)  # (B, H)
    assert (whole > 1e-6).all()
    assert (radial[:, 1] < 1e-6 * whole[:, 1]).all()  # going further along a limited drift changes nothing
    assert (radial[:, 0] > 1e-6 * whole[:, 0]).all()  # within the limit it does


def test_the_trust_region_counts_the_whole_drift():
    data = transition(drift=2.0)  # far beyond the limit
    with_tr, without = (loss_of(data, tr_coef=c)[0] for c in (0.3, 0.0))
    torch.testing.assert_close(with_tr - without, 0.3 * (data["v_theta"] - data["v_old"]).square().mean())


@BOTH
def test_masked_entries_do_not_matter(granularity):
    data = transition()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:2, :3] = True  # the last position is not executed, the last action dimension is padding
    junk = {k: torch.where(mask, x, 50 * torch.randn_like(x)) if x.ndim == 3 else x for k, x in data.items()}
    options = dict(granularity=granularity, tr_coef=0.1)
    loss, metrics = loss_of(data, mask=mask, **options)
    for other in (
        loss_of(junk, mask=mask, **options),
        loss_of(data, mask=mask.expand(8, 3, 4), **options),
        loss_of({k: x[:, :2, :3] if x.ndim == 3 else x for k, x in data.items()}, **options),
    ):
        torch.testing.assert_close(other[0], loss)
        torch.testing.assert_close(other[1], metrics)
    grad = gradient(junk, mask=mask, **options)
    assert (grad[:, ~mask] == 0).all() and (grad[:, mask] != 0).all()


# ------------------------------------------------------------------------------------------------------------ the ablations


@BOTH
def test_positive_and_negative_share_the_ranking_among_them(granularity):
    data, options = transition(), dict(granularity=granularity, tr_coef=0.0)
    grads = {kind: gradient(data, loss=kind, **options) for kind in ("ranking", "positive", "negative")}
    good = data["labels"] > 0
    assert 0 < good.sum() < len(good)
    torch.testing.assert_close(grads["positive"], grads["ranking"] * good[:, None, None])
    torch.testing.assert_close(grads["negative"], grads["ranking"] * ~good[:, None, None])
    _, metrics = loss_of(data, **options)
    parts = {kind: loss_of(data, loss=kind, **options)[1]["pref_acc"] for kind in ("positive", "negative")}
    share = good.double().mean()
    torch.testing.assert_close(metrics["pref_acc"].double(), share * parts["positive"] + (1 - share) * parts["negative"])


@BOTH
def test_weighted_errors_have_the_rankings_slope_at_the_rollout_policy_and_grow_with_the_drift(granularity):
    here, options = transition(drift=0.0), dict(granularity=granularity, tr_coef=0.0)
    here["labels"] *= 0.7
    torch.testing.assert_close(gradient(here, loss="wmse", **options), gradient(here, **options))
    # far along a drift that the label approves of, the ranking is content and the weighted errors pull back
    far = transition(batch=1, horizon=1, drift=0.0)
    far["labels"][:] = 1.0
    towards = -gradient(far, **options)
    far["v_theta"] = far["v_old"] + 50 * towards / towards.norm()
    slopes = [(gradient(far, loss=kind, max_drift=1e6, **options) * towards).sum().item() for kind in ("ranking", "wmse")]
    assert slopes[0] == pytest.approx(0, abs=1e-6) and slopes[1] > 1


@BOTH
@pytest.mark.parametrize("label", [1.0, -1.0])
def test_with_target_x0_the_straight_path_moves_towards_a_good_chunk_and_away_from_a_bad_one(granularity, label):
    data = transition(drift=0.0)
    data["labels"][:] = label
    moved = data["v_old"] - 1e-3 * gradient(data, granularity=granularity, target="x0")  # x_next stands for the chunk here
    t = (1 - data["step"] / K)[:, None, None]
    before, after = (((data["x_next"] - (data["x_t"] - t * v)) ** 2).sum((1, 2)) for v in (data["v_old"], moved))
    assert (label * (before - after) > 0).all()


# --------------------------------------------------------------------------------------------- labels and the rollout policy


def test_binary_labels_are_the_outcome_of_the_episode():
    episode, position = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 0])
    labels, keep = nft.chunk_labels(np.array([True, False, True]), np.array([0, 0, 1]), episode, position, "binary")
    assert labels.tolist() == [1, -1, -1, 1] and keep.all()
    with pytest.raises(ValueError, match="got 'predicted'"):
        nft.chunk_labels(np.array([True, False, True]), np.array([0, 0, 1]), episode, position, "predicted")


def test_group_labels_compare_chunks_with_their_peers_and_drop_what_has_no_contrast():
    success = np.array([1, 1, 0, 0, 0, 0, 1], bool)
    group = np.array([7, 7, 3, 5, 5, 5, 5])  # 7: all succeed, 3: fails, 5: one of four
    episode = np.array([0, 1, 2, 3, 4, 5, 6, 3, 4, 6, 3])
    position = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2])  # in group 5, four, then three, then one episode is running
    labels, keep = nft.chunk_labels(success, group, episode, position, "group")
    assert keep.tolist() == [False] * 3 + [True] * 7 + [False]
    assert (labels[~keep] == 0).all()
    assert labels[3:7] == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1])  # p = 1/4: −p/(1 − p) and 1
    assert labels[7:10] == pytest.approx([-1 / 2, -1 / 2, 1])  # p = 1/3 of those still running
    assert labels[3:7].sum() == pytest.approx(0) and labels[7:10].sum() == pytest.approx(0)


def episodes_of_random_length() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    length = rng.integers(1, 6, 32)
    episode, turn = np.repeat(np.arange(32), length), np.concatenate([np.arange(n) for n in length])
    order = np.argsort(turn, kind="stable")  # as in a rollout: turn by turn
    return rng.random(32) < 0.5, episode[order], turn[order]


def test_advantages_are_the_outcome_less_the_prediction_or_the_change_of_the_prediction():
    success, episode, turn = episodes_of_random_length()
    p = np.random.default_rng(1).random(len(episode))
    np.testing.assert_allclose(nft.advantages(p, success, episode, turn, 1.0), success[episode] - p)
    follows = {(e, t): value for e, t, value in zip(episode, turn, p)}
    change = [follows.get((e, t + 1), success[e]) - value for e, t, value in zip(episode, turn, p)]
    np.testing.assert_allclose(nft.advantages(p, success, episode, turn, 0.0), change)

    # Two episodes: the first succeeds with its second chunk, the second fails with its third.
    told = nft.advantages(np.array([0.5, 0.4, 0.8, 0.2, 0.1]), np.array([True, False]), np.array([0, 1, 0, 1, 1]),
                          np.array([0, 0, 1, 1, 2]), 0.5)
    assert told == pytest.approx([0.3 + 0.5 * 0.2, -0.2 + 0.5 * (-0.1 - 0.5 * 0.1), 0.2, -0.1 - 0.5 * 0.1, -0.1])


def test_an_exact_prediction_leaves_nothing_to_learn_but_where_it_changes():
    """Of a walk whose chance of success is known, advantages of any λ are zero on average, from wherever it is."""
    rng = np.random.default_rng(0)
    E, T = 20_000, 4
    place = np.cumsum(rng.choice([-1, 1], (E, T)), 1) + 4  # (E, T) after each step, from 4; success: in the end at 5 or above
    before = np.concatenate((np.full((E, 1), 4), place[:, :-1]), 1)
    chance = np.zeros((T + 1, 10))
    chance[T, 5:] = 1
    for t in reversed(range(T)):
        chance[t, 1:-1] = (chance[t + 1, :-2] + chance[t + 1, 2:]) / 2
    episode, turn = np.repeat(np.arange(E), T), np.tile(np.arange(T), E)
    p, step = chance[turn, before.flatten()], (place - before).flatten()
    for gae_lambda in (0.0, 0.7, 1.0):
        advantage = nft.advantages(p, place[:, -1] >= 5, episode, turn, gae_lambda)
        for at in np.unique(before):
            assert abs(advantage[before.flatten() == at].mean()) < 0.02
        assert advantage[step > 0].mean() > 0.1 and advantage[step < 0].mean() < -0.1  # a step up is what helps


def test_the_noise_level_settles_where_exploring_costs_what_it_may():
    """From below and from above, of policies that bear little and much; where nothing succeeds it rises, to a bound."""
    for start in (0.05, 1.5):
        for bears in (0.2, 0.7):
            level, plain, rng = start, 0.5, np.random.default_rng(0)
            for _ in range(80):
                exploring = plain * math.exp(-((level / bears) ** 2) * math.log(1 / 0.8)) + 0.03 * rng.standard_normal()
                level = nft.steered_noise(level, exploring, plain, 0.8, 0.25)
            assert level == pytest.approx(bears, rel=0.25)
    assert nft.steered_noise(0.5, 0.0, 0.0, 0.8, 0.25) > 0.5
    assert nft.steered_noise(2.0, 0.5, 0.5, 0.8, 0.25) == 2 and nft.steered_noise(0.02, 0.0, 0.5, 0.8, 0.25) == 0.02


def test_the_learning_rate_settles_where_the_divergence_does():
    for rate in (0.1, 1.0, 10.0):  # what the user gave, of what is right
        scale = 1.0
        for _ in range(20):
            scale = nft.steered_rate(scale, 0.05 * (rate * scale) ** 2, 0.05, 1.3)
        assert rate * scale == pytest.approx(1)
    assert nft.steered_rate(1.0, 0.0, 0.05, 1.3) == 1.3  # an update that moved nothing
    assert nft.steered_rate(90.0, 0.01, 0.05, 1.3) == 100  # what cannot be reached does not raise it for ever


def test_the_divergence_is_that_of_the_solver_steps():
    """KL(N(μ(v_θ), std²) ‖ N(μ(v_old), std²)) by torch.distributions, of the steps that the sampler takes."""
    data = transition()
    steps = [nft.flow_sde_step(data["x_t"], data[v], data["step"], num_steps=K, noise_level=NOISE) for v in ("v_theta", "v_old")]
    normals = [torch.distributions.Normal(mean, std.expand_as(mean)) for mean, std in steps]
    expected = torch.distributions.kl_divergence(*normals).sum((1, 2)).mean()
    for beta in (1.0, 0.5):
        told = loss_of(data, std_eps=0.0, max_drift=10.0, beta=beta)[1]["divergence"]
        assert told.item() == pytest.approx(expected.item())
    ablation = loss_of(data, std_eps=0.0, max_drift=10.0, target="x0")[1]["divergence"]  # which judges the branches, not the steps
    assert ablation.item() == pytest.approx(expected.item())


def test_the_decay_rises_on_a_cosine_and_stays():
    alpha = [nft.ema_decay(i, 0.1, 0.9, 60) for i in range(100)]
    assert alpha[0] == pytest.approx(0.1) and alpha[30] == pytest.approx(0.5)
    assert alpha[60:] == pytest.approx([0.9] * 40)
    assert (np.diff(alpha[:61]) > 0).all()
    assert nft.ema_decay(400, 0.1, 0.995, 1000) == pytest.approx(0.41, abs=0.005)  # the authors' horizon, where their runs end


def test_the_rollout_policy_follows_slowly():
    old, new = [torch.tensor([0.0, 1.0]), torch.tensor([2.0])], [torch.tensor([4.0, 1.0]), torch.tensor([-2.0])]
    nft.update_rollout_policy(old, new, 0.75)
    assert [x.tolist() for x in old] == [[1.0, 1.0], [1.0]]
    assert [x.tolist() for x in new] == [[4.0, 1.0], [-2.0]]
    nft.update_rollout_policy(old, new, 1.0)
    assert [x.tolist() for x in old] == [[1.0, 1.0], [1.0]]
    nft.update_rollout_policy(old, new, 0.0)
    assert [x.tolist() for x in old] == [x.tolist() for x in new]
    with pytest.raises(ValueError):  # a parameter without counterpart
        nft.update_rollout_policy(old, new[:1], 0.5)


# -------------------------------------------------------------------------------------------------------------- a bandit


class Field(torch.nn.Module):
    """A velocity field over x (B, 1, 2): exact for standard normal actions, plus an MLP that starts at zero."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1, 1)
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x + self.net(torch.cat((x, t.expand(-1, 1, 1)), -1))


def succeeded(action: torch.Tensor) -> torch.Tensor:
    """Actions (B, 1, 2) inside a disc that holds a quarter of the standard normal ones."""
    return (action[:, 0] - torch.tensor([1.2, 0.0])).norm(dim=-1) < 1.0


def solve_bandit(fault: str = "", iterations: int = 25, episodes: int = 512, noise: float = 0.3) -> tuple[float, float]:
    """Success by the ODE before and after π-StepNFT on one-chunk episodes, with one part of the method replaced."""
    torch.manual_seed(0)
    kwargs = dict(num_steps=K, noise_level=noise)
    field = Field()
    rollout_field = copy.deepcopy(field)
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5)
    flow_sde_step = nft.flow_sde_step

    @torch.no_grad()
    def success_rate() -> float:
        x = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(1))
        for i in range(K):
            x = x - field(x, torch.full((2000,), 1 - i / K)) / K
        return succeeded(x).float().mean().item()

    def loss_without_mirror(*args, **options):
        """Both branches of the loss become v_old + β·Δv."""
        branches = []

        def step_of_the_first(x_t, v, step, **kwargs):
            branches.append(v)
            return flow_sde_step(x_t, branches[0], step, **kwargs)

        with mock.patch.object(nft, "flow_sde_step", step_of_the_first):
            loss = nft.stepnft_loss(*args, **options)
        assert len(branches) == 2
        return loss

    before = success_rate()
    for iteration in range(iterations):
        with torch.no_grad():
            x, xs, vs = torch.randn(episodes, 1, 2), [], []
            xs.append(x)
            for i in range(K):
                step = torch.full((episodes,), i)
                vs.append(rollout_field(x, 1 - step / K))
                mean, std = flow_sde_step(x, vs[-1], step, **kwargs)
                x = mean + std * torch.randn_like(mean)
                xs.append(x)
        xs, vs = torch.stack(xs, 1), torch.stack(vs, 1)
        index, first = np.arange(episodes), np.zeros(episodes, int)
        labels, _ = nft.chunk_labels(succeeded(x).numpy(), first, index, first, "binary")
        labels = torch.from_numpy(labels).float() * (-1 if fault == "labels flipped" else 1)
        for mb in torch.randperm(episodes).repeat(2).chunk(8):
            row, step = mb.repeat_interleave(K), torch.arange(K).repeat(len(mb))
            x_t, x_next, v_old = xs[row, step], xs[row, step + 1], vs[row, step]
            if fault == "target is x_t":
                x_next = x_t
            elif fault == "target is another sample":
                mean, std = flow_sde_step(x_t, v_old, step, **kwargs)
                x_next = mean + std * torch.randn_like(mean)
            elif fault == "target is the mean":
                x_next, _ = flow_sde_step(x_t, v_old, step, **kwargs)
            loss_function = loss_without_mirror if fault == "no mirror" else nft.stepnft_loss
            loss, _ = loss_function(field(x_t, 1 - step / K), v_old, x_t, x_next, step, labels[row], granularity="chunk", **kwargs)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(field.parameters(), 1.0)
            optimizer.step()
        decay = 1.0 if fault == "rollout policy frozen" else nft.ema_decay(iteration, 0.1, 0.9, iterations)
        nft.update_rollout_policy(rollout_field.parameters(), field.parameters(), decay)
    return before, success_rate()


def test_the_method_solves_a_bandit():
    before, after = solve_bandit()
    assert 0.2 < before < 0.35
    assert after > 0.95


@pytest.mark.parametrize(
    "fault, most",
    [
        ("labels flipped", 0.05),
        ("no mirror", 0.35),
        ("target is x_t", 0.05),
        ("target is another sample", 0.4),
        ("target is the mean", 0.35),
        ("rollout policy frozen", 0.6),
    ],
)
def test_without_any_one_part_the_bandit_stays_unsolved(fault, most):
    _, after = solve_bandit(fault)
    assert after < most
