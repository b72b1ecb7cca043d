# Docs: docs/rft.md. Filtered behaviour cloning: python algos/rft.py --env-id PickCube-v1 (π0.5: --policy pi05)
"""Rejection fine-tuning (filtered behaviour cloning) for π0 and π0.5: flow matching on the action chunks of the policy's own
successful episodes, and of no other."""

from __future__ import annotations

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

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness import Count, Positive, PositiveOrZero, Size
from pi_stepnft.policies.pi0 import sample_time


@dataclass
class Args(harness.RLArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """bundled policy to start from, by default pi0; with --checkpoint that says which it is"""

    # rollout
    noise_level: PositiveOrZero = 0.5
    """a of σ_t = a·sqrt(t / (1 − t)), exploration noise on every solver step; with 0, the ODE, what barely succeeds is cloned as if
    it had a margin (docs/rft.md)"""
    group_size: Count = 1
    """episodes from one initial state (--contrast needs more than 1)"""

    # what is learned from
    contrast: bool = False
    """learn only from initial states where an episode failed too: the others can already be solved"""
    replay: Count = 40
    """draw the chunks, as many as this iteration's successes have, from the successes of so many of the last iterations, whose
    prefixes stay in memory: early ones hold the policy near its start, and checkpoints hold them. 1: this iteration's alone"""

    # update
    update_epochs: Count = 1
    """passes over the chunks of an iteration's update, each at fresh noise and times"""
    learning_rate: Positive = 3e-5
    """Adam's"""
    draws: Size = 4
    """noise/time draws per chunk and pass: they share its prefix and cost little"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.contrast and args.group_size < 2:
        raise harness.RunError("--contrast compares episodes from one initial state: give --group-size of at least 2")


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of action chunks; every field has a row for each of them."""

    state: torch.Tensor  # (M, S) normalised
    x_0: torch.Tensor  # (M, H, A) the chunk itself
    episode: torch.Tensor  # (M,) which of the iteration's episodes it belongs to


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


def rft_loss(
    policy: policies.Pi0,
    prefix: policies.Prefix,
    state: torch.Tensor,
    actions: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    *,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Flow matching (arXiv 2410.24164) on executed chunks a: mean (v_θ(x_t) − (ε − a))² at x_t = (1 − t)·a + t·ε.

    actions a: (B, H, A); noise ε, time t: (B, n, H, A), (B, n), n draws per chunk, which share its prefix; mask: (H, A) bool,
    entries that are executed: the others have no part in the success.
    """
    return policy.flow_loss(prefix, state, actions[:, None], noise, t)[..., mask].mean()


def chunks_to_clone(success: np.ndarray, group: np.ndarray, episode: np.ndarray, contrast: bool) -> np.ndarray:
    """Which of M chunks belong to a successful episode (M,) bool.

    success, group: (E,) outcome and initial state of each episode; episode: (M,) which episode a chunk belongs to. contrast:
    only where another episode from the same initial state failed.
    """
    _, which = np.unique(group, return_inverse=True)  # (E,)
    p = (np.bincount(which, weights=success) / np.bincount(which))[which]  # share of success from the same initial state
    return (success & (p < 1) if contrast else success)[episode]


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    check(args)
    run = harness.Run("rft", args)
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
    replay = deque(maxlen=args.replay)  # of the last iterations' successes: what their prefixes hold, then their chunks
    run.make_envs(policy)
    E, G = args.num_envs * args.rollout_epochs, args.group_size
    run.begin(dict(policy=policy), optimizer, memory=replay)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: act with θ, remember chunks
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E // G).repeat(G))  # G episodes from each initial state
        with run.acting(policy) as acting:
            for turn in rollout:  # the next chunk of the episodes that are still running
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                x_0 = flow_sde_sample(acting, prefix, state, turn.noise(K + 1), **solver)
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, x_0, turn.episode))
                turn.act(policy.processor.unnormalize_actions(x_0[:, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- keep what succeeded
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        success, lost, group = rollout.success, rollout.lost, np.arange(len(rollout.seeds)) // G  # (E,), this rank's
        group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode
        keep = chunks_to_clone(success & ~lost, group, chunks.episode.numpy(), args.contrast)
        signal = keep  # (M,) chunks to learn from
        if args.replay > 1 and keep.any():  # as many of all that is remembered
            used = torch.from_numpy(np.flatnonzero(keep)).to(device)
            batch = prefixes[used]
            fields = batch.rows()
            replay.append([*fields, *(each.to(device)[used] for each in chunks)])
            prefixes = run.prefixes()
            for kept in replay:
                prefixes.append(batch.from_rows(*kept[: len(fields)]))
            remembered = zip(*(kept[len(fields) :] for kept in replay))
            chunks = Chunks(*(torch.cat([each.to(device) for each in kept]) for kept in remembered))
            keep = (torch.randperm(len(chunks.state)) < len(used)).numpy()
        M = len(keep)

        # ---------------------------------------------------------------------- update θ
        policy.train()
        losses = harness.Averages()
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        for _ in range(args.update_epochs):
            noises = torch.randn(M, args.draws, *run.mask.shape, device=device)  # (M, n, H, A)
            times = sample_time((M, args.draws), device)  # (M, n) as in the policy's own training
            for minibatch in run.minibatches(keep):  # none where no episode succeeded
                optimizer.zero_grad()
                for row, share in minibatch:  # the loss is a mean over chunks, so are the gradients
                    prefix = prefixes.recall(policy, row)
                    loss = rft_loss(policy, prefix, chunks.state[row], chunks.x_0[row], noises[row], times[row], mask=run.mask)
                    (share * loss).backward()
                    losses.add({"loss": loss.detach()}, share)
                if run.clip_gradients(losses, grad_norm=parameters):
                    optimizer.step()

        run.log(rollout, losses, signal=signal)
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=args.draws)  # velocities of a chunk in one pass of the update


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
