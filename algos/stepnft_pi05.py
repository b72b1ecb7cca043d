# Docs: docs/stepnft.md. RL without a likelihood: python algos/stepnft_pi0.py (or stepnft_pi05.py) --env-id PickCube-v1
"""π-StepNFT (arXiv 2603.02083): noisy Flow-SDE rollouts, remembered solver transitions, mirrored velocity branches, a logistic
ranking loss, a slowly moving rollout policy. Past the paper, by default: a chunk's label is how much it changed the chance of
success, as a small network predicts it; noise level and learning rate are steered; all K transitions of a chunk are learned from.
--paper takes all of the paper's settings, which need no critic."""

from __future__ import annotations

import copy
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness import Count, CountOrZero, Positive, PositiveOrZero, Share, Size

# What differs between stepnft_pi0.py and stepnft_pi05.py; all else is the same text.
POLICY = "pi05"
ITERATIONS = 200
PAPER_EPOCHS = dict(maniskill=5, libero=1)
# End of what differs.

PAPER = dict(transitions="random", labels="binary", noise_level=0.2, divergence=0.0, granularity="position", mask_padding=False,
             ema_end=0.995, ema_horizon=1000, warmup_iterations=0, max_minutes=0.0, execute=5)
PAPER = dict(
    maniskill=PAPER | dict(num_envs=128, rollout_epochs=10, rollout_steps=60, update_epochs=PAPER_EPOCHS["maniskill"],
                           num_minibatches=3, learning_rate=8e-6, iterations=240),
    libero=PAPER | dict(num_envs=64, rollout_epochs=8, rollout_steps=240, update_epochs=PAPER_EPOCHS["libero"],
                        num_minibatches=12, learning_rate=1e-5, iterations=400),
)
"""--paper: the authors' settings. Their minibatches hold 5120 and 2048 chunks, which is a third and a twelfth of an iteration's."""


@dataclass
class Args(harness.RLArgs):
    iterations: Count = ITERATIONS
    """rollout + update rounds (authors: 400 LIBERO, 240 ManiSkill)"""
    paper: Literal["maniskill", "libero"] | None = None
    """start from the authors' settings instead of these defaults (the PAPER of this file); libero_goal and libero_10 had
    --update-epochs 4 (π0), libero_10 --execute 10 --rollout-steps 480, libero_goal 320"""

    # rollout
    noise_level: Positive | Literal["auto"] = "auto"
    """a of σ_t = a·sqrt(t / (1 − t)), the exploration noise on every solver step (authors: 0.2); auto: steered so that exploring
    costs as much success as --noise-success says"""
    noise_start: Positive = 0.5
    """--noise-level auto: the first level"""
    noise_success: Share = 0.8
    """--noise-level auto: successes of exploring episodes for each success without that noise"""
    plain_every: Annotated[int, Field(ge=2)] = 8
    """--noise-level auto: one of so many episodes, or groups, has no such noise: to compare with, and not to learn from"""
    noise_gain: Positive = 0.25
    """--noise-level auto: by how much of what the ratio is off the level's logarithm moves in an iteration"""
    noise_memory: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """--noise-level auto: weight of an iteration's successes beside those of the next, 0.9: the last ten count, more or less"""
    group_size: Count = 1
    """episodes from one initial state (authors: 1; label group needs more)"""

    # what is learned from
    transitions: Literal["random", "all"] | int = "all"
    """which solver transitions of a chunk to learn from: one random (the paper), all K (same environment cost), or this step"""
    labels: Literal["binary", "group", "predicted"] = "predicted"
    """predicted: how much a chunk changes the chance of success, which a small network, a critic, learns to predict; without one:
    binary: ±1 by success (the paper); group: success relative to the episodes from the same initial state (with --group-size 16)"""
    gae_lambda: Share = 0.7
    """λ of label predicted: 0 believes the predictions, 1 the outcome"""
    label_deviations: Positive = 2.0
    """label predicted: a change of the chance by so many of its standard deviations makes a label of ±1"""
    predictor_width: Size = 128
    """of the two hidden layers of the predictor"""
    predictor_iterations: Count = 8
    """iterations whose outcomes the predictor learns from"""
    predictor_epochs: Count = 4
    """passes over them per iteration"""
    predictor_learning_rate: Positive = 1e-3
    """Adam's for the predictor"""

    # update
    update_epochs: Count = 1
    """passes over each iteration's chunks; more fit the noise of a small batch (authors, with larger ones: π0 2 to 5, π0.5 1, 5)"""
    learning_rate: Positive = 1e-4
    """Adam's (authors: 1e-5 LIBERO, 8e-6 ManiSkill, at 3 B parameters), from which --divergence steers it"""
    divergence: PositiveOrZero = 0.05
    """KL divergence of θ's solver steps, within --max-drift, from θ_old's, to which the learning rate is steered; 0: not (paper)"""
    rate_step: Annotated[float, Field(gt=1)] = 1.3
    """--divergence: the most that an iteration multiplies or divides the learning rate by"""
    loss: Literal["ranking", "wmse", "positive", "negative"] = "ranking"
    """ranking: logistic, of both branches (the paper); wmse: their squared errors weighted by the label, as in DiffusionNFT;
    positive, negative: ranking of what succeeded or failed only"""
    target: Literal["xnext", "mean", "x0"] = "xnext"
    """what the branches have to explain: xnext: the sampled next solver state (the paper); mean: the mean of a step that heads for
    the executed chunk; x0: the executed chunk itself, by where the branches' straight paths end"""
    beta: Positive = 1.0
    """β, how far the mirrored branches v_old ± β·Δv lie apart (authors: 1)"""
    max_drift: Positive = 0.5
    """limit on the norm of Δv per action position (authors' code: 0.5)"""
    tr_coef: PositiveOrZero = 1e-4
    """λ of the trust-region term λ·mean (v_θ − v_old)² (authors: 1e-4)"""
    std_eps: PositiveOrZero = 1e-4
    """added to the variance of a solver step (authors' code: 1e-4)"""
    granularity: Literal["position", "chunk"] = "chunk"
    """rank each action position on its own (authors' code) or the chunk as a whole (the paper)"""
    mask_padding: bool = True
    """leave padded action dimensions and positions that are never executed out of the loss (authors' code: False)"""
    ema_start: Share = 0.1
    """α of θ_old ← α·θ_old + (1 − α)·θ at the first iteration (authors: 0.1)"""
    ema_end: Share = 0.5
    """α at the end of its schedule (authors: 0.995)"""
    ema_horizon: CountOrZero = 60
    """iterations of α's cosine schedule (authors' files: 1000, for runs of 400)"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.labels == "group" and args.group_size < 2:
        raise harness.RunError(f"--labels {args.labels} compares episodes from one initial state: give --group-size of at least 2")
    if isinstance(args.transitions, int) and not 0 <= args.transitions < args.num_steps:
        raise harness.RunError(f"--transitions {args.transitions} is no solver step: they go from 0 to {args.num_steps - 1}")


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of action chunks; every field has a row for each of them."""

    state: torch.Tensor  # (M, S) normalised
    x: torch.Tensor  # (M, K + 1, H, A) the solver's path, from noise to the chunk
    v: torch.Tensor  # (M, K, H, A) θ_old's velocities along it
    episode: torch.Tensor  # (M,) which of the iteration's episodes it belongs to
    turn: torch.Tensor  # (M,) how many chunks that episode had before it
    seen: torch.Tensor  # (M, W) what the predictor judges by; nothing, W = 0, without one


def flow_sde_step(
    x_t: torch.Tensor, v: torch.Tensor, step: torch.Tensor, *, num_steps: int, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paper, §4.1 and Eq. 3: one Flow-SDE step x_next ~ N(μ(v), std²), whose mean is affine in v. The marginals are the ODE's.

    x_t, v: (B, H, A); step i: (B,) int in [0, num_steps), time t_i = 1 − i/K (1 noise, 0 action). Returns μ (B, H, A) and
    std (B, 1, 1). `noise_level` 0 gives the Euler step x_t − δ·v. The sampler and the loss both call this function.
    """
    delta = 1.0 / num_steps
    t = (1 - step * delta).view(-1, 1, 1)
    # σ_t = a·sqrt(t / (1 − t)); at t = 1 the denominator is that of the next time, 1 − t_1 = δ
    sigma = noise_level * (t / torch.where(step.view(-1, 1, 1) == 0, delta, 1 - t)).sqrt()
    x0_hat = x_t - t * v  # the action end of the straight path
    x1_hat = x_t + (1 - t) * v  # its noise end
    mean = x0_hat * (1 - (t - delta)) + x1_hat * ((t - delta) - sigma**2 * delta / (2 * t))
    return mean, sigma * delta**0.5


def flow_sde_sample(
    policy: policies.Pi0, prefix: policies.Prefix, state: torch.Tensor, noise: torch.Tensor, *, num_steps: int,
    noise_level: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paper, §4.1, wider space: sample action chunks with noise on every solver step.

    noise: (B, K + 1, H, A) standard normal, which the path begins at and its steps add; noise_level: one, or (B, 1, 1). Returns the
    whole path x (B, K + 1, H, A), whose last entry is the action chunk, and the velocities v (B, K, H, A).
    """
    x = noise[:, 0]
    xs, vs = [x], []
    for i in range(num_steps):
        step = torch.full((len(x),), i, device=x.device)
        v = policy.velocity(prefix, state, x, 1 - step / num_steps).float()
        mean, std = flow_sde_step(x, v, step, num_steps=num_steps, noise_level=noise_level)
        x = mean + std * noise[:, i + 1]
        xs.append(x)
        vs.append(v)
    return torch.stack(xs, 1), torch.stack(vs, 1)


def stepnft_loss(
    v_theta: torch.Tensor,
    v_old: torch.Tensor,
    x_t: torch.Tensor,
    x_next: torch.Tensor,
    step: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
    beta: float = 1.0,
    max_drift: float = 0.5,
    tr_coef: float = 1e-4,
    std_eps: float = 1e-4,
    granularity: str = "position",
    loss: str = "ranking",
    target: str = "xnext",
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Paper, §4.1 (mirrored errors E±) and §4.2 (contrastive objective): rank the branches v± = v_old ± β·Δv by how well their
    solver step explains the remembered x_next.

    v_theta, v_old, x_t, x_next: (B, H, A); step: (B,) int in [0, num_steps); labels y: (B,) in [-1, 1], +1 after success.
    granularity: "position" ranks each of the H action positions (the released code), "chunk" their sum (the paper).
    loss: "ranking" as below; "wmse" (§4.4) the branches' squared errors weighted by the label, ½·(r·E⁺ + (1 − r)·E⁻) with
    r = (1 + y)/2; "positive", "negative" rank only what has a label above or below zero. target: with "x0" the branches are judged
    by where their straight paths end, x_t − t·v±, and x_next holds the executed chunk; the others differ in x_next alone.
    mask: (H, A) or (B, H, A) bool, entries that count; None counts all, padded ones included (the released code).

        loss = softplus( ½·y·(E⁺ − E⁻) ) + λ·mean (v_θ − v_old)²,   E± = Σ (x_next − μ(v±))² / (std² + std_eps)

    Success pulls v_θ to where the branch v⁺ explains the executed step better than its mirror image, failure pushes it away
    (Theorem 4.4): E⁺ − E⁻ is −4·⟨(x_next − μ(v_old)) / (std² + std_eps), μ(Δv) − μ(0)⟩·β, the drift's projection on the noise.
    At θ = θ_old the loss is log 2. Returns the scalar loss and metrics: pref_acc (share of the rankings that agree with the
    label's sign), drift (mean ‖Δv‖ per position before the limit), drift_limited (share of positions at the limit), ranking, and
    divergence, ½·Σ (μ(v_old + Δv) − μ(v_old))² / (std² + std_eps): the KL divergence of a chunk's solver step, mean over B.
    """
    weight = torch.ones_like(x_t) if mask is None else mask.to(x_t).expand_as(x_t)
    difference = (v_theta - v_old) * weight
    # The limit's coefficient carries gradient, as in the released code; 1e-12 keeps the root differentiable at zero.
    norm = (difference.square().sum(-1, keepdim=True) + 1e-12).sqrt()  # (B, H, 1)
    dv = difference * (max_drift / norm).clamp(max=1.0)

    kwargs = dict(num_steps=num_steps, noise_level=noise_level)
    mean_plus, std = flow_sde_step(x_t, v_old + beta * dv, step, **kwargs)
    mean_minus, _ = flow_sde_step(x_t, v_old - beta * dv, step, **kwargs)
    apart = mean_plus - mean_minus
    if target == "x0":
        mean_plus, mean_minus = (x_t - (1 - step / num_steps).view(-1, 1, 1) * (v_old + sign * beta * dv) for sign in (1, -1))
    variance = std**2 + std_eps
    energy_plus = (weight * (x_next - mean_plus) ** 2 / variance).sum(-1)  # (B, H)
    energy_minus = (weight * (x_next - mean_minus) ** 2 / variance).sum(-1)
    y = {"positive": labels.clamp(min=0), "negative": labels.clamp(max=0)}.get(loss, labels).view(-1, 1)
    counted = weight.amax(-1)  # (B, H) positions with anything to rank
    if granularity == "chunk":
        energy_plus, energy_minus = energy_plus.sum(1, keepdim=True), energy_minus.sum(1, keepdim=True)  # (B, 1)
        counted = torch.ones_like(energy_plus)
    margin = 0.5 * y * (energy_plus - energy_minus)  # negative where the ranking agrees with the label
    values = F.softplus(margin)
    if loss == "wmse":  # its slope at θ = θ_old is the ranking's
        values = 0.25 * ((1 + y) * energy_plus + (1 - y) * energy_minus)
    ranking = (values * counted).sum() / counted.sum()
    total = ranking + tr_coef * difference.square().sum() / weight.sum()
    with torch.no_grad():
        positions, ranked = weight.amax(-1, keepdim=True), counted * (y != 0)
        metrics = dict(
            ranking=ranking.detach(),
            divergence=(weight * apart**2 / variance).sum() / (8 * beta**2 * len(x_t)),
            pref_acc=((margin < 0) * ranked).sum() / ranked.sum().clamp(min=1),
            drift=(norm * positions).sum() / positions.sum(),
            drift_limited=((norm > max_drift) * positions).sum() / positions.sum(),
        )
    return total, metrics


def ablation_target(
    target: str, x_t: torch.Tensor, x_next: torch.Tensor, x_0: torch.Tensor, step: torch.Tensor, **solver: float
) -> torch.Tensor:
    """What the branches have to explain (B, H, A): the sampled x_next (the paper's choice), or what its ablations (§5.3) put there.

    x_t, x_next, x_0 (the executed chunk): (B, H, A); step: (B,) int. "mean": the mean of a step along the straight line from x_t to
    x_0; "x0": the executed chunk itself. solver: num_steps and noise_level, as in `flow_sde_step`.
    """
    if target == "mean":
        straight = (x_t - x_0) / (1 - step / solver["num_steps"]).view(-1, 1, 1)  # the velocity that leads to the executed chunk
        return flow_sde_step(x_t, straight, step, **solver)[0]
    return x_0 if target == "x0" else x_next


def chunk_labels(
    success: np.ndarray, group: np.ndarray, episode: np.ndarray, turn: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Labels y in [-1, 1] of M chunks by the outcome alone, and which of them carry signal (M,) bool.

    success, group: (E,) outcome and initial state of each episode; episode, turn: (M,) which episode a chunk belongs to, and how
    many chunks came before it there. "binary": ±1 by the episode's success (the paper). "group": success compared with the share p
    of success among the episodes from the same initial state that were still running at this turn,
    y = (success − p) / max(p, 1 − p), whose mean is zero. Where all of them succeed, or none does, the outcome tells nothing about
    the actions, and the chunks are dropped.
    """
    if kind not in ("binary", "group"):
        raise ValueError(f'labels by the outcome alone are "binary" and "group", got {kind!r}')
    y = success[episode].astype(float)  # (M,)
    if kind == "binary":
        return 2 * y - 1, np.ones(len(y), bool)
    _, peers = np.unique(np.stack([group[episode], turn]), axis=1, return_inverse=True)  # (M,)
    p = (np.bincount(peers, weights=y) / np.bincount(peers))[peers]
    return (y - p) / np.maximum(p, 1 - p), (p > 0) & (p < 1)


def steered_noise(level: float, exploring: float, plain: float, target: float, gain: float) -> float:
    """The next noise level: higher where exploring episodes succeed more than `target` times as often as plain ones, else lower.

    exploring, plain: shares of success. gain: 0.25 moves the level by a twentieth where the ratio is off by 0.2.
    """
    ratio = (exploring + 0.02) / (plain + 0.02)  # 1 where nothing succeeds
    return float(np.clip(level * np.exp(gain * np.clip(ratio - target, -0.4, 0.4)), 0.02, 2.0))


def steered_rate(scale: float, divergence: float, target: float, step: float) -> float:
    """The next scale of the learning rate: the divergence grows with its square, and comes to `target` by factors up to `step`."""
    return min(100.0, scale * float(np.clip((target / max(divergence, 1e-12)) ** 0.5, 1 / step, step)))


class SuccessPredictor(nn.Module):
    """The chance that an episode will succeed, from what the policy offers a critic, the state and the time; one half at first."""

    def __init__(self, policy: policies.Pi0, width: int):
        super().__init__()
        layers = nn.Linear(policy.critic_width + policy.config.state_dim + 1, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.net = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def sees(
        self, policy: policies.Pi0, prefix: policies.Prefix, state: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """state: (B, S) normalised; noise: (B, H, A), where the solver's path begins; time: (B,) share of the episode that is over.
        -> (B, W)"""
        features = policy.features(prefix, state, noise, torch.ones(len(noise), device=noise.device))
        return torch.cat((policy.critic_features(prefix, features), state, time.to(state)[:, None]), 1)

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        """seen (B, W) -> logits (B,)"""
        return self.net(seen).squeeze(-1)


def advantages(p: np.ndarray, success: np.ndarray, episode: np.ndarray, turn: np.ndarray, gae_lambda: float) -> np.ndarray:
    """How much each of M chunks changes the chance of success: generalised advantages (arXiv 1506.02438) without discount, (M,).

    p, episode, turn: (M,) predicted chance before a chunk, which episode it belongs to, and how many chunks came before it there;
    success: (E,). The change p′ − p to the next chunk's p′, or to the outcome after the last one, and λ times what follows.
    """
    advantage, order = np.zeros(len(p)), np.lexsort((-turn, episode))  # from each episode's last chunk to its first
    for i, later in zip(order, np.concatenate(([-1], order))):
        if later >= 0 and episode[later] == episode[i]:
            advantage[i] = p[later] - p[i] + gae_lambda * advantage[later]
        else:
            advantage[i] = success[episode[i]] - p[i]
    return advantage


def ema_decay(iteration: int, start: float, end: float, horizon: int) -> float:
    """α of θ_old ← α·θ_old + (1 − α)·θ: a cosine from `start` to `end` over `horizon` iterations."""
    return end + (start - end) * 0.5 * (1 + np.cos(np.pi * min(1.0, iteration / max(1, horizon))))


@torch.no_grad()
def update_rollout_policy(rollout_parameters, parameters, decay: float) -> None:
    """θ_old ← α·θ_old + (1 − α)·θ."""
    for old, new in zip(rollout_parameters, parameters, strict=True):
        old.lerp_(new, 1 - decay)


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    check(args)
    run = harness.Run("stepnft", args, POLICY)
    args, device, K = run.args, run.device, run.args.num_steps

    # Policy θ and rollout policy θ_old, which share what is frozen
    policy = run.load_policy()
    rollout_policy = copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})
    run.divide(policy, rollout_policy)
    parameters, rollout_parameters = ([p for p in w.parameters() if p.requires_grad] for w in (policy, rollout_policy))
    predictor = SuccessPredictor(policy, args.predictor_width).to(device)
    predicting = list(predictor.parameters()) if args.labels == "predicted" else []
    groups = [dict(params=parameters), dict(params=predicting, lr=args.predictor_learning_rate)]
    optimizer = torch.optim.Adam(groups, args.learning_rate, (0.9, 0.95), eps=1e-5, fused=device.type == "cuda")  # the authors'
    memory = deque(maxlen=args.predictor_iterations)  # what was seen in the last iterations, and what came of it
    if args.compile:
        policy.velocity, rollout_policy.velocity = torch.compile(policy.velocity), torch.compile(rollout_policy.velocity)
    mask = run.mask if args.mask_padding else torch.ones_like(run.mask)
    run.make_envs(policy)
    E, G = args.num_envs * args.rollout_epochs, args.group_size
    every = max(2, min(args.plain_every, E // G))  # one of so many groups goes without noise on its steps
    # What is steered, noise level and learning rate's scale; sums of exploring and plain episodes' success, and their weight
    first_level = args.noise_start if args.noise_level == "auto" else args.noise_level
    steered = level, scale, successes = torch.tensor(first_level), torch.ones(()), torch.zeros(3)
    trained, unsaved = dict(policy=policy, rollout_policy=rollout_policy), dict(predictor=predicting, steered=list(steered))
    run.begin(trained, optimizer, unsaved=unsaved, memory=memory)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: explore with θ_old, remember transitions
        solver = dict(num_steps=K, noise_level=float(level))
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E // G).repeat(G))  # G episodes from each initial state
        group = np.arange(len(rollout.seeds)) // G  # (E,), this rank's
        plain = (rollout.among_all // G % every == every - 1) & (args.noise_level == "auto")  # (E,) those groups
        levels = torch.from_numpy(np.where(plain, 0, float(level))).float().to(device)[:, None, None]
        with run.acting(rollout_policy) as acting:
            for turn in rollout:  # the next chunk of the episodes that are still running
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                x, v = flow_sde_sample(acting, prefix, state, turn.noise(K + 1), num_steps=K, noise_level=levels[turn.episode])
                seen = state[:, :0]
                if predicting:
                    seen = predictor.sees(acting, prefix, state, x[:, 0], turn.number / rollout.rewards.shape[1])
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, x, v, turn.episode, turn.number, seen))
                turn.act(policy.processor.unnormalize_actions(x[:, -1, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- labels
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        success, lost = rollout.success, rollout.lost  # (E,)
        group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode
        episode, turn = chunks.episode.numpy(), chunks.turn.numpy()
        losses, keep = harness.Averages(), ~(lost | plain)[episode]  # (M,) chunks to learn from
        if predicting:  # with what it has learned from earlier iterations: of these episodes it knows no outcome
            with torch.no_grad():
                told = predictor(chunks.seen)
            p = told.sigmoid().cpu().numpy()
            advantage = advantages(p, success, episode, turn, args.gae_lambda)
            labels = np.clip(advantage / (args.label_deviations * run.mean(advantage[keep] ** 2) ** 0.5 + 1e-8), -1, 1)
            used, outcome = torch.from_numpy(keep).to(device), torch.from_numpy(success[episode]).float().to(device)
            losses.add(dict(predictor=F.binary_cross_entropy_with_logits(told[used], outcome[used])))
            memory.append([chunks.seen[used], outcome[used]])
            seen, outcome = (torch.cat([each.to(device) for each in kept]) for kept in zip(*memory))
            for _ in range(args.predictor_epochs):
                for minibatch in run.minibatches(np.ones(len(seen), bool)):
                    optimizer.zero_grad()
                    for row, share in minibatch:
                        (share * F.binary_cross_entropy_with_logits(predictor(seen[row]), outcome[row])).backward()
                    if run.clip_gradients(losses, predictor_grad_norm=predicting):
                        optimizer.step()
        else:
            labels, signal = chunk_labels(success, group, episode, turn, args.labels)
            keep &= signal
        y, M = torch.from_numpy(labels).float().to(device), len(labels)
        steps = torch.arange(K, device=device).expand(M, K)  # (M, n) transitions of each
        if args.transitions == "random":
            steps = torch.randint(K, (M, 1), device=device)
        elif args.transitions != "all":
            steps = steps[:, args.transitions, None]

        # ---------------------------------------------------------------------- update θ
        policy.train()
        warmed_up = min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        optimizer.param_groups[0]["lr"] = args.learning_rate * float(scale) * warmed_up
        for _ in range(args.update_epochs):
            for minibatch in run.minibatches(keep):  # none where no group has contrast
                optimizer.zero_grad()
                for mb, share in minibatch:  # the loss is a mean over chunks, so are the gradients
                    row, step = mb[:, None], steps[mb]  # (b, 1), (b, n): n transitions per chunk, which share its prefix
                    x_t, x_next, x_0 = (chunks.x[row, i] for i in (step, step + 1, torch.full_like(step, K)))  # (b, n, H, A)
                    prefix = prefixes.recall(policy, mb)
                    v_theta = policy.velocity(prefix, chunks.state[mb], x_t, 1 - step / K).float()
                    transitions = v_theta, chunks.v[row, step], x_t, x_next, x_0, step, y[row].expand_as(step)
                    v_theta, v_old, x_t, x_next, x_0, step, label = (each.flatten(0, 1) for each in transitions)  # (b · n, …)
                    x_next = ablation_target(args.target, x_t, x_next, x_0, step, **solver)
                    loss, metrics = stepnft_loss(
                        v_theta, v_old, x_t, x_next, step, label, **solver, beta=args.beta, max_drift=args.max_drift,
                        tr_coef=args.tr_coef, std_eps=args.std_eps, granularity=args.granularity, loss=args.loss,
                        target=args.target, mask=mask,
                    )
                    (share * loss).backward()
                    losses.add({**metrics, "loss": loss.detach()}, share)
                if run.clip_gradients(losses, grad_norm=parameters):
                    optimizer.step()

        # ---------------------------------------------------------------------- update θ_old
        alpha = ema_decay(iteration, args.ema_start, args.ema_end, args.ema_horizon)
        update_rollout_policy(rollout_parameters, parameters, alpha)

        # ---------------------------------------------------------------------- steer the next iteration
        charts = dict(signal=keep, label_mean=labels[keep], ema_decay=alpha, noise_level=float(level))
        shares = [run.mean(success[which & ~lost]) for which in (~plain, plain)]
        if not np.isnan(shares).any():
            successes.mul_(args.noise_memory).add_(torch.tensor([*shares, 1.0]))
            charts["success_exploring"], charts["success_plain"] = shares = (successes[:2] / successes[2]).tolist()
            level.fill_(steered_noise(float(level), *shares, args.noise_success, args.noise_gain))
        if args.divergence and (divergence := losses.means().get("divergence")) is not None:
            scale.fill_(steered_rate(float(scale), divergence, args.divergence, args.rate_step))
        run.log(rollout, losses, **charts)
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=K if args.transitions == "all" else 1)  # velocities of a chunk in one pass of the update


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__, PAPER))
