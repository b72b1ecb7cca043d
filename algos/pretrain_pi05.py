# Docs: docs/sft.md. Reading and perception for a tiny π0.5: python algos/pretrain_pi05.py --env-id PickCube-v1
"""Pre-train what a tiny π0.5 has no web for: to read the numbers in its prompt and, in rgb mode, to locate objects in pictures.

π0.5 gets its state as text. PaliGemma knows numbers and pictures before it ever sees a robot; a tiny policy would spend its few
demonstrations on both. The policy's own path is trained: the prefix's keys and values, read by the expert at x_t = 0, t = 1, where
the velocity target noise − a is −a for a deterministic a. Here a holds the prompt's numbers, drawn at random, and the positions of
the movable objects in the picture. No action is learnt, and no state of the task is seen.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from tqdm import tqdm

from pi_stepnft import envs, policies
from pi_stepnft.envs import demos


@dataclass
class Args:
    env_id: str = "PickCube-v1"
    """ManiSkill task: its instruction and the length of its state; rgb also needs its scripted expert, which makes the scenes"""
    obs_mode: str = "rgb"
    """rgb: numbers and pictures; state: numbers only, for a policy without cameras"""
    episodes: int = 1400
    """rgb: rendered episodes (about 25 pictures each); the last 5 % are held out"""
    noise: float = 0.6
    """rgb: noise on the expert's executed translation, relative to it: variety of scenes"""
    dataset: str | None = None
    """rgb: file with the rendered scenes; by default one in demos/ named after these options, rendered if it is not there"""
    output: str = "runs/pretrained-pi05"
    """checkpoint folder to write"""
    image_size: int = 96
    """side of the camera image, px"""
    patch_size: int = 16
    """side of a vision patch, px"""
    steps: int = 3000
    """optimizer steps"""
    batch_size: int = 96
    """prompts per step"""
    learning_rate: float = 1e-3
    """peak of a schedule with 5 % warm-up and cosine decay to zero"""
    seed: int = 1
    """seed of everything random"""
    num_threads: int = 0
    """torch threads; 0: one per core"""
    device: str = "auto"
    """cpu, cuda, or auto"""


def main(args: Args) -> None:
    if min(args.episodes, args.steps, args.batch_size) < 1:
        raise envs.EnvError("--episodes, --steps and --batch-size must be positive")
    if args.obs_mode not in ("rgb", "state"):
        raise envs.EnvError(f"--obs-mode must be 'rgb' or 'state', got {args.obs_mode!r}")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or envs.num_cores())
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))

    # Scenes: pictures and the positions in them. State mode has none, and needs the task for the length of its state alone.
    path = f"demos/{args.env_id}-scenes-{args.image_size}px-{args.episodes}-noise{args.noise}.h5"
    rgb = args.obs_mode == "rgb"
    if rgb and (args.dataset or os.path.exists(path)):
        data = demos.read(args.dataset or path, env_id=args.env_id, obs_mode="rgb")
    else:
        venv = envs.make(
            args.env_id, envs.num_cores() if rgb else 1, obs_mode=args.obs_mode, image_size=args.image_size, backend="cpu"
        )
        instruction, state_dim = venv.instruction, venv.single_observation_space["state"].shape[0]
        if rgb:  # seeds of their own: few-shot demonstrations come from other episodes
            data = demos.collect(path, venv, args.episodes, noise=args.noise, first_seed=envs.TRAIN_SEEDS + 100_000_000)
        venv.close()
    if rgb:
        instruction, state_dim = data.attrs["instruction"], data.state.shape[1]
        targets = data.objects.reshape(len(data.objects), -1)  # (N, 3 · objects), m
        position = policies.NormStats.from_data(targets)
        located = torch.from_numpy((targets - position.mean) / position.std).float()
        held_out = int(data.start[-max(1, len(data.start) // 20)])  # first row of the held-out episodes

    # Policy: as many action slots as there are numbers and coordinates to tell
    count = state_dim + (targets.shape[1] if rgb else 0)
    config = policies.Pi05Config.tiny(
        image_size=args.image_size, patch_size=args.patch_size, num_cameras=data.image.shape[1] if rgb else 0, state_dim=state_dim
    )  # fmt: skip
    config = replace(config, horizon=math.ceil(count / config.action_dim))
    policy = policies.Pi05(config).to(device)
    policy.processor = policies.Processor(
        config,
        policies.Tokenizer(),
        policies.NormStats.identity(state_dim),
        policies.NormStats.identity(config.action_dim),
        device,
    )

    def tell(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the policy tells of scenes `rows` (b,) with random numbers in their prompts, and the truth: both (b, count)."""
        numbers = 2.2 * torch.rand(len(rows), state_dim) - 1.1  # states leave the range of the demonstrations: bins -1 and 255
        obs = {"state": numbers.numpy()} | ({"image": data.image[rows.numpy()]} if rgb else {})
        images, image_mask, tokens, token_mask, state = policy.processor(obs, [instruction] * len(rows))
        prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
        x_t = torch.zeros(len(rows), config.horizon, config.action_dim, device=device)
        told = -policy.velocity(prefix, state, x_t, torch.ones(len(rows), device=device)).flatten(1)[:, :count]
        return told, (torch.cat((numbers, located[rows]), dim=1) if rgb else numbers).to(device)

    def report() -> dict:
        """Errors on held-out scenes: median of the numbers, whose range is [-1.1, 1.1], and of the positions, mm."""
        rows = torch.arange(held_out, len(targets))[:: max(1, (len(targets) - held_out) // 512)] if rgb else torch.zeros(512)
        with torch.no_grad():
            parts = [told - truth for told, truth in map(tell, rows.split(128))]
        error = torch.cat(parts).cpu()
        found = dict(number_error=error[:, :state_dim].abs().median().item())
        if rgb:
            distance = (error[:, state_dim:] * torch.from_numpy(position.std)).unflatten(1, (-1, 3)).norm(dim=-1)
            found["held_out_mm"] = 1000 * distance.median().item()
        return found

    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(1, i / args.steps))))
    )
    start = time.time()
    with tqdm(range(args.steps), desc="pre-training") as bar:
        for step in bar:
            told, truth = tell(torch.randint(held_out if rgb else 1, (args.batch_size,)))
            loss = (told - truth).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % 200 == 0 or step == args.steps - 1:
                found = report()
                bar.set_postfix(loss=f"{loss.item():.4f}", **{name: f"{value:.3f}" for name, value in found.items()})
                policy.meta = dict(env_id=args.env_id, obs_mode=args.obs_mode, pretraining=dict(steps=step + 1, **found))
                policies.save(policy, args.output)
    print(f"{args.steps} steps, {(time.time() - start) / 60:.1f} min: held-out errors (median) {found}")
    print(f"checkpoint {args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (envs.EnvError, policies.CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
