"""Where DiffusionNFT's first gradient points, and what of it is no signal: python benchmarks/nft_gradients.py

At θ = θ_old NFT's gradient is flow matching's on the executed chunks, each with the weight 2r − 1. Were v_old the flow-matching
velocity of the chunks that a sampler executes, flow matching's own gradient would be zero there. For several samplers: what it is,
on chunks that failed and that succeeded, and how far NFT's gradient follows it. Norms and cosines are those behind the noise of the
sample: made of products between gradients of different initial states alone; "sample" is with that noise. Errors are a jackknife's
over eight parts of these states. Writes benchmarks/results/nft_gradients.json, in which it leaves other samplers' rows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from pi_stepnft import envs, harness, policies
from pi_stepnft.algos import nft, stepnft_pi0
from pi_stepnft.harness.rollout import Rollout
from pi_stepnft.policies.pi0 import sample_time

SAMPLERS = {"euler 4": (4, 0.0), "euler 10": (10, 0.0), "euler 20": (20, 0.0), "midpoint 4": (4, None), "noise 0.7": (4, 0.7)}
"""name → steps, noise level of each; None: midpoint, two velocities per step"""
FOLDS, SIZE, DRAWS = 8, 16, 8  # parts of the initial states, episodes from each state, noise/time draws per chunk
REFERENCES = "flow", "nft", "flow first", "adaptive flow", "stepnft nft", "stepnft nft advantages"


@dataclass
class Args:
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    """which of them"""
    groups: int = 32
    """initial states of 16 episodes each, a multiple of 8"""
    out: Path = Path(__file__).parent / "results" / "nft_gradients.json"
    """where the JSON file goes"""


def sample(policy, prefix, state: torch.Tensor, noise: torch.Tensor, num_steps: int, noise_level: float | None) -> torch.Tensor:
    """The solver's path from noise[:, 0], (B, K + 1, H, A), whose last entry is the chunk."""
    if noise_level is not None:
        return stepnft_pi0.flow_sde_sample(policy, prefix, state, noise, num_steps=num_steps, noise_level=noise_level)[0]
    xs = [noise[:, 0]]
    for i in range(num_steps):
        t = torch.full((len(noise),), 1 - i / num_steps)
        half = xs[-1] - policy.velocity(prefix, state, xs[-1], t) / (2 * num_steps)
        xs.append(xs[-1] - policy.velocity(prefix, state, half, t - 0.5 / num_steps) / num_steps)
    return torch.stack(xs, 1)


def predict(policy, seen: torch.Tensor, outcome: torch.Tensor, half: np.ndarray) -> np.ndarray:
    """The chance of success before each chunk (M,), by a predictor that has learned from the other half (M,) of the episodes."""
    p = np.zeros(len(seen))
    for mine in (0, 1):
        predictor, others = stepnft_pi0.SuccessPredictor(policy, 128), torch.from_numpy(np.flatnonzero(half != mine))
        optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
        for row in (row for _ in range(32) for row in others[torch.randperm(len(others))].tensor_split(8)):  # StepNFT's passes
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(predictor(seen[row]), outcome[row]).backward()
            optimizer.step()
        p[half == mine] = predictor(seen).sigmoid().detach().numpy()[half == mine]
    return p


def measure(policy, venv, groups: int, num_steps: int, noise_level: float | None) -> dict:
    """One sampler's row."""
    execute, shape = policy.meta["execute"], (policy.config.horizon, policy.config.action_dim)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:execute, : venv.action_dim] = True
    torch.manual_seed(1)
    seeds = np.random.default_rng(1).integers(envs.TRAIN_SEEDS, size=groups).repeat(SIZE)
    rollout = Rollout(venv, seeds, execute=execute, max_steps=32, shape=shape, device=torch.device("cpu"), key=(1, 0),
                      overlap=False, observe_cut=False)
    sees, batches = stepnft_pi0.SuccessPredictor(policy, 128).sees, []
    with torch.no_grad():
        for turn in rollout:
            *inputs, state = policy.processor(turn.obs, turn.instructions)
            prefix, noise = policy.encode_prefix(*inputs), turn.noise(num_steps + 1)
            x = sample(policy, prefix, state, noise, num_steps, noise_level)
            seen = sees(policy, prefix, state, noise[:, 0], turn.number / rollout.rewards.shape[1])
            batches.append((state, x, seen, turn.episode, turn.number, *prefix.rows()))
            turn.act(policy.processor.unnormalize_actions(x[:, -1, :execute], turn.obs["state"]))
    state, x, seen, episode, turn, *rows = map(torch.cat, zip(*batches))
    prefixes, episode, turn = policies.Prefix.from_rows(*rows), episode.numpy(), turn.numpy()
    success, group = rollout.success, np.arange(len(seeds)) // SIZE
    fold, won = group[episode] % FOLDS, success[episode].astype(float)

    # Labels y = 2r − 1 = (success − peers') / scale, of which (p − peers') / scale says what the state before the chunk is worth
    r, keep = nft.chunk_optimality(success, group, episode, turn, "group")
    _, peers = np.unique(np.stack([group[episode], turn]), axis=1, return_inverse=True)
    share = (np.bincount(peers, weights=won) / np.bincount(peers))[peers]
    p = predict(policy, seen, torch.from_numpy(won).float(), fold % 2)
    y, first = 2 * r - 1, turn == 0
    worth = np.where(keep & ~first, (p - share) / np.maximum(share, 1 - share), 0)  # peers begin in the same state
    advantage = stepnft_pi0.advantages(p, success, episode, turn, 0.7)
    advantage = np.clip(advantage / (2 * np.sqrt((advantage**2).mean())), -1, 1)
    chunks = {  # name → weight of each (M,), which count (M,)
        "flow": (1, keep), "flow failed": (1, keep & (r < 0.5)), "flow succeeded": (1, keep & (r > 0.5)), "nft": (y, keep),
        "nft worth": (worth, keep), "nft centred": (y - worth, keep), "nft advantages": (advantage, keep | True),
        "flow first": (1, keep & first), "nft first": (y, keep & first),
    }
    weights = torch.tensor(np.stack([w * of / of.sum() for w, of in chunks.values()])).float()  # (J, M)

    parameters, step = policy.expert_parameters(), torch.arange(num_steps)

    def gradients(i: int) -> torch.Tensor:
        """Of chunk i by each loss (2 or 3, P): flow matching's, with adaptive weighting, and after noisy steps StepNFT's."""
        t, noise = sample_time((1, DRAWS)), torch.randn(1, DRAWS, *shape)
        x_t = (1 - t[..., None, None]) * x[i, -1] + t[..., None, None] * noise
        v, r = policy.velocity(prefixes[i], state[i, None], x_t, t)[0], torch.ones(DRAWS)
        losses = [nft.nft_loss(v, v.detach(), (noise - x[i, -1])[0], r, t=times, mask=mask)[0] for times in (None, t[0])]
        if noise_level:
            v = policy.velocity(prefixes[i], state[i, None], x[i, None, :-1], (1 - step / num_steps)[None])[0]
            losses += stepnft_pi0.stepnft_loss(v, v.detach(), x[i, :-1], x[i, 1:], step, r[:num_steps], num_steps=num_steps,
                                               noise_level=noise_level, granularity="chunk", mask=mask)[:1]
        each = (torch.autograd.grad(loss, parameters, None, True, allow_unused=True, materialize_grads=True) for loss in losses)
        return torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in each])

    sums = 0 * torch.stack([gradients(0)[:, None].expand(-1, len(chunks), -1)] * FOLDS)  # (folds, kinds, J, P)
    for f in range(FOLDS):
        for b in torch.from_numpy(np.flatnonzero(fold == f)).split(64):
            sums[f] += FOLDS * torch.einsum("jb,bkp->kjp", weights[:, b], torch.stack([gradients(i) for i in b.tolist()]))
    names = [kind + name for kind in ("", "adaptive ", "stepnft ")[: sums.shape[1]] for name in chunks]
    sums = sums.flatten(0, 2)
    dots = (sums @ sums.T).double().numpy().reshape(2 * (FOLDS, len(names)))  # (f, j, f', j')

    def behind(folds: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of these folds: norms (J,), and how far gradient j goes along j', (J, J)."""
        part = dots[folds][:, :, folds]
        products = (part.sum((0, 2)) - np.einsum("fjfk->jk", part)) / (len(folds) * (len(folds) - 1))
        norm = np.sqrt(np.clip(np.diag(products), 1e-12, None))
        return norm, products / norm

    norm, along = behind(np.arange(FOLDS))
    left_out = zip(*(behind(np.delete(np.arange(FOLDS), i)) for i in range(FOLDS)))
    error, along_error = (np.sqrt((FOLDS - 1) * np.var(each, 0)) for each in left_out)
    raw, sides = dots.mean((0, 2)), [[dots[i::2, :, k::2].mean((0, 2)).diagonal() for k in (0, 1)] for i in (0, 1)]
    halves, table = sides[0][1] / np.sqrt(sides[0][0] * sides[1][1]), {}
    for j, name in enumerate(names):
        table[name] = row = dict(norm=norm[j], error=error[j], sample=raw[j, j] ** 0.5, cosine_of_halves=halves[j], along={})
        for k in (names.index(other) for other in REFERENCES if other in names):
            row["along"][names[k]] = dict(length=along[j, k], error=along_error[j, k], cosine=along[j, k] / norm[j],
                                          sample_cosine=raw[j, k] / (raw[j, j] * raw[k, k]) ** 0.5)
    brier = dict(predictor=((p - won) ** 2).mean(), peers=((share - won) ** 2).mean(), mean=won.var())
    return dict(success=success.mean(), episodes=len(success), chunks=len(y), kept=int(keep.sum()), brier=brier, gradients=table)


def main(args: Args) -> None:
    if set(args.samplers) - set(SAMPLERS) or args.groups % FOLDS or args.groups < FOLDS:
        raise harness.RunError(f"--samplers: some of {', '.join(SAMPLERS)}; --groups: a multiple of {FOLDS}")
    policy = policies.load("pi0-tiny-pickcube-state").freeze_vlm()
    venv = envs.make("PickCube-v1", 8 * SIZE, obs_mode="state", chunk=policy.meta["execute"], observe_terminal=False)
    for name in args.samplers:
        row = dict(commit=harness.commit()) | measure(policy, venv, args.groups, *SAMPLERS[name])
        print(name, {key: round(gradient["norm"], 3) for key, gradient in row["gradients"].items()}, flush=True)
        rows = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(rows | {name: row}, indent=1) + "\n")
    venv.close()


if __name__ == "__main__":
    with harness.one_line_errors():
        main(tyro.cli(Args, description=__doc__))
