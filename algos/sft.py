# Docs: docs/sft.md. Few-shot supervised fine-tuning by flow matching: python algos/sft.py --env-id PickCube-v1 (--policy pi05)
"""Flow matching on demonstrations (π0: Black et al., arXiv 2410.24164; π0.5, whose state is text in the prompt: arXiv 2504.16054):
the policy that reinforcement learning then starts from."""

from __future__ import annotations

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

from pi_stepnft import envs, harness, policies
from pi_stepnft.envs import datasets, demos
from pi_stepnft.harness import Batch, Count, CountOrZero, Positive, PositiveOrZero, Size, Text, ranks
from pi_stepnft.harness.evaluation import by_ode, evaluate
from pi_stepnft.harness.films import record
from pi_stepnft.policies.pi0 import sample_time


@dataclass
class Args(harness.TrainArgs):
    policy: Literal["pi0", "pi05"] | None = None
    """π0 or π0.5; default: what --base is, otherwise π0"""
    base: Text | None = None
    """checkpoint to start from, e.g. one that can see and read (algos/pretrain.py); default: random weights, tiny sizes"""
    output: Text | None = None
    """checkpoint folder to write at the end, beside runs/<run name>/policy, which is there all the time"""

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
    val_demos: CountOrZero = 0
    """demonstrations of these that are not trained on, whole ones and the same with every seed, for the validation loss; 0: none"""
    val_every: Count = 100
    """optimizer steps between validations, each on up to 256 of their observations, at the same noise and times"""

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
    save_every: Count = 500
    """optimizer steps between checkpoints"""

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
    if args.batch_size % ranks.SIZE:
        raise harness.RunError(f"--batch-size {args.batch_size} must be a multiple of {ranks.SIZE}, the number of processes")
    if not args.base and args.image_size % (patch := policies.Pi0Config.tiny().patch_size):
        raise harness.RunError(f"--image-size {args.image_size} must be a multiple of {patch}, the side of a tiny policy's patch")


def main(args: Args) -> None:
    check(args)
    run = harness.Training("sft", args)
    device = run.device

    # Demonstrations, and the environments that make them and evaluate the policy
    policy, image_size = None, args.image_size
    source = run.resumed / "policy" if run.resumed and args.train != "lora" else args.base  # what is saved has adapters merged
    if source:  # no weight depends on the horizon
        precision = dict(dtype=getattr(torch, args.dtype), trained=None if args.train == "lora" else args.train)
        policy = policies.load(source, device, expect=args.policy, horizon=args.horizon, **precision)
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
    known = ranks.first(lambda: os.path.exists(path))
    if not (data or known):
        envs.simulator(args.env_id).expert(args.env_id)  # who has none is told before the simulators start
    if args.eval_episodes:  # the scripted experts' back end
        venv = harness.make_envs(args, **ranks.share(args.num_envs), image_size=image_size, chunk=args.execute, backend="cpu")
    if not data and known:
        data = demos.read(path, env_id=args.env_id, obs_mode=args.obs_mode)
    elif not data:
        data = ranks.first(lambda: demos.collect(path, venv, args.demos, noise=args.demo_noise))
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

    # Held-out demonstrations: chosen at random, as the last ones may be another task's
    trained_on = len(data.start) - args.val_demos
    if trained_on < 1:
        raise harness.RunError(f"--val-demos {args.val_demos} of {len(data.start)} demonstrations leaves none to train on")
    order = np.random.default_rng(0).permutation(len(data.start))
    episode = np.repeat(np.arange(len(data.start)), np.diff(np.append(data.start, len(chunks))))  # (N,) that each row belongs to
    is_held_out = np.isin(episode, order[: args.val_demos])
    train, held_out = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (~is_held_out, is_held_out))  # rows
    held_out = held_out[:: -(-len(held_out) // 256) or 1]

    # Policy
    if not policy:
        Policy, Config = policies.checkpoint.TYPES[args.policy or "pi0"]
        tiny = Config.tiny()
        longest = policies.Tokenizer().longest(data.instructions, S if getattr(tiny, "discrete_state", False) else 0)
        room = dict(num_cameras=cameras, state_dim=S, action_dim=max(A, tiny.action_dim),
                    max_token_len=max(longest, tiny.max_token_len))
        policy = Policy(Config.tiny(image_size=image_size, horizon=args.horizon, **room)).to(device)
    config = policy.config
    for what, count, limit in (("cameras", cameras, config.num_cameras), ("state dimensions", S, config.state_dim),
                               ("action dimensions", A, config.action_dim)):
        if count > limit:
            raise harness.RunError(f"the demonstrations have {count} {what}, --base {args.base} has room for {limit}")
    tokenizer = policy.processor.tokenizer if policy.processor else policies.Tokenizer()
    statistics = policies.NormStats.from_data(data.state[train]), policies.NormStats.from_data(chunks[train], min_std=0.1)
    if run.resumed:
        known = policies.read_json(run.resumed / "policy" / "config.json")["processor"]
        if [known["state"], known["actions"]] != [each.to_dict() for each in statistics]:
            raise harness.RunError(f"the demonstrations are not those that {run.folder} was begun with: bring them back, or start "
                                   "a new run")
    policy.processor = policies.Processor(config, tokenizer, *statistics, device)
    harness.adapt(policy, args).train()
    run.divide(policy)
    actions = policy.processor.normalize_actions(chunks, data.state)  # (N, H, A)
    state = policy.processor.normalize_state(data.state)  # (N, S)

    def encode(rows: torch.Tensor) -> policies.Prefix:
        obs = {"image": data.image[rows.numpy()], "state": data.state[rows.numpy()]}
        *inputs, _ = policy.processor(obs, data.text(rows.numpy()))
        return policy.encode_prefix(*inputs)

    if args.train == "expert":  # the prefixes cannot change: encode each observation once
        with torch.no_grad():
            cache = policies.Prefix.cat([encode(rows) for rows in torch.arange(len(state)).split(256)])

    def flow_loss(rows: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mean over observations `rows` (b,), at noise (b, draws, H, A) and times (b, draws)."""
        prefix = cache[rows] if args.train == "expert" else encode(rows)
        targets = actions[rows, None].expand(noise.shape)
        return policy.flow_loss(prefix, state[rows], targets, noise, t)[..., :A].mean()

    fixed = torch.Generator().manual_seed(0)
    shape = len(held_out), args.draws
    val_noise = torch.randn(*shape, *actions.shape[1:], generator=fixed).to(device)
    val_t = sample_time(shape, generator=fixed).to(device)

    def validate() -> dict[str, float]:
        """The loss on the held-out demonstrations."""
        policy.eval()
        with torch.no_grad():
            parts = torch.arange(len(held_out)).split(args.micro_batch or args.batch_size)
            total = sum(len(i) * flow_loss(held_out[i], val_noise[i], val_t[i]).item() for i in parts)
        policy.train()
        return {"val_flow": total / len(held_out)}

    # Flow matching
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    warmup = max(1, args.steps // 20)
    policy.meta = dict(env_id=args.env_id, obs_mode=args.obs_mode, execute=args.execute, num_steps=args.num_steps)
    run.begin(
        dict(policy=policy), optimizer, total=args.steps, demos=trained_on, val_demos=args.val_demos,
        steps=args.steps, train=args.train, base=args.base and Path(args.base).name,
    )
    for step in run.iterations():
        losses = harness.Averages()
        if args.val_demos and step % args.val_every == 0:
            losses.add(validate())
            run.lap("validation")
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(1, step / args.steps))))
        rows = train[torch.randint(len(train), (args.batch_size // ranks.SIZE,))]
        noise = torch.randn(len(rows), args.draws, *actions.shape[1:], device=device)
        t = sample_time((len(rows), args.draws), device)
        optimizer.zero_grad()
        for mb in torch.arange(len(rows)).split(args.micro_batch or len(rows)):  # the loss is a mean over rows, so is its gradient
            loss, share = flow_loss(rows[mb], noise[mb], t[mb]), len(mb) / args.batch_size
            (share * loss).backward()
            losses.add({"flow": loss.detach()}, share)
        if run.clip_gradients(losses, grad_norm=parameters):
            optimizer.step()
        run.log(losses)
        run.save_when_due()

    # Validation, and evaluation on held-out seeds
    outcome = validate() if args.val_demos else {}
    for name, loss in outcome.items():
        run.writer.add_scalar(f"losses/{name}", loss, args.steps)
    print(f"{args.env_id} ({args.obs_mode}): SFT on {trained_on} demonstrations, {run.trained_s / 60:.1f} min"
          + "".join(f", loss on {args.val_demos} others {loss:.4f}" for loss in outcome.values()))
    if venv:
        with run.acting(policy) as acting:
            act = by_ode(acting, args.num_steps)
            result = evaluate(venv, act, args.eval_episodes, execute=args.execute, progress="evaluation")
        run.writer.add_scalar("eval/success", result.rate, args.steps)
        outcome |= result.outcome
    run.finish(**outcome)
    if args.output:
        with run.acting(policy) as acting:
            ranks.first(lambda: policies.save(acting, args.output))
    if venv:
        if args.video and ranks.RANK == 0:
            record(venv, result, f"videos/{run.folder.name}.mp4", f"{args.env_id}, after {args.steps} steps")
        venv.close()
        print(f"success {result}")
    print(f"checkpoint {args.output or run.folder / 'policy'}")


if __name__ == "__main__":
    with harness.one_line_errors():
        main(harness.parse(Args, __doc__))
