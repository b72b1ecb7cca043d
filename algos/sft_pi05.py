# Docs: docs/sft.md. Few-shot supervised fine-tuning of π0.5 by flow matching: python algos/sft_pi05.py --env-id PickCube-v1
"""Flow matching on demonstrations for π0.5 (arXiv 2504.16054), whose state is text in the prompt: the policy that reinforcement
learning then starts from."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pi_stepnft import envs, policies
from pi_stepnft.envs import datasets, demos
from pi_stepnft.harness.evaluation import evaluate, record


@dataclass
class Args:
    env_id: str = "PickCube-v1"
    """ManiSkill task with a scripted expert (or any task, with --dataset)"""
    obs_mode: str = "rgb"
    """rgb: camera image, proprioception and goal; state: no camera, privileged object poses in the state"""
    demos: int = 64
    """number of demonstrations (few-shot)"""
    demo_noise: float = 0.5
    """noise on the demonstrator's executed translation, relative to it; the recorded action is the clean one"""
    dataset: str | None = None
    """demonstrations to read instead of collecting some: this project's file, LIBERO's or ManiSkill's HDF5, or the folder of a
    LeRobot dataset; all of them, whatever --demos says"""
    rotate_images: bool | None = None
    """with --dataset: turn the pictures by 180°; default: those of LIBERO's HDF5 files, as the field does"""
    absolute_actions: bool = False
    """with --dataset: actions are targets, not differences, so the last one is repeated past an episode's end"""
    base: str | None = None
    """checkpoint to start from, e.g. one that can read and see (algos/pretrain_pi05.py); default: random weights"""
    train: str = "all"
    """expert: the VLM is frozen and its prefixes are computed once; all: everything is trained; lora: low-rank additions to both
    transformers are, see policies/lora.py"""
    lora_rank: int = 16
    """rank of --train lora (openpi: 16 in the language model, 32 in the expert)"""
    lora_alpha: float = 16.0
    """its scale: the additions are (alpha / rank)·B·A (openpi: as the rank)"""
    dtype: str = "float32"
    """float32, or bfloat16: precision of frozen weights and of the computation; trained weights are float32"""
    gradient_checkpointing: bool = False
    """keep layer inputs only and compute the rest again in the backward pass"""
    micro_batch: int = 0
    """observations per forward and backward pass, whose gradients add up to the batch's; 0: the whole batch at once"""
    output: str | None = None
    """checkpoint folder to write; by default runs/<run name>/policy"""
    seed: int = 1
    """seed of everything random"""
    steps: int = 1500
    """optimizer steps"""
    batch_size: int = 64
    """observations per step"""
    draws: int = 4
    """noise/time draws per observation: they share one prefix and cost little (docs/sft.md)"""
    learning_rate: float = 1e-3
    """peak of a schedule with 5 % warm-up and cosine decay to zero"""
    weight_decay: float = 1e-4
    """AdamW's"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    horizon: int = 4
    """actions per predicted chunk"""
    execute: int = 4
    """actions executed before the next observation"""
    num_steps: int = 4
    """solver steps K at evaluation (the authors' value)"""
    image_size: int = 96
    """side of the camera image, px, for a new policy"""
    eval_episodes: int = 200
    """held-out evaluation episodes; with --dataset also 0: none, and no simulator is needed"""
    num_envs: int = 32
    """environments of the evaluation"""
    num_threads: int = 0
    """torch threads; 0: one per core"""
    device: str = "auto"
    """cpu, cuda, or auto"""
    video: bool = True
    """write videos/<run name>.mp4"""


def main(args: Args) -> None:
    if min(args.demos, args.steps, args.batch_size, args.draws, args.eval_episodes + bool(args.dataset), args.num_envs) < 1:
        raise envs.EnvError("--demos, --steps, --batch-size, --draws, --num-envs and, without --dataset, --eval-episodes must be "
                            "at least 1")  # fmt: skip
    if not 1 <= args.execute <= args.horizon:
        raise envs.EnvError(f"--execute {args.execute} must lie between 1 and the horizon {args.horizon}")
    if args.train not in ("expert", "all", "lora"):
        raise envs.EnvError(f"--train must be 'expert', 'all' or 'lora', got {args.train!r}")
    if args.dtype not in ("float32", "bfloat16"):
        raise envs.EnvError(f"--dtype must be 'float32' or 'bfloat16', got {args.dtype!r}")
    if args.micro_batch < 0 or args.lora_rank < 1 or not args.lora_alpha > 0:
        raise envs.EnvError(f"--micro-batch {args.micro_batch} must not be negative, --lora-rank {args.lora_rank} and --lora-alpha "
                            f"{args.lora_alpha} must be positive")  # fmt: skip
    if args.train == "lora" and not args.base:
        raise envs.EnvError("--train lora adapts a policy that can already do something: give --base")
    run_name = f"sft-pi05-{args.env_id}-{args.obs_mode}-{args.seed}-{int(time.time())}"
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or envs.num_cores())
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))

    # Demonstrations
    base = policies.load(args.base, device, expect="pi05") if args.base else None
    image_size = base.config.image_size if base else args.image_size
    data, venv = None, None
    if args.dataset:  # before the simulators start, which takes longer than to find a file wanting
        data = datasets.read(
            args.dataset, obs_mode=args.obs_mode, rotate=args.rotate_images, image_size=image_size, env_id=args.env_id
        )
    if args.eval_episodes:
        venv = envs.make(
            args.env_id, args.num_envs, obs_mode=args.obs_mode, image_size=image_size, chunk=args.execute, seed=args.seed,
            backend="cpu",  # the scripted experts' one
        )  # fmt: skip
    size = f"{image_size}px-" if args.obs_mode == "rgb" else ""
    path = f"demos/{args.env_id}-{args.obs_mode}-{size}{args.demos}-noise{args.demo_noise}.h5"
    if not data and os.path.exists(path):
        data = demos.read(path, env_id=args.env_id, obs_mode=args.obs_mode)
    elif not data:
        data = demos.collect(path, venv, args.demos, noise=args.demo_noise)
    chunks = data.chunks(args.horizon, args.absolute_actions)  # (N, H, A)
    if venv:
        space, mode = venv.single_observation_space, venv.spec.control_mode
        given = dict(cameras=data.image.shape[1], state=data.state.shape[1], action=chunks.shape[-1],
                     control_mode=data.attrs.get("control_mode", mode))  # fmt: skip
        wanted = dict(cameras=space["image"].shape[0], state=space["state"].shape[0], action=venv.action_dim, control_mode=mode)
        if given != wanted:
            venv.close()
            raise envs.EnvError(f"the demonstrations have {given}, {args.env_id} {wanted}; --eval-episodes 0 trains all the same")

    # Policy
    if base:  # no weight depends on the horizon
        config = replace(base.config, horizon=args.horizon)
    else:
        config = policies.Pi05Config.tiny(
            num_cameras=data.image.shape[1], image_size=image_size, state_dim=data.state.shape[1], horizon=args.horizon
        )
    policy = policies.Pi05(config).to(device)
    if base:
        policy.load_state_dict(base.state_dict())
    policy.processor = policies.Processor(
        config, policies.Tokenizer(), policies.NormStats.from_data(data.state),
        policies.NormStats.from_data(chunks, min_std=0.1), device,
    )  # fmt: skip
    policy.cast(getattr(torch, args.dtype), trained=None if args.train == "lora" else args.train)
    if args.train == "expert":
        policy.freeze_vlm()
    elif args.train == "lora":
        policies.add_lora(policy, args.lora_rank, args.lora_alpha)
    policy.checkpoint_gradients(args.gradient_checkpointing).train()
    actions = policy.processor.normalize_actions(chunks, data.state)  # (N, H, A)
    state = policy.processor.normalize_state(data.state)  # (N, S)

    def encode(rows: torch.Tensor) -> policies.Prefix:
        images, image_mask, tokens, token_mask, _ = policy.processor(
            {"image": data.image[rows.numpy()], "state": data.state[rows.numpy()]}, data.text(rows.numpy())
        )
        return policy.encode_prefix(images, image_mask, tokens, token_mask)

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
    writer = SummaryWriter(f"runs/{run_name}")
    writer.add_text("hyperparameters", json.dumps(asdict(args), indent=2))
    start = time.time()
    with tqdm(range(args.steps), desc="SFT") as bar:
        for step in bar:
            rows = torch.randint(len(state), (args.batch_size,))
            optimizer.zero_grad()
            loss = 0.0
            for part in rows.split(args.micro_batch or len(rows)):
                prefix = cache[part] if args.train == "expert" else encode(part)
                targets = actions[part, None].expand(-1, args.draws, -1, -1)  # (b, draws, H, A)
                mean = policy.flow_loss(prefix, state[part], targets)[..., : chunks.shape[-1]].mean()
                (len(part) / len(rows) * mean).backward()
                loss += len(part) / len(rows) * mean.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == args.steps - 1:
                if not torch.isfinite(loss):
                    raise envs.EnvError(f"the loss became {loss.item()} at step {step}: lower --learning-rate")
                writer.add_scalar("losses/flow", loss.item(), step)
                writer.add_scalar("losses/grad_norm", grad_norm.item(), step)
                bar.set_postfix(loss=f"{loss.item():.4f}")

    policy.eval()
    policy.meta = dict(
        env_id=args.env_id, obs_mode=args.obs_mode, execute=args.execute, num_steps=args.num_steps,
        sft=dict(demos=len(data.start), steps=args.steps, seed=args.seed, train=args.train,
                 base=args.base and Path(args.base).name),
    )  # fmt: skip
    output = args.output or f"runs/{run_name}/policy"
    policies.save(policy, output)
    print(f"{args.env_id} ({args.obs_mode}): SFT on {len(data.start)} demonstrations, {(time.time() - start) / 60:.1f} min")

    # Evaluation on held-out seeds
    if venv:
        generator = torch.Generator(device).manual_seed(args.seed)

        def act(obs: dict, instructions: list[str]) -> np.ndarray:
            return policy.act(obs, instructions, args.num_steps, generator)

        result = evaluate(venv, act, args.eval_episodes, execute=args.execute, progress="evaluation")
        writer.add_scalar("eval/success", result.rate, args.steps)
        policy.meta["sft"] |= dict(success=result.rate, interval=result.interval, episodes=args.eval_episodes)
        policies.save(policy, output)
        if args.video:
            record(venv, act, f"videos/{run_name}.mp4", execute=args.execute)
        venv.close()
        print(f"success {result}")
    writer.close()
    print(f"checkpoint {output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (envs.EnvError, policies.CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
