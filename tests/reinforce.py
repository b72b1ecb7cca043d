"""REINFORCE on one noisy solver step (Williams, 1992): a whole algorithm of the house, and a test of how little a new one takes.

One solver step of a chunk is taken by the SDE; its Gaussian gives a likelihood, whose gradient is weighed by success relative to
the episodes from the same initial state.
"""

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
    """π0 or π0.5, where no --checkpoint says which"""
    noise_level: Positive = 1.0
    """a of σ_t = a·sqrt(t / (1 − t)), the exploration noise of the one noisy solver step"""
    group_size: Count = 16
    """episodes from one initial state, which are compared with each other"""
    learning_rate: Positive = 1e-4
    """Adam's"""


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of action chunks; every field has a row for each of them."""

    state: torch.Tensor  # (M, S) normalised
    x_t: torch.Tensor  # (M, H, A) before the noisy step
    x_next: torch.Tensor  # (M, H, A) after it
    step: torch.Tensor  # (M,) which of the K steps it was
    episode: torch.Tensor  # (M,)


def flow_sde_step(
    x_t: torch.Tensor, v: torch.Tensor, step: torch.Tensor, *, num_steps: int, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H, A) and deviation (B, 1, 1) of a Flow-SDE step (arXiv 2603.02083, Eq. 3). x_t, v: (B, H, A); step: (B,) int."""
    delta = 1.0 / num_steps
    t = (1 - step * delta).view(-1, 1, 1)
    sigma = noise_level * (t / torch.where(step.view(-1, 1, 1) == 0, delta, 1 - t)).sqrt()
    x0_hat, x1_hat = x_t - t * v, x_t + (1 - t) * v
    mean = x0_hat * (1 - (t - delta)) + x1_hat * ((t - delta) - sigma**2 * delta / (2 * t))
    return mean, sigma * delta**0.5


def sample(
    policy: policies.Pi0, prefix: policies.Prefix, state: torch.Tensor, turn: harness.Turn, **solver: float
) -> tuple[torch.Tensor, ...]:
    """Action chunks (B, H, A) by the ODE but for one random step of each, and that step: x_t, x_next, its number (B,)."""
    K = solver["num_steps"]
    (x, noise), noisy = turn.noise(2).unbind(1), turn.integers(K)
    x_t, x_next = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(K):
        step = torch.full_like(noisy, i)
        v = policy.velocity(prefix, state, x, 1 - step / K).float()
        mean, std = flow_sde_step(x, v, step, **solver)
        now = (noisy == i).view(-1, 1, 1)
        after = torch.where(now, mean + std * noise, x - v / K)
        x_t, x_next, x = torch.where(now, x, x_t), torch.where(now, after, x_next), after
    return x, x_t, x_next, noisy


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Gaussian log density of the executed entries, summed over the chunk: (B, H, A), mask (H, A) bool -> (B,)."""
    density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return (density * mask).sum((1, 2))


def advantages(success: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Success of episodes less its mean over those from the same initial state, (E,)."""
    _, which = np.unique(group, return_inverse=True)
    return success - (np.bincount(which, weights=success) / np.bincount(which))[which]


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    run = harness.Run("reinforce", args)
    args, device, K = run.args, run.device, run.args.num_steps
    policy = run.load_policy()
    run.divide(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5)
    solver = dict(num_steps=K, noise_level=args.noise_level)
    run.make_envs(policy)
    E, G = args.num_envs * args.rollout_epochs, args.group_size
    run.begin(dict(policy=policy), optimizer)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: one noisy solver step per chunk
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E // G).repeat(G))  # G episodes from each initial state
        with run.acting(policy) as acting:
            for turn in rollout:
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                x, *transition = sample(acting, prefix, state, turn, **solver)
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, *transition, turn.episode))
                turn.act(policy.processor.unnormalize_actions(x[:, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- advantages
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        success, lost, group = rollout.success, rollout.lost, np.arange(len(rollout.seeds)) // G  # (E,), this rank's
        group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode, nor learns from it
        advantage = torch.from_numpy(advantages(success, group)).float()[chunks.episode].to(device)  # (M,)
        keep = advantage.cpu().numpy() != 0

        # ---------------------------------------------------------------------- update
        policy.train()
        losses = harness.Averages()
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        for minibatch in run.minibatches(keep):
            optimizer.zero_grad()
            for mb, share in minibatch:
                step = chunks.step[mb]
                v = policy.velocity(prefixes.recall(policy, mb), chunks.state[mb], chunks.x_t[mb], 1 - step / K).float()
                likelihood = log_prob(chunks.x_next[mb], *flow_sde_step(chunks.x_t[mb], v, step, **solver), run.mask)
                loss = -(advantage[mb] * likelihood).mean()
                (share * loss).backward()
                losses.add(dict(policy=loss.detach()), share)
            if run.clip_gradients(losses, grad_norm=parameters):
                optimizer.step()

        run.log(rollout, losses, signal=keep)
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=1)


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
