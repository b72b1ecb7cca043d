# Docs: docs/sft.md. Perception for a tiny π0: where are the objects? python algos/pretrain_pi0.py --env-id PickCube-v1
"""Pre-train a tiny π0's vision on rendered scenes: the picture in, the positions of the movable objects out; no actions.

PaliGemma has learnt to locate things on the web before π0 ever sees a robot; a tiny policy starts from random weights and would
spend its few demonstrations on that alone. The policy's own path is trained: the prefix's keys and values, read by the expert at
x_t = 0, t = 1, where the velocity target noise − a is −a for a deterministic a. The state is hidden, so only the picture can tell.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
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
    """ManiSkill task with a scripted expert, which moves the arm and the objects through the scenes"""
    episodes: int = 1400
    """rendered episodes (about 25 pictures each); the last 5 % are held out"""
    noise: float = 0.6
    """noise on the expert's executed translation, relative to it: variety of scenes"""
    dataset: str | None = None
    """file with the rendered scenes; by default one in demos/ named after these options, rendered if it is not there"""
    output: str = "runs/pretrained"
    """checkpoint folder to write"""
    image_size: int = 96
    """side of the camera image, px"""
    patch_size: int = 16
    """side of a vision patch, px"""
    horizon: int = 8
    """actions per chunk of the policy that will be built on this"""
    epochs: float = 3.5
    """passes over the scenes"""
    batch_size: int = 96
    """pictures per step"""
    learning_rate: float = 1e-3
    """peak of a schedule with 5 % warm-up and cosine decay to zero"""
    seed: int = 1
    """seed of everything random"""
    num_threads: int = 0
    """torch threads; 0: one per core"""
    device: str = "auto"
    """cpu, cuda, or auto"""


def main(args: Args) -> None:
    if min(args.episodes, args.epochs, args.batch_size) <= 0:
        raise envs.EnvError("--episodes, --epochs and --batch-size must be positive")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or envs.num_cores())
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    path = f"demos/{args.env_id}-scenes-{args.image_size}px-{args.episodes}-noise{args.noise}.h5"
    if args.dataset or os.path.exists(path):
        data = demos.read(args.dataset or path, env_id=args.env_id, obs_mode="rgb")
    else:
        venv = envs.make(args.env_id, envs.num_cores(), obs_mode="rgb", image_size=args.image_size, backend="cpu")
        # Seeds of their own: few-shot demonstrations come from other episodes.
        data = demos.collect(path, venv, args.episodes, noise=args.noise, first_seed=envs.TRAIN_SEEDS + 100_000_000)
        venv.close()
    targets = data.objects.reshape(len(data.objects), -1)  # (N, 3 · objects), m
    config = policies.Pi0Config.tiny(
        image_size=args.image_size, patch_size=args.patch_size, num_cameras=data.image.shape[1],
        state_dim=data.state.shape[1], action_dim=max(8, targets.shape[1]), horizon=args.horizon,
    )  # fmt: skip
    policy = policies.Pi0(config).to(device)
    position = policies.NormStats.from_data(targets)
    policy.processor = policies.Processor(config, policies.Tokenizer(), policies.NormStats.from_data(data.state), position, device)
    a = policy.processor.normalize_actions(targets)  # (N, A)
    held_out = int(data.start[-max(1, len(data.start) // 20)])  # first row of the held-out episodes

    def locate(rows: torch.Tensor) -> torch.Tensor:
        """Predicted normalised positions (b, H, A) for rows of the data set."""
        images, image_mask, tokens, token_mask, state = policy.processor(
            {"image": data.image[rows.numpy()], "state": data.state[rows.numpy()]}, [data.attrs["instruction"]] * len(rows)
        )
        prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
        x_t = torch.zeros(len(rows), config.horizon, config.action_dim, device=device)
        return -policy.velocity(prefix, torch.zeros_like(state), x_t, torch.ones(len(rows), device=device))

    def error_mm(rows: torch.Tensor) -> float:
        """Median distance between predicted and true positions of the objects, mm."""
        with torch.no_grad():
            predicted = torch.cat([locate(r)[:, 0] for r in rows.split(256)])
        difference = policy.processor.unnormalize_actions(predicted).cpu().numpy() - targets[rows.numpy()]
        return 1000 * float(np.median(np.linalg.norm(difference.reshape(-1, 3), axis=1)))

    steps = int(args.epochs * held_out / args.batch_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(1, i / steps))))
    )
    test = torch.arange(held_out, len(targets))[:: max(1, (len(targets) - held_out) // 512)]
    start = time.time()
    with tqdm(range(steps), desc="pre-training") as bar:
        for step in bar:
            rows = torch.randint(held_out, (args.batch_size,))
            error = locate(rows) - a[rows][:, None]  # (b, H, A)
            loss = error[..., : targets.shape[1]].square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % 200 == 0 or step == steps - 1:
                mm = error_mm(test)
                bar.set_postfix(loss=f"{loss.item():.4f}", held_out_mm=f"{mm:.1f}")
                pretraining = dict(episodes=len(data.start), steps=step + 1, held_out_mm=mm)
                policy.meta = dict(env_id=args.env_id, pretraining=pretraining)
                policies.save(policy, args.output)
    print(f"{len(data.start)} episodes, {(time.time() - start) / 60:.1f} min: held-out position error {mm:.1f} mm (median)")
    print(f"checkpoint {args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (envs.EnvError, policies.CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
