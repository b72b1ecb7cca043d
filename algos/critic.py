# Docs: docs/critic.md. Off-policy RL with a critic of chunks: python algos/critic.py --env-id PickCube-v1 (π0.5: --policy pi05)
"""Replay with a chunk critic for π0 and π0.5, in the spirit of OGPO (arXiv 2605.03065), DICE-RL (2603.10263) and IDQL (2304.10573):
twin critics learn the chance of success of a chunk from the episodes of many iterations and choose among several in rollouts; the
policy is pulled a short, measured way up their gradient, from what it has executed."""

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


@dataclass
class Args(harness.RLArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """bundled policy to start from, by default pi0; with --checkpoint that says which it is"""

    # rollout
    noise_level: PositiveOrZero = 0.7
    """a of σ_t = a·sqrt(t / (1 − t)), exploration noise on every solver step; 0: the ODE"""
    candidates: Size = 4
    """chunks sampled per observation, of which one is executed"""
    temperature: Positive = 0.05
    """τ of the draw among them by softmax(chance / τ): one whose predicted chance of success is τ higher comes e times as often"""

    # critic
    replay: Count = 20
    """iterations whose chunks the critic learns from; they are saved with a checkpoint"""
    n_step: Count = 3
    """a chunk's target is the chance of success so many chunks later, or the outcome where the episode ends before; with as many as
    an episode has, outcomes alone"""
    critic_width: Size = 256
    """of the two hidden layers of each critic"""
    critic_epochs: Count = 8
    """passes per iteration, each over as many chunks of the replay as the iteration had; outcomes are few, and many passes learn
    them by heart (docs/notebook/critic.md)"""
    critic_learning_rate: Positive = 3e-4
    """Adam's for the critics"""
    polyak: Share = 0.02
    """share of the new critics that the slow ones, which judge, take over after each of their updates"""

    # actor
    critic_warmup: CountOrZero = 3
    """first iterations in which only the critics are updated"""
    distance: Positive = 0.03
    """how far uphill the executed chunks are pulled, root mean square over their entries, normalised: what a critic says holds near
    what was executed, and one shift of all chunks of an episode adds up"""
    update_epochs: Count = 1
    """passes over the iteration's chunks"""
    learning_rate: Positive = 1e-4
    """Adam's for the policy"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.critic_warmup > (args.iterations or args.critic_warmup):
        raise harness.RunError(f"--critic-warmup {args.critic_warmup} is longer than --iterations {args.iterations}: nothing would "
                               "update the policy")


# ------------------------------------------------------------------------------------------------------------ the method


class Chunks(NamedTuple):
    """What is remembered of an iteration's observations; every field has a row for each of them. D: executed entries of a chunk."""

    state: torch.Tensor  # (M, S) normalised
    seen: torch.Tensor  # (M, W) what a critic sees of it
    acts: torch.Tensor  # (M, N, D) the candidates
    chance: torch.Tensor  # (M, N) of success, as it was predicted of each
    chosen: torch.Tensor  # (M,) which was executed
    x: torch.Tensor  # (M, K, H, A) the solver's path to that one, without its end
    v: torch.Tensor  # (M, K, H, A) the velocities there
    episode: torch.Tensor  # (M,) which of the iteration's episodes it belongs to
    turn: torch.Tensor  # (M,) how many chunks that episode had before it


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample n action chunks per observation, which share its prefix, with noise on every solver step.

    noise: (B, n, K + 1, H, A) standard normal, which each path begins at and its steps add. Returns the paths x
    (B, n, K + 1, H, A), whose last entries are the chunks, and their velocities v (B, n, K, H, A)."""
    x, xs, vs = noise[:, :, 0], [noise[:, :, 0]], []
    for i in range(num_steps):
        step = torch.full(x.shape[:2], i, device=x.device)  # (B, n)
        v = policy.velocity(prefix, state, x, 1 - step / num_steps).float()
        flat = (each.flatten(0, 1) for each in (x, v, step))
        mean, std = flow_sde_step(*flat, num_steps=num_steps, noise_level=noise_level)
        x = mean.view_as(x) + std.view(*step.shape, 1, 1) * noise[:, :, i + 1]
        xs.append(x)
        vs.append(v)
    return torch.stack(xs, 2), torch.stack(vs, 2)


class Critics(nn.Module):
    """Two predictions of the chance that an episode will succeed after a chunk; both are one half at first."""

    def __init__(self, policy: policies.Pi0, executed: int, width: int):
        """executed: entries of a chunk that are executed, D."""
        super().__init__()
        inputs = policy.critic_width + policy.config.state_dim + 1 + executed
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width),
                          nn.GELU(), nn.Linear(width, 1))
            for _ in range(2)
        )
        for net in self.nets:
            nn.init.zeros_(net[-1].weight)
            nn.init.zeros_(net[-1].bias)

    @staticmethod
    def see(policy: policies.Pi0, prefix: policies.Prefix, state: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """What they see of observations, (B, W): the policy's features where its paths begin, the state and the time.

        state: (B, S) normalised; time: (B,) share of the episode that is over."""
        middle = torch.zeros(len(state), policy.config.horizon, policy.config.action_dim, device=state.device)
        features = policy.features(prefix, state, middle, torch.ones(len(state), device=state.device))
        return torch.cat((policy.critic_features(prefix, features), state, time.to(state)[:, None]), 1)

    def forward(self, seen: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        """seen (B, W), acts (B, [n,] D) -> logits (2, B, [n])"""
        if acts.ndim == 3:
            seen = seen[:, None].expand(-1, acts.shape[1], -1)
        inputs = torch.cat((seen, acts), -1)
        return torch.stack([net(inputs).squeeze(-1) for net in self.nets])

    def chance(self, seen: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        """The lower of the two, (B, [n]): what only one of them believes does not count."""
        return self(seen, acts).amin(0).sigmoid()


def choose(chance: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Which of N candidates to execute, (B,) int64: a draw by softmax(chance / τ).

    chance: (B, N); uniform: (B,) random numbers in [0, 1), each of which decides one draw."""
    reached = (chance / temperature).softmax(1).cumsum(1)  # (B, N)
    return (uniform[:, None] >= reached).sum(1).clamp(max=chance.shape[1] - 1)


def later_rows(episode: np.ndarray, turn: np.ndarray, n: int) -> np.ndarray:
    """The row of the chunk that an episode had n chunks later, (M,) int; −1 where it ended before.

    episode, turn: (M,) which episode a row belongs to, and how many chunks came before it there."""
    table = np.full((episode.max() + 1, turn.max() + 1 + n), -1)
    table[episode, turn] = np.arange(len(episode))
    return table[episode, turn + n]


def critic_targets(chance: torch.Tensor, ended: torch.Tensor, outcome: torch.Tensor, temperature: float) -> torch.Tensor:
    """n-step targets in [0, 1], without discount, (B,): the outcome of episodes that ended before; of the others the chance n
    chunks later, of one that is drawn there as `choose` draws.

    chance: (B, N) of the candidates there; ended: (B,) bool; outcome: (B,) 1 after success."""
    value = (chance * (chance / temperature).softmax(1)).sum(1)
    return torch.where(ended, outcome, value)


def uphill(critics: Critics, seen: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean predicted chance at chunks acts (B, D): (B, D)."""
    with torch.enable_grad():
        acts = acts.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critics(seen, acts).sigmoid().mean(0).sum(), acts)
    return gradient


def pull_loss(
    v_theta: torch.Tensor, v_old: torch.Tensor, t: torch.Tensor, shift: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Move the chunk that each point x_t of a path is headed for, x_t − t·v, by `shift`: mean (t·(v_θ − v_old) + shift)².

    v_theta, v_old: (B, n, H, A) at n points; t: (B, n); shift: (B, D), the entries of a chunk under mask (H, A) bool. Returns the
    loss and metrics: pulled, the share of the shift that has been made, 0 at v_θ = v_old and 1 where all of it has."""
    moved = -(t[..., None, None] * (v_theta - v_old))[..., mask]  # (B, n, D)
    shift = shift[:, None].expand_as(moved)
    pulled = (moved.detach() * shift).sum() / shift.square().sum().clamp(min=1e-12)
    return (moved - shift).square().mean(), dict(pulled=pulled)


@torch.no_grad()
def follow(slow: nn.Module, new: nn.Module, share: float) -> None:
    """θ̄ ← (1 − share)·θ̄ + share·θ."""
    for one, other in zip(slow.parameters(), new.parameters(), strict=True):
        one.lerp_(other, share)


# ------------------------------------------------------------------------------------------------------------- the program


def main(args: Args) -> None:
    check(args)
    run = harness.Run("critic", args)
    args, device, K, N = run.args, run.device, run.args.num_steps, run.args.candidates

    # Policy θ, critics, and critics that follow slowly: these judge
    policy = run.load_policy()
    run.divide(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    critics = Critics(policy, int(run.mask.sum()), args.critic_width).to(device)
    judges = copy.deepcopy(critics).requires_grad_(False)
    learning = list(critics.parameters())
    groups = [dict(params=parameters), dict(params=learning, lr=args.critic_learning_rate)]
    fused = device.type == "cuda"  # no temporary copies
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # as StepNFT's
    if args.compile:
        policy.velocity = torch.compile(policy.velocity)
    solver = dict(num_steps=K, noise_level=args.noise_level)
    replay = deque(maxlen=args.replay)  # of the last iterations, what the critics learn from
    run.make_envs(policy)
    E = args.num_envs * args.rollout_epochs
    unsaved = dict(critics=learning, judges=list(judges.parameters()))
    run.begin(dict(policy=policy), optimizer, unsaved=unsaved, memory=replay)

    for iteration in run.iterations():
        # ---------------------------------------------------------------------- rollout: of N chunks execute what promises most
        batches, prefixes = [], run.prefixes()
        rollout = run.rollout(run.rng.integers(envs.TRAIN_SEEDS, size=E))
        with run.acting(policy) as acting:
            for turn in rollout:  # the next chunk of the episodes that are still running
                *inputs, state = policy.processor(turn.obs, turn.instructions)
                prefix = acting.encode_prefix(*inputs)
                x, v = flow_sde_sample(acting, prefix, state, turn.noise(N * (K + 1)).unflatten(1, (N, K + 1)), **solver)
                seen, acts = critics.see(acting, prefix, state, turn.number / rollout.rewards.shape[1]), x[:, :, -1, run.mask]
                chance = judges.chance(seen, acts)
                chosen = choose(chance, turn.integers(2**24) / 2**24, args.temperature)
                x, v = (path[torch.arange(len(path), device=device), chosen] for path in (x, v))
                prefixes.remember(inputs, prefix)
                batches.append(Chunks(state, seen, acts, chance, chosen, x[:, :-1], v, turn.episode, turn.number))
                turn.act(policy.processor.unnormalize_actions(x[:, -1, : run.execute], turn.obs["state"]))
        run.lap("rollout")

        # ---------------------------------------------------------------------- update the critics
        chunks = Chunks(*map(torch.cat, zip(*batches)))
        M, episode = len(chunks.state), chunks.episode.numpy()
        keep = ~rollout.lost[episode]  # (M,) chunks to learn from
        used, outcome = torch.from_numpy(keep).to(device), torch.from_numpy(rollout.success[episode]).float().to(device)
        later = torch.from_numpy(later_rows(episode, chunks.turn.numpy(), args.n_step)).to(device)
        every = torch.arange(M, device=device)
        ended = later < 0
        later = torch.where(ended, every, later)  # what stands there is not asked for
        chance, executed = chunks.chance[every, chunks.chosen], chunks.acts[every, chunks.chosen]  # (M,), (M, D)
        fields = chunks.seen, executed, chunks.seen[later], chunks.acts[later], ended, outcome
        replay.append([field[used] for field in fields])
        seen, acts, later_seen, later_acts, ended, outcomes = (
            torch.cat([each.to(device) for each in kept]) for kept in zip(*replay)
        )
        losses = harness.Averages()
        for _ in range(args.critic_epochs):
            drawn = torch.randperm(len(seen)) < int(keep.sum())
            for minibatch in run.minibatches(drawn.numpy()):
                optimizer.zero_grad()
                for row, share in minibatch:
                    with torch.no_grad():
                        later_chance = judges.chance(later_seen[row], later_acts[row])
                    y = critic_targets(later_chance, ended[row], outcomes[row], args.temperature)
                    loss = F.binary_cross_entropy_with_logits(critics(seen[row], acts[row]), y.expand(2, -1))
                    (share * loss).backward()
                    losses.add(dict(critic=loss.detach()), share)
                if run.clip_gradients(losses, critic_grad_norm=learning):
                    optimizer.step()
                    follow(judges, critics, args.polyak)

        # ---------------------------------------------------------------------- update θ: pull its chunks uphill
        policy.train()
        gradient = uphill(judges, chunks.seen, executed)  # (M, D)
        shift = args.distance * gradient / (run.mean(gradient[used] ** 2) ** 0.5 + 1e-12)
        t = (1 - torch.arange(K, device=device) / K).expand(M, K)  # (M, K) of the path's points
        ramp = (iteration + 1 - args.critic_warmup) / max(1, args.warmup_iterations)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, max(0.0, ramp))
        for _ in range(args.update_epochs if iteration >= args.critic_warmup else 0):
            for minibatch in run.minibatches(keep):
                optimizer.zero_grad()
                for row, share in minibatch:  # the loss is a mean over chunks, so are the gradients
                    v_theta = policy.velocity(prefixes.recall(policy, row), chunks.state[row], chunks.x[row], t[row]).float()
                    loss, metrics = pull_loss(v_theta, chunks.v[row], t[row], shift[row], run.mask)
                    (share * loss).backward()
                    losses.add({**metrics, "loss": loss.detach()}, share)
                if run.clip_gradients(losses, grad_norm=parameters):
                    optimizer.step()

        spread = chunks.chance[used].std(1) if N > 1 else chance * 0  # how much the candidates differ
        error = (chance - outcome)[used].square()  # of predictions that knew no outcome of this iteration
        run.log(rollout, losses, signal=keep, chance=chance[used], chance_spread=spread, prediction_error=error)
        run.evaluate_and_save_when_due()
    run.finish(forward_passes=K)  # velocities of a chunk in one pass of the update


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
