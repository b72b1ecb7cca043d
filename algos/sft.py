# Docs: docs/sft.md. Few-shot supervised fine-tuning by flow matching: python algos/sft.py --env-id PickCube-v1 (--policy pi05)
"""Flow matching on demonstrations (π0: Black et al., arXiv 2410.24164; π0.5, whose state is text in the prompt: arXiv 2504.16054):
the policy that reinforcement learning then starts from."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
from tqdm import tqdm

from pi_stepnft import envs, harness, policies
from pi_stepnft.envs import datasets, demos
from pi_stepnft.harness import Batch, Count, CountOrZero, Positive, PositiveOrZero, Size, Text
from pi_stepnft.harness.evaluation import by_ode, evaluate
from pi_stepnft.harness.films import record


@dataclass
class Args(harness.TrainArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """π0 or π0.5; default: what --base is, otherwise π0"""
    base: Text | None = None
    """checkpoint to start from, e.g. one that can see and read (algos/pretrain.py); default: random weights, tiny sizes"""
    output: Text | None = None
    """checkpoint folder to write; by default runs/<run name>/policy"""

    # demonstrations
    demos: Count = 64
    """number of demonstrations (few-shot), of the task's scripted expert"""
    demo_noise: PositiveOrZero = 0.5
    """noise on the demonstrator's executed translation, relative to it; the recorded action is the clean one"""
    dataset: Text | None = None
    """demonstrations to read instead of collecting some: this project's file, LIBERO's or ManiSkill's HDF5, or the folder of a
    LeRobot dataset; all of them, whatever --demos says"""
    cameras: tuple[str, ...] = ()
    """with --dataset: names of its cameras to use, in the environment's order; default: those that match the environment's by name
    or by place (beside the robot, on its wrist)"""
    rotate_images: bool | None = None
    """with --dataset: turn the pictures by 180°, or do not (--no-…); default: LIBERO's HDF5 files are turned, as the field does"""
    absolute_actions: bool = False
    """with --dataset: actions are targets, not differences, so the last one is repeated past an episode's end"""

    # flow matching
    train: Literal["expert", "all", "lora"] = "all"
    """expert: the VLM is frozen and its prefixes are computed once; all: everything is trained; lora: low-rank additions to both
    transformers are, see policies/lora.py"""
    steps: Count = 1500
    """optimizer steps"""
    batch_size: Batch = 64
    """observations per step"""
    draws: Size = 4
    """noise/time draws per observation: they share one prefix and cost little (docs/sft.md)"""
    learning_rate: Positive = 1e-3
    """peak of a schedule with 5 % warm-up and cosine decay to zero"""
    weight_decay: PositiveOrZero = 1e-4
    """AdamW's"""
    max_grad_norm: Positive = 1.0
    """gradient clipping"""

    # the policy, and its evaluation
    horizon: Size = 4
    """actions per predicted chunk"""
    execute: Size = 4
    """actions executed before the next observation"""
    num_steps: Size = 4
    """solver steps K at evaluation (the authors' value)"""
    image_size: Size = 96
    """side of the camera image, px, for a new policy"""
    eval_episodes: CountOrZero = 200
    """held-out evaluation episodes; with --dataset also 0: none, and no simulator is needed"""
    num_envs: Batch = 32
    """environments of the evaluation"""


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that do not go together."""
    if args.execute > args.horizon:
        raise harness.RunError(f"--execute {args.execute} is longer than the chunks of --horizon {args.horizon} actions")
    if args.train == "lora" and not args.base:
        raise harness.RunError("--train lora adapts a policy that can already do something: give --base")
    if not (args.eval_episodes or args.dataset):
        raise harness.RunError("--eval-episodes 0 needs --dataset: demonstrations are collected in the simulator")
    if not args.base and args.image_size % (patch := policies.Pi0Config.tiny().patch_size):
        raise harness.RunError(f"--image-size {args.image_size} must be a multiple of {patch}, the side of a tiny policy's patch")


def main(args: Args) -> None:
    check(args)
    device = harness.set_up(args)

    # Demonstrations, and the environments that make them and evaluate the policy
    policy, image_size = None, args.image_size
    if args.base:  # no weight depends on the horizon
        precision = dict(dtype=getattr(torch, args.dtype), trained=None if args.train == "lora" else args.train)
        policy = policies.load(args.base, device, expect=args.policy, horizon=args.horizon, **precision)
        image_size = policy.config.image_size
    data, venv = None, None
    if args.dataset:  # before the simulators start, which takes longer than to find a file wanting
        data = datasets.read(
            args.dataset, obs_mode=args.obs_mode, rotate=args.rotate_images, image_size=image_size, cameras=args.cameras or None,
            env_id=args.env_id,
        )
        if data.failed:
            print(f"{args.dataset}: {data.failed} episodes are left out, which it marks as failures")
    size = f"{image_size}px-" if args.obs_mode == "rgb" else ""
    path = f"demos/{harness.task_name(args)}-{args.obs_mode}-{size}{args.demos}-noise{args.demo_noise}.h5"
    if not (data or os.path.exists(path)):
        envs.simulator(args.env_id).expert(args.env_id)  # who has none is told before the simulators start
    if args.eval_episodes:  # the scripted experts' back end
        venv = harness.make_envs(args, num_envs=args.num_envs, image_size=image_size, chunk=args.execute, backend="cpu")
    if not data and os.path.exists(path):
        data = demos.read(path, env_id=args.env_id, obs_mode=args.obs_mode)
    elif not data:
        data = demos.collect(path, venv, args.demos, noise=args.demo_noise)
    if args.dataset and data.cameras:
        told = args.cameras or (venv and data.match(venv.cameras))
        print(f"cameras: {', '.join(data.cameras)}" + (f" as {', '.join(venv.cameras)}" if venv else "")
              + ("" if told else ", in the order of the data: --cameras takes others, or another order"))
    chunks = data.chunks(args.horizon, args.absolute_actions)  # (N, H, A)
    cameras, S, A = data.image.shape[1], data.state.shape[1], chunks.shape[-1]
    if venv:
        space, mode = venv.single_observation_space, venv.spec.control_mode
        given = dict(cameras=cameras, state=S, action=A, control_mode=data.attrs.get("control_mode", mode))
        wanted = dict(cameras=space["image"].shape[0], state=space["state"].shape[0], action=venv.action_dim, control_mode=mode)
        if given != wanted:
            raise harness.RunError(f"the demonstrations have {given}, {args.env_id} has {wanted}; --eval-episodes 0 trains anyway")

    # Policy
    if not policy:
        Policy, Config = policies.checkpoint.TYPES[args.policy or "pi0"]
        room = dict(num_cameras=cameras, state_dim=S, action_dim=max(A, Config.tiny().action_dim))
        policy = Policy(Config.tiny(image_size=image_size, horizon=args.horizon, **room)).to(device)
    config = policy.config
    for what, count, limit in (("cameras", cameras, config.num_cameras), ("state dimensions", S, config.state_dim),
                               ("action dimensions", A, config.action_dim)):
        if count > limit:
            raise harness.RunError(f"the demonstrations have {count} {what}, --base {args.base} has room for {limit}")
    tokenizer = policy.processor.tokenizer if policy.processor else policies.Tokenizer()
    statistics = policies.NormStats.from_data(data.state), policies.NormStats.from_data(chunks, min_std=0.1)
    policy.processor = policies.Processor(config, tokenizer, *statistics, device)
    harness.adapt(policy, args).train()
    actions = policy.processor.normalize_actions(chunks, data.state)  # (N, H, A)
    state = policy.processor.normalize_state(data.state)  # (N, S)

    def encode(rows: torch.Tensor) -> policies.Prefix:
        obs = {"image": data.image[rows.numpy()], "state": data.state[rows.numpy()]}
        *inputs, _ = policy.processor(obs, data.text(rows.numpy()))
        return policy.encode_prefix(*inputs)

    if args.train == "expert":  # the prefixes cannot change: encode each observation once
        with torch.no_grad():
            cache = policies.Prefix.cat([encode(rows) for rows in torch.arange(len(state)).split(256)])

    # Flow matching
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(1, i / args.steps))))
    )
    name = harness.run_name("sft", config.type, args)
    writer = harness.open_logs(Path("runs", name), args)
    start = time.time()
    with tqdm(range(args.steps), desc="SFT") as bar:
        for step in bar:
            rows = torch.randint(len(state), (args.batch_size,))
            optimizer.zero_grad()
            loss = 0.0
            for part in rows.split(args.micro_batch or len(rows)):
                prefix = cache[part] if args.train == "expert" else encode(part)
                targets = actions[part, None].expand(-1, args.draws, -1, -1)  # (b, draws, H, A)
                mean = policy.flow_loss(prefix, state[part], targets)[..., :A].mean()
                (len(part) / len(rows) * mean).backward()
                loss += len(part) / len(rows) * mean.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == args.steps - 1:
                if not torch.isfinite(loss):
                    raise harness.RunError(f"the loss became {loss.item()} at step {step}: lower --learning-rate")
                writer.add_scalar("losses/flow", loss.item(), step)
                writer.add_scalar("losses/grad_norm", grad_norm.item(), step)
                bar.set_postfix(loss=f"{loss.item():.4f}")

    policy.eval()
    made = dict(demos=len(data.start), steps=args.steps, seed=args.seed, train=args.train, base=args.base and Path(args.base).name)
    made |= harness.origin()
    policy.meta = dict(env_id=args.env_id, obs_mode=args.obs_mode, execute=args.execute, num_steps=args.num_steps, sft=made)
    output = args.output or f"runs/{name}/policy"
    policies.save(policy, output)
    print(f"{args.env_id} ({args.obs_mode}): SFT on {len(data.start)} demonstrations, {(time.time() - start) / 60:.1f} min")

    # Evaluation on held-out seeds
    if venv:
        act = by_ode(policy, args.num_steps)
        result = evaluate(venv, act, args.eval_episodes, execute=args.execute, progress="evaluation")
        writer.add_scalar("eval/success", result.rate, args.steps)
        made |= dict(success=result.rate, interval=result.interval, episodes=args.eval_episodes)
        policies.save(policy, output)
        if args.video:
            record(venv, result, f"videos/{name}.mp4", f"{args.env_id}, after {args.steps} steps")
        venv.close()
        print(f"success {result}")
    writer.close()
    print(f"checkpoint {output}")


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
