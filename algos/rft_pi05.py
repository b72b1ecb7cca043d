# Docs: docs/rft.md. Filtered behaviour cloning for π0.5: python algos/rft_pi05.py --env-id PickCube-v1
"""Rejection fine-tuning (filtered behaviour cloning) for π0.5: flow matching on the action chunks of the policy's own successful
episodes, and of no other."""

from __future__ import annotations

import atexit
import json
import os
import random
import shlex
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pi_stepnft import envs, policies
from pi_stepnft.harness import Rows, memory_gb
from pi_stepnft.harness.evaluation import evaluate, plot_curve, record
from pi_stepnft.policies.pi0 import sample_time


@dataclass
class Args:
    env_id: str = "PickCube-v1"
    """ManiSkill task"""
    obs_mode: Literal["rgb", "state"] = "rgb"
    """rgb: camera image, proprioception and goal; state: no camera, privileged object poses in the state"""
    checkpoint: str | None = None
    """policy to start from: a folder or a bundled name; default: the bundled one for the task and obs mode"""
    resume: str | None = None
    """run folder (runs/<name>) to go on with, under its own arguments (--iterations may extend it)"""
    seed: int = 1
    """seed of everything random"""
    iterations: int = 200
    """rollout + update rounds"""
    max_minutes: float = 24.0
    """stop training after so many minutes of this call even if iterations remain (--resume goes on); 0: no limit"""
    train: Literal["expert", "all", "lora"] = "expert"
    """expert: the VLM is frozen; all: everything is trained; lora: low-rank additions to both transformers
    are, see policies/lora.py"""

    # rollout
    num_envs: int = 64
    """environments side by side"""
    rollout_epochs: int = 4
    """rounds of episodes per iteration: num_envs × rollout_epochs episodes"""
    execute: int = 0
    """actions executed of each predicted chunk; 0: as in the checkpoint"""
    rollout_steps: int = 32
    """steps after which a training episode counts as failed; 0: the task's own limit, as in evaluations"""
    num_steps: int = 4
    """solver steps K (πRL, StepNFT: 4)"""
    noise_level: float = 0.5
    """a of σ_t = a·sqrt(t / (1 − t)), exploration noise on every solver step; with 0, the ODE, what barely succeeds is cloned as if
    it had a margin (docs/rft.md)"""
    group_size: int = 1
    """episodes from one initial state (--contrast needs more than 1)"""
    contrast: bool = False
    """learn only from initial states where an episode failed too: the others can already be solved"""

    # update
    update_epochs: int = 1
    """passes over the chunks of an iteration's update, each at fresh noise and times"""
    replay: int = 40
    """draw the chunks, as many as this iteration's successes have, from the successes of so many of the last iterations, whose
    prefixes stay in memory: early ones hold the policy near its start. 1: this iteration's alone. --resume begins with none"""
    num_minibatches: int = 8
    """minibatches per epoch: few and large, as Adam's full-size steps amplify gradient noise"""
    learning_rate: float = 3e-5
    """Adam's"""
    warmup_iterations: int = 5
    """iterations of linear learning-rate warm-up"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    draws: int = 4
    """noise/time draws per chunk and pass: they share its prefix and cost little"""

    # memory and speed of large policies (docs/memory.md); none changes what is computed but for rounding
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of frozen weights and of the computation, with the published float32 parts; trained weights are float32"""
    lora_rank: int = 16
    """rank of --train lora (openpi: 16 in the language model, 32 in the expert)"""
    lora_alpha: float = 16.0
    """its scale: the additions are (alpha / rank)·B·A (openpi: as the rank)"""
    prefix_cache: Literal["device", "cpu", "off"] | None = None
    """where a frozen VLM's prefixes wait for the update; off: their inputs wait in host memory and are encoded again in each
    minibatch. Default: device; off where the VLM is trained"""
    micro_batch: int = 0
    """chunks per forward and backward pass, whose gradients add up to the minibatch's; 0: the whole minibatch at once"""
    gradient_checkpointing: bool = False
    """keep layer inputs only and compute the rest again in the backward pass"""
    compile: bool = False
    """torch.compile for the velocity"""

    # evaluation and logging
    eval_every: int = 10
    """iterations between evaluations on held-out seeds; 0: only before and after"""
    eval_episodes: int = 128
    """episodes of an evaluation while training"""
    final_eval_episodes: int = 512
    """episodes of the evaluations before and after"""
    eval_seed: int = envs.EVAL_SEED
    """first seed of the evaluation episodes; choose settings on others (envs.TUNING_SEED) than those you report on"""
    save_every: int = 10
    """iterations between checkpoints"""
    video: bool = True
    """write videos/<run name>.mp4 at the end"""
    track: bool = False
    """log to Weights & Biases too (offline without an account)"""
    num_threads: int = 0
    """torch threads; 0: one per core"""
    device: str = "auto"
    """cpu, cuda, or auto"""


# ------------------------------------------------------------------------------------------------------------ the method


def flow_sde_step(
    x_t: torch.Tensor, v: torch.Tensor, step: torch.Tensor, *, num_steps: int, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of one Flow-SDE step, x_next ~ N(μ(v), std²): the marginals of the flow ODE, with noise.

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
    policy: policies.Pi05, prefix: policies.Prefix, state: torch.Tensor, *, num_steps: int, noise_level: float
) -> torch.Tensor:
    """Action chunks (B, H, A), sampled with noise on every solver step; by the ODE where noise_level is 0."""
    B = len(state)
    x = torch.randn(B, policy.config.horizon, policy.config.action_dim, device=state.device)
    for i in range(num_steps):
        step = torch.full((B,), i, device=x.device)
        v = policy.velocity(prefix, state, x, 1 - step / num_steps).float()
        mean, std = flow_sde_step(x, v, step, num_steps=num_steps, noise_level=noise_level)
        x = mean + std * torch.randn_like(mean)
    return x


def rft_loss(
    policy: policies.Pi05,
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


def check(args: Args) -> None:
    """Raise envs.EnvError, in one line, for arguments that cannot work."""
    for name in ("iterations", "num_envs", "rollout_epochs", "num_steps", "group_size", "update_epochs", "num_minibatches",
                 "draws", "replay", "eval_episodes", "final_eval_episodes", "save_every", "lora_rank"):  # fmt: skip
        if getattr(args, name) < 1:
            raise envs.EnvError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("execute", "rollout_steps", "noise_level", "eval_every", "warmup_iterations", "max_minutes", "seed", "eval_seed",
                 "num_threads", "micro_batch"):  # fmt: skip
        if not getattr(args, name) >= 0:
            raise envs.EnvError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
        if not getattr(args, name) > 0:
            raise envs.EnvError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.device not in ("auto", "cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise envs.EnvError(f"--device must be auto, cpu, or cuda where PyTorch finds a GPU, got {args.device}")
    if args.num_envs % args.group_size:
        raise envs.EnvError(f"--num-envs {args.num_envs} must be a multiple of --group-size {args.group_size}")
    if args.contrast and args.group_size < 2:
        raise envs.EnvError("--contrast compares episodes from one initial state: give --group-size of at least 2")
    if args.train != "expert" and args.prefix_cache in ("device", "cpu"):
        raise envs.EnvError(f"--prefix-cache {args.prefix_cache} needs a frozen VLM, --train {args.train} changes it: "
                            "leave --prefix-cache out, or add --train expert")  # fmt: skip


if __name__ == "__main__":
    try:
        args = tyro.cli(Args, description=__doc__)
        if args.resume:  # the run's own arguments; more iterations, another time limit and other threads are welcome
            stored = policies.read_json(Path(args.resume) / "args.json")
            try:
                args = replace(Args(**stored), resume=args.resume, num_threads=args.num_threads, max_minutes=args.max_minutes,
                               iterations=max(args.iterations, stored["iterations"]))  # fmt: skip
            except (TypeError, KeyError) as error:
                raise envs.EnvError(f"{args.resume}/args.json is not this version's: {error}") from None
        check(args)
        checkpoint = args.checkpoint or f"pi05-tiny-{args.env_id.split('-')[0].lower()}-{args.obs_mode}"
        if not args.checkpoint and checkpoint not in policies.bundled():
            envs.check(args.env_id)
            raise envs.EnvError(
                f"no bundled checkpoint for {args.env_id} in {args.obs_mode} mode; make one with: python algos/pretrain_pi05.py "
                f"--env-id {args.env_id} --obs-mode {args.obs_mode}, then python algos/sft_pi05.py --env-id {args.env_id} "
                f"--obs-mode {args.obs_mode} --base runs/pretrained-pi05 --output runs/sft, then add --checkpoint runs/sft"
            )
        run = Path(args.resume or f"runs/rft-pi05-{args.env_id.replace('/', '-')}-{args.obs_mode}-{args.seed}-{int(time.time())}")

        # Seeds
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        rng = np.random.default_rng(args.seed)  # initial states of the training episodes
        torch.set_num_threads(args.num_threads or envs.num_cores())
        device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))

        # Policy θ, which acts itself
        lora = args.train == "lora"
        source = run / "policy" if args.resume and not lora else checkpoint  # saved policies have their adapters merged
        policy = policies.load(source, device, getattr(torch, args.dtype), expect="pi05", trained=None if lora else args.train)
        trained_on = policy.meta.get("obs_mode", args.obs_mode)
        if trained_on != args.obs_mode:
            raise envs.EnvError(f"{checkpoint} acts in {trained_on} mode: add --obs-mode {trained_on}, or another --checkpoint")
        if args.train == "expert":
            policy.freeze_vlm()
        elif lora:
            policies.add_lora(policy, args.lora_rank, args.lora_alpha)
        policy.checkpoint_gradients(args.gradient_checkpointing)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        fused = device.type == "cuda"  # no temporary copies
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # the authors'
        if args.compile:
            policy.velocity = torch.compile(policy.velocity)
        prefix_cache = args.prefix_cache or ("device" if args.train == "expert" else "off")
        H, A = policy.config.horizon, policy.config.action_dim
        execute = args.execute or policy.meta.get("execute", H)
        if execute > H:
            raise envs.EnvError(f"--execute {execute} is longer than the {H} actions that {checkpoint} predicts")
        K = args.num_steps
        mask = torch.zeros(H, A, dtype=torch.bool, device=device)  # what is executed of a chunk
        mask[:execute, : len(policy.processor.action_stats.mean)] = True

        # Environments
        venv = envs.make(
            args.env_id, args.num_envs, obs_mode=args.obs_mode, seed=args.seed, chunk=execute,
            image_size=policy.config.image_size, observe_terminal=False,
        )  # fmt: skip
        atexit.register(venv.close)  # workers and shared memory go with the program, however it ends
        for name, given, expected in (
            ("state", venv.single_observation_space["state"].shape[0], len(policy.processor.state_stats.mean)),
            ("action", venv.action_dim, len(policy.processor.action_stats.mean)),
        ):
            if given != expected:
                raise envs.EnvError(f"{checkpoint} takes {expected} {name} dimensions, {args.env_id} has {given}: use its policy")

        # Resume
        iteration, env_steps, trained_s, curve, peak_gb = 0, 0, 0.0, [], 0.0
        adapters = {"policy": parameters} if lora else {}  # what checkpoints do not hold
        if args.resume:
            progress = policies.load_training(run, optimizer, rng, adapters)
            iteration, env_steps, trained_s, curve = (progress[k] for k in ("iteration", "env_steps", "trained_s", "curve"))
        run.mkdir(parents=True, exist_ok=True)
        (run / "args.json").write_text(json.dumps(asdict(args) | {"resume": None}, indent=2))
        if args.track:
            import wandb

            wandb.init(project="pi-stepnft", name=run.name, config=asdict(args), sync_tensorboard=True,
                       mode=None if os.environ.get("WANDB_API_KEY") else "offline")  # fmt: skip
        writer = SummaryWriter(str(run))
        writer.add_text("hyperparameters", json.dumps(asdict(args), indent=2))

        def success_rate(episodes: int, label: str):
            """Success by the ODE on held-out seeds, the same ones and the same noise every time."""
            policy.eval()
            generator = torch.Generator(device).manual_seed(0)
            return evaluate(venv, lambda obs, text: policy.act(obs, text, K, generator), episodes, execute=execute,
                            seed=args.eval_seed, progress=label)  # fmt: skip

        def note(result) -> None:
            """Add an evaluation to the learning curve."""
            curve.append(dict(iteration=iteration, env_steps=env_steps, minutes=trained_s / 60, success=result.rate,
                              interval=result.interval, episodes=len(result.success)))  # fmt: skip
            writer.add_scalar("eval/success", result.rate, iteration)

        def save() -> None:
            policy.meta = policy.meta | {
                "execute": execute, "num_steps": K, "rft": {"iteration": iteration, "env_steps": env_steps, "seed": args.seed},
            }  # fmt: skip
            policies.save(policy, run / "policy")
            progress = dict(iteration=iteration, env_steps=env_steps, trained_s=trained_s, curve=curve)
            policies.save_training(run, optimizer, rng, progress, adapters)
            plot_curve(curve, run / "curve.png", f"{args.env_id} ({args.obs_mode}), seed {args.seed}")

        if not curve:
            before = success_rate(args.final_eval_episodes, "evaluation before")
            note(before)
            print(f"before: {before}")
        start, trained_before_s = time.time() - trained_s, trained_s
        kept = deque(maxlen=args.replay)  # of the last iterations' successes: prefixes, states (M, S), chunks (M, H, A)
        bar = tqdm(total=args.iterations, initial=iteration, desc="RFT", smoothing=0.1)
        while iteration < args.iterations and not 0 < 60 * args.max_minutes < trained_s - trained_before_s:
            # ------------------------------------------------------------------ rollout: act with θ, remember chunks
            began = time.time()
            chunks, success, lost, group = [], [], [], []
            stored = Rows(device if prefix_cache == "device" else "cpu")  # each chunk's prefix, or what it is made of
            policy.eval()
            with torch.inference_mode():
                for epoch in range(args.rollout_epochs):
                    seeds = rng.integers(envs.TRAIN_SEEDS, size=args.num_envs // args.group_size).repeat(args.group_size)
                    obs, _ = venv.reset(seed=seeds)
                    running, gone = np.ones(args.num_envs, bool), np.zeros(args.num_envs, bool)
                    position = 0
                    while running.any() and not 0 < args.rollout_steps <= position * execute:
                        index = np.flatnonzero(running)
                        images, image_mask, tokens, token_mask, state = policy.processor(
                            {k: v[index] for k, v in obs.items()}, [venv.instructions[i] for i in index]
                        )
                        prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
                        x = flow_sde_sample(policy, prefix, state, num_steps=K, noise_level=args.noise_level)
                        stored.append(policies.Inputs(images, image_mask, tokens, token_mask) if prefix_cache == "off" else prefix)
                        chunks.append((state, x, epoch * args.num_envs + index))
                        position += 1
                        actions = np.zeros((args.num_envs, execute, venv.action_dim), np.float32)
                        chunk = policy.processor.unnormalize_actions(x[:, :execute], obs["state"][index])
                        actions[index] = chunk.cpu().numpy()
                        obs, _, terminated, truncated, info = venv.step(actions)
                        env_steps += int(info["steps"].sum())
                        running &= ~(terminated | truncated)
                        gone |= info["lost"]
                    success.append(info["success"])
                    lost.append(gone)
                    group.append(epoch * args.num_envs + np.arange(args.num_envs) // args.group_size)
            rollout_s, rollout_gb = time.time() - began, memory_gb(device)

            # ------------------------------------------------------------------ keep what succeeded
            success, lost, group = np.concatenate(success), np.concatenate(lost), np.concatenate(group)
            episode = np.concatenate([c[-1] for c in chunks])  # (M,) of each chunk
            group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode
            keep = chunks_to_clone(success & ~lost, group, episode, args.contrast)
            used = torch.from_numpy(np.flatnonzero(keep)).to(device)
            b_state, b_x = (torch.cat([c[i] for c in chunks]).clone()[used] for i in (0, 1))  # (M, S), (M, H, A)
            M = len(used)
            del chunks
            if args.replay > 1 and M:  # M of all that is kept
                kept.append((stored[used], b_state, b_x))
                stored = Rows(stored.device)
                for prefix, _, _ in kept:
                    stored.append(prefix)
                used = torch.randperm(sum(len(x) for _, _, x in kept), device=device)[:M]
                b_state, b_x = (torch.cat([k[i] for k in kept])[used] for i in (1, 2))

            # ------------------------------------------------------------------ update θ
            policy.train()
            sums, updates = {}, 0
            for param_group in optimizer.param_groups:
                param_group["lr"] = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
            for _ in range(args.update_epochs if M else 0):  # nothing to learn from where no episode succeeded
                b_noise = torch.randn(M, args.draws, H, A, device=device)
                b_t = sample_time((M, args.draws), device)  # as in the policy's own training
                for minibatch in torch.randperm(M, device=device).chunk(args.num_minibatches):
                    optimizer.zero_grad()
                    for mb in minibatch.split(args.micro_batch or M):  # the loss is a mean over chunks, so are the gradients
                        share = len(mb) / len(minibatch)
                        prefix = stored[used[mb]].to(device)
                        if prefix_cache == "off":
                            prefix = policy.encode_prefix(*prefix)
                        loss = rft_loss(policy, prefix, b_state[mb], b_x[mb], b_noise[mb], b_t[mb], mask=mask)
                        (share * loss).backward()
                        sums["loss"] = sums.get("loss", 0.0) + share * loss.item()
                    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    if not torch.isfinite(grad_norm):  # keep the weights that still work
                        raise envs.EnvError(f"the gradient is not finite at iteration {iteration}: lower --learning-rate; "
                                            f"the last checkpoint in {run} is intact")  # fmt: skip
                    optimizer.step()
                    updates += 1
                    sums["grad_norm"] = sums.get("grad_norm", 0.0) + grad_norm.item()

            # ------------------------------------------------------------------ log, evaluate, save
            iteration += 1
            last = iteration == args.iterations
            trained_s = time.time() - start
            steps_per_s = env_steps / trained_s
            update_gb = memory_gb(device)
            peak_gb = max(peak_gb, rollout_gb, update_gb)
            for name, value in {
                "charts/rollout_success": success[~lost].mean(), "charts/SPS": steps_per_s, "charts/env_steps": env_steps,
                "charts/rollout_s": rollout_s, "charts/update_s": time.time() - began - rollout_s, "charts/signal": keep.mean(),
                "charts/memory_rollout_gb": rollout_gb, "charts/memory_update_gb": update_gb,
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                **{f"losses/{name}": value / max(1, updates) for name, value in sums.items()},
            }.items():  # fmt: skip
                writer.add_scalar(name, value, iteration)
            bar.update()
            bar.set_postfix(success=f"{100 * success.mean():.0f}%", SPS=f"{steps_per_s:.0f}", refresh=False)
            if args.eval_every and iteration % args.eval_every == 0 and not last:
                result = success_rate(args.eval_episodes, "evaluation")
                note(result)
                tqdm.write(f"iteration {iteration}, {env_steps} environment steps, {trained_s / 60:.1f} min: {result}")
                start = time.time() - trained_s  # evaluations do not count as training time
            if iteration % args.save_every == 0 or last:
                save()
        bar.close()

        # ---------------------------------------------------------------------- before → after
        after = success_rate(args.final_eval_episodes, "evaluation after")
        note(after)
        save()
        if args.video:
            generator = torch.Generator(device).manual_seed(0)
            record(venv, lambda obs, text: policy.act(obs, text, K, generator), f"videos/{run.name}.mp4", execute=execute,
                   seed=args.eval_seed)  # fmt: skip
        venv.close()
        writer.close()
        outcome = ("success", "interval", "episodes")
        result = dict(
            command="python " + shlex.join(sys.argv), algorithm="rft_pi05", env_id=args.env_id, obs_mode=args.obs_mode,
            seed=args.seed, checkpoint=checkpoint, iterations=iteration, env_steps=env_steps, training_minutes=trained_s / 60,
            parameters_trained=sum(p.numel() for p in parameters), peak_memory_gb=peak_gb,
            forward_passes=args.draws,  # velocities of a chunk in one pass of the update
            before={k: curve[0][k] for k in outcome}, after={k: curve[-1][k] for k in outcome},
            versions=dict(torch=torch.__version__, python=sys.version.split()[0]), args=asdict(args), curve=curve,
        )  # fmt: skip
        (run / "result.json").write_text(json.dumps(result, indent=2))
        low, high = curve[0]["interval"]
        print(f"checkpoints, curve.png and result.json in {run}" + (f", video in videos/{run.name}.mp4" if args.video else ""))
        print(
            f"{args.env_id} ({args.obs_mode}): {100 * curve[0]['success']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] → {after} "
            f"after {env_steps} environment steps in {trained_s / 60:.1f} min of training"
        )
    except (envs.EnvError, policies.CheckpointError, OSError) as error:  # OSError: a full disk, a folder that is not ours
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with --resume and the run's folder under runs/")
