# Docs: docs/ppo.md. RL with a critic and a likelihood: python algos/ppo.py --env-id PickCube-v1 (π0.5: --policy pi05)
"""PPO as in πRL (arXiv 2510.25889v3) for π0 and π0.5: one noisy solver step per action chunk among ODE steps, its Gaussian
likelihood in a clipped ratio, generalised advantages over chunks from a value head on the policy's features."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
from torch import nn

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness import Count, CountOrZero, Positive, PositiveOrZero, Share


@dataclass
class Args(harness.RLArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """bundled policy to start from, by default pi0; with --checkpoint that says which it is"""

    # rollout
    rollout_steps: CountOrZero | None = None
    """steps, in whole chunks, after which a training episode is cut off; 0: the task's own limit, as in evaluations (authors'
    ManiSkill: 80). Default: 0.64 of that limit, 32 of 50"""
    noise: Literal["sde", "learned"] = "sde"
    """sde: Flow-SDE, one random solver step of a chunk is noisy; learned: Flow-Noise, all are, by a noise network"""
    noise_level: Positive = 1.0
    """sde: a of σ_t = a·sqrt(t / (1 − t)), the exploration noise of the one step (authors: 0.5)"""
    noise_min: Positive = 0.08
    """learned: least standard deviation of a solver step (πRL: between 0.08 and 0.16)"""
    noise_max: Positive = 0.16
    """learned: its greatest"""

    # what is learned from
    gamma: Share = 0.99
    """discount per chunk (authors: 0.99)"""
    gae_lambda: Share = 0.95
    """λ of the generalised advantages, per chunk (authors: 0.95)"""
    bootstrap: bool = True
    """where an episode is cut off, count its last observation's value as what would follow; False: nothing, as after a failure"""
    normalize_advantages: bool = True
    """to mean 0 and deviation 1 over an iteration's chunks (authors: True)"""

    # update
    update_epochs: Count = 2
    """passes over each iteration's chunks (authors, with larger batches: 4)"""
    learning_rate: Positive = 3e-5
    """Adam's for the policy (authors: 5e-6 LIBERO, 7.9e-6 ManiSkill, at 3 B parameters)"""
    value_learning_rate: Positive = 1e-3
    """Adam's for the value head (authors: 1e-4 LIBERO, 1.6e-4 ManiSkill)"""
    critic_warmup: CountOrZero = 2
    """first iterations in which only the value head is updated"""
    warmup_iterations: CountOrZero = 5
    """iterations of linear warm-up of the policy's learning rate, after those"""
    max_grad_norm: Positive = 1.0
    """gradient clipping, of the policy and of the value head each (authors: 1)"""
    clip: Positive = 0.2
    """ε, how far the ratio may move from 1 with gradient (authors: 0.2)"""
    value_clip: Positive = 0.2
    """how far a value may move from its rollout's with gradient (authors: 0.2)"""
    detach_critic: bool = True
    """keep the value loss from training the policy's own weights (authors: True)"""
    entropy_coef: PositiveOrZero = 0.0
    """learned: weight of the entropy bonus, a mean over action entries and solver steps (authors: 0.005)"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if not args.noise_min <= args.noise_max:
        raise harness.RunError(f"--noise-max {args.noise_max} must not be less than --noise-min {args.noise_min}")
    if args.noise == "sde" and args.entropy_coef:
        raise harness.RunError("--entropy-coef has nothing to raise where the noise is given: add --noise learned")


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of action chunks; every field has a row for each of them."""

    state: torch.Tensor  # (M, S) normalised
    x: torch.Tensor  # (M, K + 1, H, A) the solver's path, from noise to the chunk
    step: torch.Tensor  # (M, n) which of its steps were noisy
    log_prob: torch.Tensor  # (M,) of those steps together
    value: torch.Tensor  # (M,)
    episode: torch.Tensor  # (M,) which of the iteration's episodes it belongs to
    turn: torch.Tensor  # (M,) how many chunks that episode had before it


def flow_sde_step(
    x_t: torch.Tensor, v: torch.Tensor, step: torch.Tensor, *, num_steps: int, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """πRL, Eq. 9: one Flow-SDE step x_next ~ N(μ(v), std²). The marginals are the flow ODE's.

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


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU in between; the last one begins at zero."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.GELU())][:-1]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class ValueHead(nn.Module):
    """πRL, §4.3.2: V from what the policy offers a critic; πRL's widths 1024, 512, 256, 128, 1, in proportion."""

    def __init__(self, width: int):
        super().__init__()
        self.net = mlp(width, width // 2, width // 4, width // 8, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features (B, width) -> values (B,)"""
        return self.net(features).squeeze(-1)


class NoiseHead(nn.Module):
    """πRL, Eq. 4, Flow-Noise: the standard deviation of every entry of a solver step, between two bounds."""

    def __init__(self, width: int, action_dim: int, low: float, high: float):
        super().__init__()
        self.low, self.ratio = low, high / low
        self.net = mlp(width, width // 2, action_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The expert's features (..., H, width) -> std (..., H, A); in the middle of the (logarithmic) range at first"""
        return self.low * self.ratio ** self.net(features).sigmoid()


def actor_critic(
    policy: policies.Pi0,
    value_head: ValueHead,
    noise_head: NoiseHead | None,
    prefix: policies.Prefix,
    state: torch.Tensor,
    x_t: torch.Tensor,
    step: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
    detach_critic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward pass at n solver steps per chunk, in the rollout and in the update alike.

    x_t: (B, n, H, A); step: (B, n) int. Returns the velocity (B, n, H, A), mean and standard deviation of x_next, and values (B,),
    which see the observation and, of π0, the first of the steps: its x_t was there before any noise that the likelihood counts, so
    as a baseline the value leaves the policy gradient unbiased.
    """
    features = policy.features(prefix, state, x_t, 1 - step / num_steps)  # (B, n, H, W)
    v = policy.action_out_proj(features).float()
    if noise_head is None:
        mean, std = flow_sde_step(*(x.flatten(0, 1) for x in (x_t, v, step)), num_steps=num_steps, noise_level=noise_level)
        mean, std = mean.view_as(v), std.view(*step.shape, 1, 1)
    else:
        mean, std = x_t - v / num_steps, noise_head(features)
    seen = policy.critic_features(prefix, features[:, 0])
    value = value_head(seen.detach() if detach_critic else seen)
    return v, mean, std, value


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Gaussian log density of the executed entries, summed over a chunk's noisy steps (πRL, Eq. 5).

    x_next, mean: (B, n, H, A); std: (B, n, H or 1, A or 1); mask: (H, A). Returns (B,).
    """
    density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return (density * mask).sum((1, 2, 3))


def flow_sde_sample(
    policy: policies.Pi0,
    value_head: ValueHead,
    noise_head: NoiseHead | None,
    prefix: policies.Prefix,
    state: torch.Tensor,
    step: torch.Tensor,
    noise: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """πRL, §4.2.3: sample action chunks by the ODE, but for one random noisy step each; with a noise head all are noisy (§4.1).

    step: (B, n) the noisy steps; noise: (B, K + 1, H, A) standard normal, which the path begins at and its noisy steps add;
    mask: (H, A) bool, the executed entries, whose likelihood it is. Returns the path x (B, K + 1, H, A), whose last entry is the
    action chunk, and log-probability and value (B,) of each chunk.
    """
    B, K, device = len(noise), num_steps, noise.device
    x = noise[:, :1]
    xs, log_probs, values = [x], torch.zeros(B, device=device), torch.zeros(B, device=device)
    for i in range(K):
        now = torch.full((B, 1), i, device=device)
        v, mean, std, value = actor_critic(
            policy, value_head, noise_head, prefix, state, x, now, num_steps=K, noise_level=noise_level
        )
        noisy = (step == i).any(1)  # (B,)
        x = torch.where(noisy.view(-1, 1, 1, 1), mean + std * noise[:, i + 1, None], x - v / K)
        log_probs += noisy * log_prob(x, mean, std, mask)
        values = torch.where(step[:, 0] == i, value, values)
        xs.append(x)
    return torch.cat(xs, 1), log_probs, values


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    valid: np.ndarray,
    terminated: np.ndarray,
    last_values: np.ndarray,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """πRL, Eq. 13 (arXiv 1506.02438): generalised advantages and returns (E, P) of E episodes of up to P chunks.

    rewards, values: (E, P) of each chunk; valid: (E, P) bool, True for the chunks an episode has, its first ones. terminated: (E,)
    bool, whether nothing follows; where an episode was cut off instead, last_values (E,) is the value of its last observation.
    """
    following, advantage, advantages = np.where(terminated, 0.0, last_values), np.zeros(len(rewards)), np.zeros(rewards.shape)
    for p in reversed(range(rewards.shape[1])):
        delta = rewards[:, p] + gamma * following - values[:, p]
        advantage = np.where(valid[:, p], delta + gamma * gae_lambda * advantage, 0.0)
        following = np.where(valid[:, p], values[:, p], following)
        advantages[:, p] = advantage
    return advantages, advantages + values


def ppo_loss(
    new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """πRL, Eq. 14 and 15: the clipped surrogate −min(r·A, clamp(r, 1 − ε, 1 + ε)·A) of arXiv 1707.06347, r = exp(new − old).

    new, old: (B,) log-probabilities; advantages: (B,). Returns the scalar loss, a mean over chunks, and metrics: approx_kl (mean
    r − 1 − log r), clip_fraction (share of ratios beyond the clip), ratio_deviation (mean |r − 1|).
    """
    ratio = (new - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    with torch.no_grad():
        deviation = (ratio - 1).abs()
        metrics = dict(
            policy=loss.detach(),
            approx_kl=(ratio - 1 - (new - old)).mean(),
            clip_fraction=(deviation > clip).float().mean(),
            ratio_deviation=deviation.mean(),
        )
    return loss, metrics


def value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, *, clip: float) -> torch.Tensor:
    """½·max of the squared errors of the value and of the value held within ±clip of the rollout's, mean over chunks; all (B,)."""
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.max((new - returns) ** 2, (clipped - returns) ** 2).mean()


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    check(args)
    run = harness.Run("ppo", args)
    args, device, K = run.args, run.device, run.args.num_steps

    # Policy, value head and, for Flow-Noise, noise network
    policy, noise_head = run.load_policy(), None
    run.divide(policy)
    value_head = ValueHead(policy.critic_width).to(device)
    if args.noise == "learned":
        c = policy.config
        noise_head = NoiseHead(c.expert_width, c.action_dim, args.noise_min, args.noise_max).to(device)
    heads = dict(value_head=list(value_head.parameters()), noise_head=list(noise_head.parameters()) if noise_head else [])
    actor, critic = [p for p in policy.parameters() if p.requires_grad] + heads["noise_head"], heads["value_head"]
    groups = [dict(params=actor), dict(params=critic, lr=args.value_learning_rate)]
    fused = device.type == "cuda"  # no temporary copies
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # as StepNFT's
    if args.compile:
        policy.features = torch.compile(policy.features)
    solver = dict(num_steps=K, noise_level=args.noise_level)
    run.make_envs(policy)
    E = args.num_envs * args.rollout_epochs
    run.begin(dict(policy=policy), optimizer, unsaved=heads)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: one noisy solver step per chunk
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E), observe_cut=args.bootstrap)
        last_values = np.zeros(len(rollout.seeds))
        with run.acting(policy) as acting:
            for turn in rollout:  # the next chunk of the episodes that are still running
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                step = turn.integers(K)[:, None] if noise_head is None else torch.arange(K, device=device).expand(len(state), K)
                path = step, turn.noise(K + 1)
                x, log_probs, values = flow_sde_sample(acting, value_head, noise_head, prefix, state, *path, run.mask, **solver)
                if turn.cut:  # their last observation's value is that of one more chunk, never executed
                    last_values[turn.episode] = values.cpu()
                    continue
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, x, step, log_probs, values, turn.episode, turn.number))
                turn.act(policy.processor.unnormalize_actions(x[:, -1, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- advantages
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        episode, turn = chunks.episode.numpy(), chunks.turn.numpy()
        values, valid = np.zeros((2, *rollout.rewards.shape))  # (E, P) each
        values[episode, turn], valid[episode, turn] = chunks.value.cpu(), 1
        tables = gae(rollout.rewards, values, valid > 0, rollout.terminated, last_values, gamma=args.gamma,
                     gae_lambda=args.gae_lambda)
        advantages, returns = (torch.from_numpy(table[episode, turn]).float().to(device) for table in tables)
        keep = ~rollout.lost[episode]  # (M,) chunks to learn from
        used = torch.from_numpy(keep).to(device)
        if args.normalize_advantages:  # over all ranks
            advantages = advantages - run.mean(advantages[used])
            advantages = advantages / (run.mean(advantages[used] ** 2) ** 0.5 + 1e-8)

        # ---------------------------------------------------------------------- update
        policy.train()
        losses = harness.Averages()
        warming = iteration < args.critic_warmup
        ramp = (iteration + 1 - args.critic_warmup) / max(1, args.warmup_iterations)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, max(0.0, ramp))
        for _ in range(args.update_epochs):
            for minibatch in run.minibatches(keep):
                optimizer.zero_grad()
                for row, share in minibatch:  # the loss is a mean over chunks, so are the gradients
                    step = chunks.step[row]  # (b, n): n noisy steps per chunk, which share its prefix
                    x_t, x_next = (chunks.x[row[:, None], i] for i in (step, step + 1))  # (b, n, H, A)
                    prefix = prefixes.recall(policy, row)
                    _, mean, std, new_values = actor_critic(
                        policy, value_head, noise_head, prefix, chunks.state[row], x_t, step,
                        detach_critic=args.detach_critic or warming, **solver,
                    )
                    log_probs = log_prob(x_next, mean, std, run.mask)
                    loss, metrics = ppo_loss(log_probs, chunks.log_prob[row], advantages[row], clip=args.clip)
                    if args.noise == "learned":
                        log_std = std.log()[:, :, run.mask].mean()
                        loss = loss - args.entropy_coef * log_std  # a Gaussian's entropy, but for a constant
                        metrics["noise_std"] = log_std.detach().exp()
                    critic_loss = value_loss(new_values, chunks.value[row], returns[row], clip=args.value_clip)
                    (share * (critic_loss if warming else loss + critic_loss)).backward()
                    losses.add({**metrics, "value": critic_loss.detach()}, share)
                if run.clip_gradients(losses, grad_norm=actor, value_grad_norm=critic):
                    optimizer.step()

        value, target = chunks.value[used], returns[used]
        variance = lambda x: run.mean((x - run.mean(x)) ** 2)
        explained = 1 - variance(target - value) / max(variance(target), 1e-8)
        run.log(rollout, losses, value_mean=value, return_mean=target, explained_variance=explained)
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=K if args.noise == "learned" else 1)  # velocities of a chunk in one pass of the update


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
