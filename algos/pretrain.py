# Docs: docs/sft.md. What a tiny policy has no web for, to see and to read: python algos/pretrain.py --env-id PickCube-v1
"""Pre-train a tiny policy to tell where the objects in a picture are and, π0.5, which numbers stand in its prompt; no actions.

PaliGemma has learnt to locate things and to read numbers on the web before π0 or π0.5 ever sees a robot; a tiny policy starts from
random weights and would spend its few demonstrations on that alone. The policy's own path is trained: the prefix's keys and values,
read by the expert at x_t = 0, t = 1, where the velocity target noise − a is −a for a deterministic a. Here a holds what is to be
told: of π0.5, whose state is text in the prompt, numbers drawn at random, and in rgb mode the positions of the movable objects.
The state is hidden from the expert, so only pictures and prompt can tell.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import torch.nn.functional as F

from pi_stepnft import envs, harness, policies
from pi_stepnft.envs import demos
from pi_stepnft.harness import Batch, Count, CountOrZero, Positive, PositiveOrZero, Size, Text


@dataclass
class Args(harness.RunArgs):
    policy: Literal["pi0", "pi05"] = "pi0"
    """π0 (rgb only) or π0.5, which also learns to read its state (in state mode that alone)"""
    output: Text = "runs/pretrained"
    """checkpoint folder to write at the end, beside runs/<run name>/policy, which is there all the time"""

    # rgb: scenes
    episodes: Count = 2000
    """rgb: episodes of the task's scripted expert that are rendered (about 25 pictures each); the last 5 % are held out"""
    scenes: CountOrZero = 0
    """rgb: randomised scenes (tables, lights, cameras, colours, things around) over which episodes are spread; 0: the plain task"""
    noise: PositiveOrZero = 0.6
    """rgb: noise on the expert's executed translation, relative to it: variety of scenes"""
    dataset: Text | None = None
    """rgb: file with the rendered scenes; by default one in demos/ named after these options, rendered if it is not there"""
    image_size: Size = 96
    """side of the camera image, px"""
    patch_size: Size = 16
    """side of a vision patch, px"""

    # training
    steps: Count = 3000
    """optimizer steps"""
    batch_size: Batch = 96
    """pictures and prompts per step"""
    learning_rate: Positive = 1e-3
    """peak of a schedule with 5 % warm-up and cosine decay to zero"""
    save_every: Count = 500
    """optimizer steps between checkpoints"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.policy == "pi0" and args.obs_mode == "state":
        raise harness.RunError(f"π0 in state mode has nothing to see or to read: it starts with {harness.command('sft')}")
    if args.image_size % args.patch_size:
        raise harness.RunError(f"--image-size {args.image_size} must be a multiple of --patch-size {args.patch_size}")


def main(args: Args) -> None:
    check(args)
    run = harness.Training("pretraining", args)
    device = run.device
    rgb = args.obs_mode == "rgb"
    Policy, Config = policies.checkpoint.TYPES[args.policy]
    reads = getattr(Config, "discrete_state", False)  # whether its state is text in the prompt

    # Scenes: pictures and the positions in them. State mode has none, and needs the task for the length of its state alone.
    scenes = [f"{args.env_id}/random-{i}" for i in range(args.scenes)]
    name = f"{harness.task_name(args)}-{args.scenes or ''}scenes"
    path = args.dataset or f"demos/{name}-{args.image_size}px-{args.episodes}-noise{args.noise}.h5"
    if rgb and (args.dataset or os.path.exists(path)):
        data = demos.read(path, env_id=args.env_id, obs_mode="rgb")
    else:
        if rgb:
            envs.simulator(args.env_id).expert(args.env_id)  # who has none is told before the simulators start
            for scene in scenes[:1]:
                envs.simulator(scene).check(scene)
        tasks = len(envs.simulator(args.env_id).select(args.env_id, ["id"], args.obs_mode))  # of a suite
        num_envs = max(tasks, envs.num_cores() if rgb else 1)
        venv = harness.make_envs(args, num_envs=num_envs, image_size=args.image_size, backend="cpu")
        instruction, state_dim = venv.instruction, venv.single_observation_space["state"].shape[0]
        if rgb:  # seeds of their own: few-shot demonstrations come from other episodes
            data = demos.collect(path, venv, args.episodes, noise=args.noise, first_seed=envs.TRAIN_SEEDS + 100_000_000,
                                 scenes=scenes)
        venv.close()
    if rgb:
        state_dim = data.state.shape[1]
        if len(data.start) < 2 or not data.objects.size:
            raise harness.RunError(f"{path} holds {len(data.start)} episodes with {data.objects.shape[1]} movable objects: one to "
                                   "locate is needed, and two episodes, one of which is held out")
        positions = data.objects.reshape(len(data.objects), -1)  # (N, 3 · objects), m
        scale = policies.NormStats.from_data(positions)
        located = torch.from_numpy((positions - scale.mean) / scale.std).float()
        held_out = int(data.start[-max(1, len(data.start) // 20)])  # first row of the held-out episodes
        test = torch.arange(held_out, len(located))[:: max(1, (len(located) - held_out) // 512)]
    else:
        located, held_out, test = torch.zeros(1, 0), 1, torch.zeros(512, dtype=torch.long)  # one scene, with nothing in it

    # Policy: π0 tells everything at each position of its chunk, π0.5, which has more to tell, takes as many positions as that needs
    numbers = state_dim if reads else 0
    count = numbers + located.shape[1]
    A = Config.tiny().action_dim
    room = dict(horizon=math.ceil(count / A)) if reads else dict(action_dim=max(A, count))
    longest = policies.Tokenizer().longest(data.instructions if rgb else [instruction], numbers)
    config = Config.tiny(
        image_size=args.image_size, patch_size=args.patch_size, num_cameras=data.image.shape[1] if rgb else 0, state_dim=state_dim,
        max_token_len=max(longest, Config.tiny().max_token_len), **room,
    )
    copies = 1 if reads else config.horizon
    policy = policies.load(run.resumed / "policy", device) if run.resumed else Policy(config).to(device)
    statistics = policies.NormStats.identity(state_dim), policies.NormStats.identity(config.action_dim)
    policy.processor = policies.Processor(config, policies.Tokenizer(), *statistics, device)

    def tell(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is told of scenes `rows` (b,) and random numbers in their prompts (b, copies, count); the truth (b, 1, count)."""
        drawn = 2.2 * torch.rand(len(rows), numbers) - 1.1  # states leave the range of the demonstrations: bins -1 and 255
        obs = {"state": F.pad(drawn, (0, state_dim - numbers)).numpy()} | ({"image": data.image[rows.numpy()]} if rgb else {})
        *inputs, state = policy.processor(obs, data.text(rows.numpy()) if rgb else [instruction] * len(rows))
        x_t = torch.zeros(len(rows), config.horizon, config.action_dim, device=device)
        chunk = -policy.velocity(policy.encode_prefix(*inputs), torch.zeros_like(state), x_t, torch.ones(len(rows), device=device))
        return chunk.reshape(len(rows), copies, -1)[..., :count], torch.cat((drawn, located[rows]), dim=1)[:, None].to(device)

    def report() -> dict[str, float]:
        """Errors on held-out scenes: median of the numbers, whose range is [-1.1, 1.1], and of the positions, mm."""
        with torch.no_grad():
            error = torch.cat([told - truth for told, truth in map(tell, test.split(128))])[:, 0].cpu()  # (n, count)
        found = {}
        if reads:
            found["number_error"] = error[:, :numbers].abs().median().item()
        if rgb:
            distance = (error[:, numbers:] * torch.from_numpy(scale.std)).unflatten(1, (-1, 3)).norm(dim=-1)
            found["held_out_mm"] = 1000 * distance.median().item()
        return found

    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    warmup = max(1, args.steps // 20)
    policy.meta = dict(env_id=args.env_id, obs_mode=args.obs_mode)
    run.begin(dict(policy=policy), optimizer, total=args.steps, **(dict(episodes=len(data.start)) if rgb else {}))
    policy.train()
    for step in run.iterations():
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(1, step / args.steps))))
        told, truth = tell(torch.randint(held_out, (args.batch_size,)))
        loss = (told - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses = harness.Averages()
        losses.add({"mse": loss.detach()})
        if run.clip_gradients(losses, grad_norm=policy.parameters()):
            optimizer.step()
        if (step + 1) % 200 == 0 and step + 1 < args.steps:
            losses.add(report())
        run.log(losses)
        run.save_when_due()

    found = report()
    print(f"{args.steps} steps, {run.trained_s / 60:.1f} min: held-out errors (median) {found}")
    run.finish(**found)
    policies.save(policy, args.output)
    print(f"checkpoint {args.output}")


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
