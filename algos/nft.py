# Docs: docs/nft.md. RL without a likelihood: python algos/nft.py --env-id PickCube-v1 (π0.5: --policy pi05)
"""DiffusionNFT (arXiv 2509.16117v2) for π0 and π0.5: flow matching at fresh noise on the executed chunks, by an implicit positive
and an implicit negative policy weighted by success, and a slowly moving rollout policy. Past the paper, by default: rollouts have
noise on the solver's steps, and labels come from a success predictor, and so do not tell from what state a chunk was executed. The
paper's settings, --labels group --group-size 16 --noise-level 0 --learning-rate 3e-5, stand still here."""

from __future__ import annotations

import copy
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness import Count, CountOrZero, Positive, PositiveOrZero, Share, Size
from pi_stepnft.policies.pi0 import sample_time


@dataclass
class Args(harness.RLArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """bundled policy to start from, by default pi0; with --checkpoint that says which it is"""

    # rollout
    noise_level: PositiveOrZero = 0.7
    """a of σ_t = a·sqrt(t / (1 − t)), exploration noise on every solver step, which the method's theory does not cover; 0: the ODE
    (the paper), whose only noise is the initial one (docs/notebook/nft.md)"""
    group_size: Count = 1
    """episodes from one initial state (authors: 24 pictures per prompt; label group needs more than 1)"""

    # what is learned from
    labels: Literal["binary", "group", "predicted"] = "predicted"
    """optimality r of a chunk. binary: 1 after success, 0 after failure; group: success relative to the episodes from the same
    initial state (the paper, with --group-size 16); predicted: how much the chunk changes the chance of success, which a small
    network, a critic, learns to predict"""
    gae_lambda: Share = 0.7
    """λ of label predicted: 0 believes the predictions, 1 the outcome"""
    label_deviations: Positive = 2.0
    """label predicted: a change of the chance by so many of its standard deviations makes an r of 0 or 1"""
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
    """passes over each iteration's chunks, each at fresh noise and times"""
    learning_rate: Positive = 1e-4
    """Adam's (label group ruins the policy above 3e-5)"""
    draws: Size = 4
    """noise/time draws per chunk and pass: they share its prefix and cost little"""
    beta: Positive = 1.0
    """β, how far the implicit policies v_old ± β·(v_θ − v_old) lie apart (authors: 1, or 0.1)"""
    times: Literal["flow", "solver"] = "flow"
    """t of the loss: flow: drawn as in the policy's own training; solver: those of the K solver steps, the only ones at which a
    rollout asks for a velocity (the authors' code)"""
    weighting: Literal["none", "adaptive"] = "adaptive"
    """none: squared errors of the velocity; adaptive: of the chunk it leads to, divided by their mean size (authors' code)"""
    ema_start: Share = 0.1
    """α of θ_old ← α·θ_old + (1 − α)·θ at the first iteration (authors: 0)"""
    ema_end: Share = 0.5
    """α at the end of its schedule (authors: 0.5, or 0.999)"""
    ema_horizon: CountOrZero = 60
    """iterations of α's cosine schedule (authors: linear, α = min(0.001·i, 0.5))"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.labels == "group" and args.group_size < 2:
        raise harness.RunError(f"--labels {args.labels} compares episodes from one initial state: give --group-size of at least 2")


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of action chunks; every field has a row for each of them."""

    state: torch.Tensor  # (M, S) normalised
    x_0: torch.Tensor  # (M, H, A) the chunk itself
    episode: torch.Tensor  # (M,) which of the iteration's episodes it belongs to
    turn: torch.Tensor  # (M,) how many chunks that episode had before it
    seen: torch.Tensor  # (M, W) what the predictor judges by; nothing, W = 0, without one


def flow_sde_step(
    x_t: torch.Tensor, v: torch.Tensor, step: torch.Tensor, *, num_steps: int, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv 2603.02083, Eq. 3: one Flow-SDE step x_next ~ N(μ(v), std²). The marginals are the flow ODE's.

    x_t, v: (B, H, A); step i: (B,) int in [0, num_steps), time t_i = 1 − i/K (1 noise, 0 action). Returns μ (B, H, A) and
    std (B, 1, 1). `noise_level` 0 gives the Euler step x_t − δ·v.
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
    policy: policies.Pi0, prefix: policies.Prefix, state: torch.Tensor, noise: torch.Tensor, *, num_steps: int, noise_level: float
) -> torch.Tensor:
    """Action chunks (B, H, A), sampled with noise on every solver step; by the ODE where noise_level is 0.

    noise: (B, K + 1, H, A) standard normal, which the path begins at and its steps add."""
    x = noise[:, 0]
    for i in range(num_steps):
        step = torch.full((len(x),), i, device=x.device)
        v = policy.velocity(prefix, state, x, 1 - step / num_steps).float()
        mean, std = flow_sde_step(x, v, step, num_steps=num_steps, noise_level=noise_level)
        x = mean + std * noise[:, i + 1]
    return x


def nft_loss(
    v_theta: torch.Tensor,
    v_old: torch.Tensor,
    target_v: torch.Tensor,
    r: torch.Tensor,
    *,
    beta: float = 1.0,
    t: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Paper, Eq. 5: flow matching by two implicit policies, v± = v_old ± β·(v_θ − v_old), on what succeeded and what failed.

    v_theta, v_old, target_v: (B, H, A), velocities at points x_t = (1 − t)·x_0 + t·ε and where they should lead, v = ε − x_0;
    optimality r: (B,) in [0, 1], 1 after success. mask: (H, A) bool, entries that count; None counts all.
    t: (B,) the points' times, for the adaptive weighting of §3.3: errors t·(v± − v), which are those of the chunk that the
    straight path from x_t ends in, divided by their mean magnitude in the sample. None: errors of the velocity as they are.

        loss = r·‖v⁺ − v‖² + (1 − r)·‖v⁻ − v‖²

    At θ = θ_old its gradient is (2r − 1)·β times that of flow matching: towards the executed chunk after success, away from it
    after failure. Returns the scalar loss, a mean over samples and entries, and metrics: positive, negative (the two errors),
    drift (mean ‖v_θ − v_old‖ per position).
    """
    weight = torch.ones_like(v_old) if mask is None else mask.to(v_old).expand_as(v_old)
    count = weight.sum((1, 2))  # (B,)
    dv = v_theta - v_old
    errors = []
    for sign in (1, -1):
        error = v_old + sign * beta * dv - target_v
        value = (weight * error.square()).sum((1, 2)) / count  # (B,)
        if t is not None:  # t²·value over the mean of t·|error|
            value = t * value / ((weight * error.detach().abs()).sum((1, 2)) / count).clamp(min=1e-5)
        errors.append(value)
    positive, negative = errors
    loss = (r * positive + (1 - r) * negative).mean()
    with torch.no_grad():
        positions = weight.amax(-1)  # (B, H)
        metrics = dict(
            positive=positive.mean(),
            negative=negative.mean(),
            drift=((dv * weight).norm(dim=-1) * positions).sum() / positions.sum(),
        )
    return loss, metrics


def chunk_optimality(
    success: np.ndarray, group: np.ndarray, episode: np.ndarray, turn: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Paper, §3.3: optimality r in [0, 1] of M chunks, and which of them carry signal (M,) bool.

    success, group: (E,) outcome and initial state of each episode; episode, turn: (M,) which episode a chunk belongs to, and how
    many chunks came before it there. "binary": the episode's success. "group": success compared with the share p of success among
    the episodes from the same initial state that were still running at this turn, r = ½ + ½·(success − p) / max(p, 1 − p), whose
    mean is ½. Where all of them succeed, or none does, the outcome tells nothing about the actions, and the chunks are dropped.
    """
    y = success[episode].astype(float)  # (M,)
    if kind == "binary":
        return y, np.ones(len(y), bool)
    _, peers = np.unique(np.stack([group[episode], turn]), axis=1, return_inverse=True)  # (M,)
    p = (np.bincount(peers, weights=y) / np.bincount(peers))[peers]
    return 0.5 + 0.5 * (y - p) / np.maximum(p, 1 - p), (p > 0) & (p < 1)


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
    """Paper, §3.3: θ_old ← α·θ_old + (1 − α)·θ."""
    for old, new in zip(rollout_parameters, parameters, strict=True):
        old.lerp_(new, 1 - decay)


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    check(args)
    run = harness.Run("nft", args)
    args, device, K = run.args, run.device, run.args.num_steps

    # Policy θ and rollout policy θ_old, which share what is frozen
    policy = run.load_policy()
    rollout_policy = copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})
    run.divide(policy, rollout_policy)
    parameters, rollout_parameters = ([p for p in w.parameters() if p.requires_grad] for w in (policy, rollout_policy))
    predictor = SuccessPredictor(policy, args.predictor_width).to(device)
    predicting = list(predictor.parameters()) if args.labels == "predicted" else []
    groups = [dict(params=parameters), dict(params=predicting, lr=args.predictor_learning_rate)]
    fused = device.type == "cuda"  # no temporary copies
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # as StepNFT's
    memory = deque(maxlen=args.predictor_iterations)  # what was seen in the last iterations, and what came of it
    if args.compile:
        policy.velocity, rollout_policy.velocity = torch.compile(policy.velocity), torch.compile(rollout_policy.velocity)
    run.make_envs(policy)
    E, G = args.num_envs * args.rollout_epochs, args.group_size
    run.begin(dict(policy=policy, rollout_policy=rollout_policy), optimizer, unsaved=dict(predictor=predicting), memory=memory)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: act with θ_old, remember chunks
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E // G).repeat(G))  # G episodes from each initial state
        with run.acting(rollout_policy) as acting:
            for turn in rollout:  # the next chunk of the episodes that are still running
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                noise = turn.noise(K + 1)
                x_0 = flow_sde_sample(acting, prefix, state, noise, num_steps=K, noise_level=args.noise_level)
                seen = state[:, :0]
                if predicting:
                    seen = predictor.sees(acting, prefix, state, noise[:, 0], turn.number / rollout.rewards.shape[1])
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, x_0, turn.episode, turn.number, seen))
                turn.act(policy.processor.unnormalize_actions(x_0[:, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- optimality
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        success, lost, group = rollout.success, rollout.lost, np.arange(len(rollout.seeds)) // G  # (E,), this rank's
        group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode
        episode, turn = chunks.episode.numpy(), chunks.turn.numpy()
        losses, keep = harness.Averages(), ~lost[episode]  # (M,) chunks to learn from
        if predicting:  # with what it has learned from earlier iterations: of these episodes it knows no outcome
            with torch.no_grad():
                told = predictor(chunks.seen)
            p = told.sigmoid().cpu().numpy()
            advantage = advantages(p, success, episode, turn, args.gae_lambda)
            label = np.clip(advantage / (args.label_deviations * run.mean(advantage[keep] ** 2) ** 0.5 + 1e-8), -1, 1)
            optimality = 0.5 + 0.5 * label
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
            optimality, signal = chunk_optimality(success, group, episode, turn, args.labels)
            keep &= signal
        optimality, M = torch.from_numpy(optimality).float().to(device), len(optimality)

        # ---------------------------------------------------------------------- update θ
        policy.train()
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        for _ in range(args.update_epochs):
            noises = torch.randn(M, args.draws, *run.mask.shape, device=device)  # (M, n, H, A)
            if args.times == "flow":
                times = sample_time((M, args.draws), device)  # (M, n)
            else:
                times = torch.randint(1, K + 1, (M, args.draws), device=device) / K
            for minibatch in run.minibatches(keep):  # none where no group has contrast
                optimizer.zero_grad()
                for row, share in minibatch:  # the loss is a mean over chunks, so are the gradients
                    noise, t = noises[row], times[row]  # (b, n, H, A), (b, n): n draws share a prefix
                    x_0, state, r = chunks.x_0[row, None], chunks.state[row], optimality[row, None]  # (b, 1, H, A), (b, S), (b, 1)
                    x_t = (1 - t[..., None, None]) * x_0 + t[..., None, None] * noise  # the forward process
                    prefix = prefixes.recall(policy, row)
                    v_theta = policy.velocity(prefix, state, x_t, t).float()
                    with torch.no_grad():  # a frozen VLM is θ_old's too
                        old_prefix = prefix if args.train == "expert" else prefixes.recall(rollout_policy, row)
                        v_old = rollout_policy.velocity(old_prefix, state, x_t, t).float()
                    points = v_theta, v_old, noise - x_0, r.expand_as(t), t
                    v_theta, v_old, target_v, r, t = (each.flatten(0, 1) for each in points)  # (b · n, …)
                    adaptive = t if args.weighting == "adaptive" else None
                    loss, metrics = nft_loss(v_theta, v_old, target_v, r, beta=args.beta, t=adaptive, mask=run.mask)
                    (share * loss).backward()
                    losses.add({**metrics, "loss": loss.detach()}, share)
                if run.clip_gradients(losses, grad_norm=parameters):
                    optimizer.step()

        # ---------------------------------------------------------------------- update θ_old
        alpha = ema_decay(iteration, args.ema_start, args.ema_end, args.ema_horizon)
        update_rollout_policy(rollout_parameters, parameters, alpha)

        run.log(rollout, losses, signal=keep, optimality_mean=optimality[torch.from_numpy(keep)], ema_decay=alpha)
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=2 * args.draws)  # velocities of a chunk in one pass of the update: θ's, and θ_old's without gradient


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
