# Docs: docs/grpo.md. RL without critic: python algos/grpo.py --env-id PickCube-v1 (π0.5: --policy pi05)
"""GRPO on Flow-SDE (πRL, arXiv 2510.25889v3) for π0 and π0.5: one noisy solver step among ODE steps, whose Gaussian gives a
likelihood, advantages relative to the episodes from the same initial state (arXiv 2402.03300), a clipped ratio."""

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

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness import Count, Positive


@dataclass
class Args(harness.RLArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """bundled policy to start from, by default pi0; with --checkpoint that says which it is"""

    # rollout
    noise_level: Positive = 1.0
    """a of σ_t = a·sqrt(t / (1 − t)), the exploration noise on the one noisy solver step of a chunk (authors: 0.5)"""
    group_size: Count = 16
    """episodes from one initial state (authors: 8), which are compared with each other"""

    # update
    update_epochs: Count = 1
    """passes over each iteration's chunks (authors: 4)"""
    learning_rate: Positive = 3e-5
    """Adam's (authors: 5e-6, at 3 B parameters)"""
    clip: Positive = 0.2
    """how far the likelihood ratio may leave 1 before a chunk stops pulling (authors: 0.2)"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.group_size < 2:
        raise harness.RunError(f"--group-size {args.group_size} leaves nothing to compare an episode with: it must be at least 2")


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of action chunks; every field has a row for each of them."""

    state: torch.Tensor  # (M, S) normalised
    x: torch.Tensor  # (M, K + 1, H, A) the solver's path, from noise to the chunk
    step: torch.Tensor  # (M,) which of its steps was noisy
    log_prob: torch.Tensor  # (M,) of that step
    episode: torch.Tensor  # (M,) which of the iteration's episodes it belongs to


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


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Gaussian log density of the executed entries, summed over the chunk: (B, H, A), mask (H, A) bool -> (B,)."""
    density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return (density * mask).sum((1, 2))


def flow_sde_sample(
    policy: policies.Pi0,
    prefix: policies.Prefix,
    state: torch.Tensor,
    step: torch.Tensor,
    noise: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """πRL, §4.2.3: sample action chunks by the ODE, but for one solver step of each, which is taken by the SDE.

    step: (B,) the number of the noisy step, which is drawn at random; noise: (B, K + 1, H, A) standard normal, which the path
    begins at and its noisy step adds. Returns the path x (B, K + 1, H, A), whose last entry is the action chunk, and the noisy
    step's log-probability (B,) over the entries of mask (H, A).
    """
    x = noise[:, 0]
    xs, log_probs = [x], torch.zeros(len(x), device=x.device)
    for i in range(num_steps):
        now = torch.full_like(step, i)
        v = policy.velocity(prefix, state, x, 1 - now / num_steps).float()
        mean, std = flow_sde_step(x, v, now, num_steps=num_steps, noise_level=noise_level)
        noisy = step == i  # (B,)
        x = torch.where(noisy.view(-1, 1, 1), mean + std * noise[:, i + 1], x - v / num_steps)
        log_probs += noisy * log_prob(x, mean, std, mask)
        xs.append(x)
    return torch.stack(xs, 1), log_probs


def group_advantages(success: np.ndarray, group: np.ndarray, eps: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Advantages (E,) of episodes, (success − mean) / (deviation + eps) in their group, and which carry signal (E,) bool.

    As arXiv 2402.03300, §4.1.2. success, group: (E,) outcome and initial state of each episode; eps: as πRL's authors'. The
    advantages of a group sum to zero. Where all of a group succeed, or none does, the outcome tells nothing about the actions, and
    the group is to be dropped.
    """
    _, which = np.unique(group, return_inverse=True)  # (E,)
    p = (np.bincount(which, weights=success) / np.bincount(which))[which]  # share of success in the group
    return (success - p) / (np.sqrt(p * (1 - p)) + eps), (p > 0) & (p < 1)


def grpo_loss(
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
            approx_kl=(ratio - 1 - (new - old)).mean(),
            clip_fraction=(deviation > clip).float().mean(),
            ratio_deviation=deviation.mean(),
        )
    return loss, metrics


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    check(args)
    run = harness.Run("grpo", args)
    args, device, K = run.args, run.device, run.args.num_steps

    # Policy θ, which acts itself
    policy = run.load_policy()
    run.divide(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    fused = device.type == "cuda"  # no temporary copies
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # as StepNFT's
    if args.compile:
        policy.velocity = torch.compile(policy.velocity)
    solver = dict(num_steps=K, noise_level=args.noise_level)
    run.make_envs(policy)
    E, G = args.num_envs * args.rollout_epochs, args.group_size
    run.begin(dict(policy=policy), optimizer)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: one noisy solver step per chunk
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E // G).repeat(G))  # G episodes from each initial state
        with run.acting(policy) as acting:
            for turn in rollout:  # the next chunk of the episodes that are still running
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                step = turn.integers(K)
                x, log_probs = flow_sde_sample(acting, prefix, state, step, turn.noise(K + 1), **solver, mask=run.mask)
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, x, step, log_probs, turn.episode))
                turn.act(policy.processor.unnormalize_actions(x[:, -1, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- advantages
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        success, lost, group = rollout.success, rollout.lost, np.arange(len(rollout.seeds)) // G  # (E,), this rank's
        group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode, nor learns from it
        episode = chunks.episode.numpy()
        advantages, keep = (each[episode] for each in group_advantages(success, group))  # (M,) of the chunks, by episode
        advantages = torch.from_numpy(advantages).float().to(device)

        # ---------------------------------------------------------------------- update θ
        policy.train()
        losses = harness.Averages()
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        for _ in range(args.update_epochs):
            for minibatch in run.minibatches(keep):  # none where no group has contrast
                optimizer.zero_grad()
                for row, share in minibatch:  # the loss is a mean over chunks, so are the gradients
                    step = chunks.step[row]  # (b,)
                    x_t, x_next = chunks.x[row, step], chunks.x[row, step + 1]  # (b, H, A)
                    prefix = prefixes.recall(policy, row)
                    v = policy.velocity(prefix, chunks.state[row], x_t, 1 - step / K).float()
                    log_probs = log_prob(x_next, *flow_sde_step(x_t, v, step, **solver), run.mask)
                    loss, metrics = grpo_loss(log_probs, chunks.log_prob[row], advantages[row], clip=args.clip)
                    (share * loss).backward()
                    losses.add({**metrics, "loss": loss.detach()}, share)
                if run.clip_gradients(losses, grad_norm=parameters):
                    optimizer.step()

        run.log(rollout, losses, signal=keep, advantage_mean=advantages[torch.from_numpy(keep)])
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=1)  # velocities of a chunk in one pass of the update


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
