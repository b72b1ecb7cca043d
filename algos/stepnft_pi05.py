# Docs: docs/stepnft.md. Online RL for π0.5 without critic or likelihood: python algos/stepnft_pi05.py --env-id PickCube-v1
"""π-StepNFT (arXiv 2603.02083) for π0.5: noisy Flow-SDE rollouts, one remembered solver transition per action chunk, mirrored
velocity branches, a logistic ranking loss, a slowly moving rollout policy."""

from __future__ import annotations

import atexit
import copy
import json
import os
import random
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pi_stepnft import envs, policies
from pi_stepnft.harness import Rows, memory_gb
from pi_stepnft.harness.evaluation import evaluate, plot_curve, record


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
    """rollout + update rounds (authors: 400 LIBERO, 240 ManiSkill)"""
    max_minutes: float = 24.0
    """stop training after so many minutes of this call even if iterations remain (--resume goes on); 0: no limit"""
    train: Literal["expert", "all", "lora"] = "expert"
    """expert: the VLM is frozen (the authors' choice); all: everything is trained; lora: low-rank additions to both transformers
    are, see policies/lora.py"""

    # rollout
    num_envs: int = 64
    """environments side by side"""
    rollout_epochs: int = 4
    """rounds of episodes per iteration: num_envs × rollout_epochs episodes (authors: 64 × 8 LIBERO, 128 × 10 ManiSkill)"""
    execute: int = 0
    """actions executed of each predicted chunk; 0: as in the checkpoint (authors: 5, LIBERO-long 10)"""
    rollout_steps: int = 32
    """steps after which a training episode counts as failed; 0: the task's own limit, as in evaluations (authors' ManiSkill: 60,
    evaluation 80)"""
    num_steps: int = 4
    """solver steps K (authors: 4)"""
    noise_level: float = 0.4
    """a of σ_t = a·sqrt(t / (1 − t)), the exploration noise on every solver step (authors: 0.2); the shipped π0.5 bears less of it
    than π0 does"""
    noise_end: float | None = None
    """noise level at the last iteration, of a straight line from --noise-level; default: constant (the paper)"""
    sampler: Literal["sde", "ode"] = "sde"
    """sde: noise on every solver step; ode: none but the initial one, with unit variance in the loss (needs --target x0 or mean)"""
    transitions: Literal["random", "all"] | int = "all"
    """which solver transitions of a chunk to learn from: one random (the paper), all K (same environment cost), or this step"""
    labels: Literal["binary", "group", "gae"] = "group"
    """binary: ±1 by success (the paper); group: success relative to the episodes from the same initial state; gae: generalised
    advantages with their share of success as the value"""
    gamma: float = 0.99
    """discount per chunk of label gae (as the authors' PPO)"""
    gae_lambda: float = 0.95
    """λ of label gae (as the authors' PPO)"""
    group_size: int = 16
    """episodes from one initial state (authors: 1; label group needs more)"""

    # update
    update_epochs: int = 1
    """passes over each iteration's chunks; more fit the noise of a small batch (authors, with larger ones: π0.5 1, ManiSkill 5)"""
    num_minibatches: int = 8
    """minibatches per epoch: few and large, as Adam's full-size steps amplify gradient noise"""
    learning_rate: float = 1e-4
    """Adam's (authors: 1e-5 LIBERO, 8e-6 ManiSkill, at 3 B parameters)"""
    warmup_iterations: int = 5
    """iterations of linear learning-rate warm-up"""
    max_grad_norm: float = 1.0
    """gradient clipping (authors: 1)"""
    loss: Literal["ranking", "wmse", "positive", "negative"] = "ranking"
    """ranking: logistic, of both branches (the paper); wmse: their squared errors weighted by the label, as in DiffusionNFT;
    positive, negative: ranking of what succeeded or failed only"""
    target: Literal["xnext", "mean", "x0"] = "xnext"
    """what the branches have to explain: xnext: the sampled next solver state (the paper); mean: the mean of a step that heads for
    the executed chunk; x0: the executed chunk itself, by where the branches' straight paths end"""
    beta: float = 1.0
    """β, how far the mirrored branches v_old ± β·Δv lie apart (authors: 1)"""
    max_drift: float = 0.5
    """limit on the norm of Δv per action position (authors' code: 0.5)"""
    tr_coef: float = 1e-4
    """λ of the trust-region term λ·mean (v_θ − v_old)² (authors: 1e-4)"""
    std_eps: float = 1e-4
    """added to the variance of a solver step (authors' code: 1e-4)"""
    granularity: Literal["position", "chunk"] = "chunk"
    """rank each action position on its own (authors' code) or the chunk as a whole (the paper)"""
    mask_padding: bool = True
    """leave padded action dimensions and positions that are never executed out of the loss (authors' code: False)"""
    ema_start: float = 0.1
    """α of θ_old ← α·θ_old + (1 − α)·θ at the first iteration (authors: 0.1)"""
    ema_end: float = 0.5
    """α at the end of its schedule (authors: 0.995)"""
    ema_horizon: int = 60
    """iterations of α's cosine schedule (authors' files: 1000, for runs of 400)"""

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
    std (B, 1, 1). `noise_level` 0 gives the Euler step x_t − δ·v. The sampler and the loss both call this function.
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Explore: sample action chunks with noise on every solver step.

    Returns the whole path x (B, K + 1, H, A), whose last entry is the action chunk, and the velocities v (B, K, H, A).
    """
    B = len(state)
    x = torch.randn(B, policy.config.horizon, policy.config.action_dim, device=state.device)
    xs, vs = [x], []
    for i in range(num_steps):
        step = torch.full((B,), i, device=x.device)
        v = policy.velocity(prefix, state, x, 1 - step / num_steps).float()
        mean, std = flow_sde_step(x, v, step, num_steps=num_steps, noise_level=noise_level)
        x = mean + std * torch.randn_like(mean)
        xs.append(x)
        vs.append(v)
    return torch.stack(xs, 1), torch.stack(vs, 1)


def stepnft_loss(
    v_theta: torch.Tensor,
    v_old: torch.Tensor,
    x_t: torch.Tensor,
    x_next: torch.Tensor,
    step: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
    beta: float = 1.0,
    max_drift: float = 0.5,
    tr_coef: float = 1e-4,
    std_eps: float = 1e-4,
    granularity: str = "position",
    loss: str = "ranking",
    target: str = "xnext",
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Align: rank the mirrored branches v± = v_old ± β·Δv by how well their solver step explains the remembered x_next.

    v_theta, v_old, x_t, x_next: (B, H, A); step: (B,) int in [0, num_steps); labels y: (B,) in [-1, 1], +1 after success.
    granularity: "position" ranks each of the H action positions (the released code), "chunk" their sum (the paper).
    loss: "ranking" as below; "wmse" the branches' squared errors weighted by the label, ½·(r·E⁺ + (1 − r)·E⁻) with r = (1 + y)/2;
    "positive", "negative" rank only what has a label above or below zero. target: with "x0" the branches are judged by where their
    straight paths end, x_t − t·v±, and x_next holds the executed chunk; the other targets differ in x_next alone.
    mask: (H, A) or (B, H, A) bool, entries that count; None counts all, padded ones included (the released code).

        loss = softplus( ½·y·(E⁺ − E⁻) ) + λ·mean (v_θ − v_old)²,   E± = Σ (x_next − μ(v±))² / (std² + std_eps)

    Success pulls v_θ to where the branch v⁺ explains the executed step better than its mirror image, failure pushes it away.
    At θ = θ_old the loss is log 2. Returns the scalar loss and metrics: pref_acc (share of the rankings that agree with the
    label's sign), drift (mean ‖Δv‖ per position before the limit), drift_limited (share of positions at the limit), ranking.
    """
    weight = torch.ones_like(x_t) if mask is None else mask.to(x_t).expand_as(x_t)
    difference = (v_theta - v_old) * weight
    # The limit's coefficient carries gradient, as in the released code; 1e-12 keeps the root differentiable at zero.
    norm = (difference.square().sum(-1, keepdim=True) + 1e-12).sqrt()  # (B, H, 1)
    dv = difference * (max_drift / norm).clamp(max=1.0)

    kwargs = dict(num_steps=num_steps, noise_level=noise_level)
    mean_plus, std = flow_sde_step(x_t, v_old + beta * dv, step, **kwargs)
    mean_minus, _ = flow_sde_step(x_t, v_old - beta * dv, step, **kwargs)
    if target == "x0":
        t = (1 - step / num_steps).view(-1, 1, 1)
        mean_plus, mean_minus = (x_t - t * (v_old + sign * beta * dv) for sign in (1, -1))
    variance = std**2 + std_eps
    energy_plus = (weight * (x_next - mean_plus) ** 2 / variance).sum(-1)  # (B, H)
    energy_minus = (weight * (x_next - mean_minus) ** 2 / variance).sum(-1)
    y = {"positive": labels.clamp(min=0), "negative": labels.clamp(max=0)}.get(loss, labels).view(-1, 1)
    counted = weight.amax(-1)  # (B, H) positions with anything to rank
    if granularity == "chunk":
        energy_plus, energy_minus = energy_plus.sum(1, keepdim=True), energy_minus.sum(1, keepdim=True)  # (B, 1)
        counted = torch.ones_like(energy_plus)
    margin = 0.5 * y * (energy_plus - energy_minus)  # negative where the ranking agrees with the label
    values = F.softplus(margin)
    if loss == "wmse":  # its slope at θ = θ_old is the ranking's
        values = 0.25 * ((1 + y) * energy_plus + (1 - y) * energy_minus)
    ranking = (values * counted).sum() / counted.sum()
    total = ranking + tr_coef * difference.square().sum() / weight.sum()
    with torch.no_grad():
        positions, ranked = weight.amax(-1, keepdim=True), counted * (y != 0)
        metrics = dict(
            ranking=ranking.detach(),
            pref_acc=((margin < 0) * ranked).sum() / ranked.sum().clamp(min=1),
            drift=(norm * positions).sum() / positions.sum(),
            drift_limited=((norm > max_drift) * positions).sum() / positions.sum(),
        )
    return total, metrics


def chunk_labels(
    success: np.ndarray, group: np.ndarray, episode: np.ndarray, position: np.ndarray, kind: str, *, gamma=1.0, gae_lambda=1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Labels y in [-1, 1] of M chunks, and which of them carry signal (M,) bool.

    success, group: (E,) outcome and initial state of each episode; episode, position: (M,) which episode a chunk belongs to, and
    its number in it. "binary": ±1 by the episode's success. "group": success compared with the share p of success among the
    episodes from the same initial state that were still running at this position, y = (success − p) / max(p, 1 − p), whose mean
    is zero. Where all of them succeed, or none does, the outcome tells nothing about the actions, and the chunks are dropped.
    "gae": the generalised advantage, with p as the value, in place of success − p, which it is for gamma = gae_lambda = 1; the
    quotient is clipped to [-1, 1].
    """
    y = success[episode].astype(float)  # (M,)
    if kind == "binary":
        return 2 * y - 1, np.ones(len(y), bool)
    _, peers = np.unique(np.stack([group[episode], position]), axis=1, return_inverse=True)  # (M,)
    p = (np.bincount(peers, weights=y) / np.bincount(peers))[peers]
    advantage = y - p
    if kind == "gae":
        order = np.lexsort((-position, episode))  # from each episode's last chunk to its first
        for i, later in zip(order, np.concatenate(([-1], order))):
            if later >= 0 and episode[later] == episode[i]:  # no reward between chunks: δ = γ·p′ − p
                advantage[i] = gamma * p[later] - p[i] + gamma * gae_lambda * advantage[later]
    return np.clip(advantage / np.maximum(p, 1 - p), -1, 1), (p > 0) & (p < 1)


def ema_decay(iteration: int, start: float, end: float, horizon: int) -> float:
    """α of θ_old ← α·θ_old + (1 − α)·θ: a cosine from `start` to `end` over `horizon` iterations."""
    return end + (start - end) * 0.5 * (1 + np.cos(np.pi * min(1.0, iteration / max(1, horizon))))


@torch.no_grad()
def update_rollout_policy(rollout_parameters, parameters, decay: float) -> None:
    """θ_old ← α·θ_old + (1 − α)·θ."""
    for old, new in zip(rollout_parameters, parameters, strict=True):
        old.lerp_(new, 1 - decay)


# ------------------------------------------------------------------------------------------------------------- the program


def check(args: Args) -> None:
    """Raise envs.EnvError, in one line, for arguments that cannot work."""
    for name in ("iterations", "num_envs", "rollout_epochs", "num_steps", "group_size", "update_epochs", "num_minibatches",
                 "eval_episodes", "final_eval_episodes", "save_every", "lora_rank"):  # fmt: skip
        if getattr(args, name) < 1:
            raise envs.EnvError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("execute", "rollout_steps", "eval_every", "warmup_iterations", "max_minutes", "tr_coef", "std_eps", "seed",
                 "eval_seed", "num_threads", "micro_batch"):  # fmt: skip
        if not getattr(args, name) >= 0:
            raise envs.EnvError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    for name in ("noise_level", "noise_end", "learning_rate", "beta", "max_drift", "max_grad_norm", "lora_alpha"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise envs.EnvError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("ema_start", "ema_end", "gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            raise envs.EnvError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {getattr(args, name)}")
    if args.device not in ("auto", "cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise envs.EnvError(f"--device must be auto, cpu, or cuda where PyTorch finds a GPU, got {args.device}")
    if args.num_envs % args.group_size:
        raise envs.EnvError(f"--num-envs {args.num_envs} must be a multiple of --group-size {args.group_size}")
    if args.labels != "binary" and args.group_size < 2:
        raise envs.EnvError(f"--labels {args.labels} compares episodes from one initial state: give --group-size of at least 2")
    if isinstance(args.transitions, int) and not 0 <= args.transitions < args.num_steps:
        raise envs.EnvError(f"--transitions {args.transitions} is no solver step: they go from 0 to {args.num_steps - 1}")
    if args.sampler == "ode" and (args.target == "xnext" or args.noise_end is not None):
        raise envs.EnvError("--sampler ode has no noise to learn from or to schedule: give --target x0 or mean, and no --noise-end")
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
        name = f"stepnft-pi05-{args.env_id.replace('/', '-')}-{args.obs_mode}-{args.seed}-{int(time.time())}"
        run = Path(args.resume or f"runs/{name}")

        # Seeds
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        rng = np.random.default_rng(args.seed)  # initial states of the training episodes
        torch.set_num_threads(args.num_threads or envs.num_cores())
        device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))

        # Policy θ and rollout policy θ_old; they share what is frozen
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
        rollout_policy = copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})
        parameters = [p for p in policy.parameters() if p.requires_grad]
        rollout_parameters = [p for p in rollout_policy.parameters() if p.requires_grad]
        fused = device.type == "cuda"  # no temporary copies
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # the authors'
        if args.compile:
            policy.velocity, rollout_policy.velocity = torch.compile(policy.velocity), torch.compile(rollout_policy.velocity)
        prefix_cache = args.prefix_cache or ("device" if args.train == "expert" else "off")
        H, A = policy.config.horizon, policy.config.action_dim
        execute = args.execute or policy.meta.get("execute", H)
        if execute > H:
            raise envs.EnvError(f"--execute {execute} is longer than the {H} actions that {checkpoint} predicts")
        K, std_eps = args.num_steps, 1.0 if args.sampler == "ode" else args.std_eps  # ode: the variance is 0 + 1
        mask = torch.ones(H, A, dtype=torch.bool, device=device)
        if args.mask_padding:
            mask[execute:] = False
            mask[:, len(policy.processor.action_stats.mean) :] = False

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
        adapters = {"policy": parameters, "rollout_policy": rollout_parameters} if lora else {}  # what checkpoints do not hold
        if args.resume:
            if not lora:
                policies.load_weights(rollout_policy, run / "rollout_policy" / "model.safetensors")
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

        def success_rate(which: policies.Pi05, episodes: int, label: str):
            """Success by the ODE on held-out seeds, the same ones and the same noise every time."""
            which.eval()
            generator = torch.Generator(device).manual_seed(0)
            return evaluate(venv, lambda obs, text: which.act(obs, text, K, generator), episodes, execute=execute,
                            seed=args.eval_seed, progress=label)  # fmt: skip

        def note(result) -> None:
            """Add an evaluation to the learning curve."""
            curve.append(dict(iteration=iteration, env_steps=env_steps, minutes=trained_s / 60, success=result.rate,
                              interval=result.interval, episodes=len(result.success)))  # fmt: skip
            writer.add_scalar("eval/success", result.rate, iteration)

        def save() -> None:
            policy.meta = rollout_policy.meta = policy.meta | {
                "execute": execute, "num_steps": K, "stepnft": {"iteration": iteration, "env_steps": env_steps, "seed": args.seed},
            }  # fmt: skip
            policies.save(policy, run / "policy")
            policies.save(rollout_policy, run / "rollout_policy")
            progress = dict(iteration=iteration, env_steps=env_steps, trained_s=trained_s, curve=curve)
            policies.save_training(run, optimizer, rng, progress, adapters)
            plot_curve(curve, run / "curve.png", f"{args.env_id} ({args.obs_mode}), seed {args.seed}")

        if not curve:
            before = success_rate(policy, args.final_eval_episodes, "evaluation before")
            note(before)
            print(f"before: {before}")
        start, trained_before_s = time.time() - trained_s, trained_s
        bar = tqdm(total=args.iterations, initial=iteration, desc="StepNFT", smoothing=0.1)
        while iteration < args.iterations and not 0 < 60 * args.max_minutes < trained_s - trained_before_s:
            # ------------------------------------------------------------------ rollout: explore with θ_old, remember transitions
            began = time.time()
            noise_ends = (args.noise_level, args.noise_level if args.noise_end is None else args.noise_end)
            noise_level = float(np.interp(iteration, (0, max(1, args.iterations - 1)), noise_ends)) * (args.sampler == "sde")
            chunks, success, lost, group = [], [], [], []
            stored = Rows(device if prefix_cache == "device" else "cpu")  # each chunk's prefix, or what it is made of
            rollout_policy.eval()
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
                        prefix = rollout_policy.encode_prefix(images, image_mask, tokens, token_mask)
                        xs, vs = flow_sde_sample(rollout_policy, prefix, state, num_steps=K, noise_level=noise_level)
                        stored.append(policies.Inputs(images, image_mask, tokens, token_mask) if prefix_cache == "off" else prefix)
                        chunks.append((state, xs, vs, epoch * args.num_envs + index, np.full(len(index), position)))
                        position += 1
                        actions = np.zeros((args.num_envs, execute, venv.action_dim), np.float32)
                        chunk = policy.processor.unnormalize_actions(xs[:, -1, :execute], obs["state"][index])
                        actions[index] = chunk.cpu().numpy()
                        obs, _, terminated, truncated, info = venv.step(actions)
                        env_steps += int(info["steps"].sum())
                        running &= ~(terminated | truncated)
                        gone |= info["lost"]
                    success.append(info["success"])
                    lost.append(gone)
                    group.append(epoch * args.num_envs + np.arange(args.num_envs) // args.group_size)
            rollout_s, rollout_gb = time.time() - began, memory_gb(device)

            # ------------------------------------------------------------------ labels
            success, lost, group = np.concatenate(success), np.concatenate(lost), np.concatenate(group)
            episode, position = (np.concatenate([c[i] for c in chunks]) for i in (3, 4))  # (M,) of each chunk
            group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode
            kwargs = dict(gamma=args.gamma, gae_lambda=args.gae_lambda)
            labels, keep = chunk_labels(success, group, episode, position, args.labels, **kwargs)
            keep &= ~lost[episode]
            used = torch.from_numpy(np.flatnonzero(keep)).to(device)
            b_labels = torch.from_numpy(labels).float().to(device)[used]
            b_state, b_x, b_v = (torch.cat([c[i] for c in chunks]).clone()[used] for i in (0, 1, 2))  # (M, K(+1), H, A)
            M = len(used)
            b_step = torch.arange(K, device=device).expand(M, K)  # (M, transitions per chunk)
            if args.transitions == "random":
                b_step = torch.randint(K, (M, 1), device=device)
            elif args.transitions != "all":
                b_step = b_step[:, args.transitions, None]
            del chunks

            # ------------------------------------------------------------------ update θ
            policy.train()
            sums, updates = {}, 0
            for param_group in optimizer.param_groups:
                param_group["lr"] = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
            for _ in range(args.update_epochs if M else 0):  # nothing to learn from where no group has contrast
                for minibatch in torch.randperm(M, device=device).chunk(args.num_minibatches):
                    optimizer.zero_grad()
                    for mb in minibatch.split(args.micro_batch or M):  # the loss is a mean over chunks, so are the gradients
                        share = len(mb) / len(minibatch)
                        prefix = stored[used[mb]].to(device)
                        if prefix_cache == "off":
                            prefix = policy.encode_prefix(*prefix)
                        step, row = b_step[mb], mb[:, None]  # (b, n): n transitions per chunk, which share its prefix
                        x_t, x_next, v_old = b_x[row, step], b_x[row, step + 1], b_v[row, step]  # (b, n, H, A)
                        v_theta = policy.velocity(prefix, b_state[mb], x_t, 1 - step / K).float()
                        transitions = (v_theta, v_old, x_t, x_next, b_x[row, K].expand_as(x_t), step, b_labels[row].expand_as(step))
                        v_theta, v_old, x_t, x_next, x_0, step, y = (x.flatten(0, 1) for x in transitions)  # (b · n, …)
                        if args.target == "x0":
                            x_next = x_0
                        elif args.target == "mean":
                            straight = (x_t - x_0) / (1 - step / K).view(-1, 1, 1)  # the velocity that leads to the executed chunk
                            x_next, _ = flow_sde_step(x_t, straight, step, num_steps=K, noise_level=noise_level)
                        loss, metrics = stepnft_loss(
                            v_theta, v_old, x_t, x_next, step, y, num_steps=K, noise_level=noise_level, beta=args.beta,
                            max_drift=args.max_drift, tr_coef=args.tr_coef, std_eps=std_eps, granularity=args.granularity,
                            loss=args.loss, target=args.target, mask=mask,
                        )  # fmt: skip
                        (share * loss).backward()
                        for name, value in {**metrics, "loss": loss.detach()}.items():
                            sums[name] = sums.get(name, 0.0) + share * value.item()
                    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    if not torch.isfinite(grad_norm):  # keep the weights that still work
                        raise envs.EnvError(f"the gradient is not finite at iteration {iteration}: lower --learning-rate; "
                                            f"the last checkpoint in {run} is intact")  # fmt: skip
                    optimizer.step()
                    updates += 1
                    sums["grad_norm"] = sums.get("grad_norm", 0.0) + grad_norm.item()

            # ------------------------------------------------------------------ update θ_old
            alpha = ema_decay(iteration, args.ema_start, args.ema_end, args.ema_horizon)
            update_rollout_policy(rollout_parameters, parameters, alpha)

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
                "charts/label_mean": b_labels.mean().item() if M else 0.0, "charts/ema_decay": alpha,
                "charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/noise_level": noise_level,
                **{f"losses/{name}": value / max(1, updates) for name, value in sums.items()},
            }.items():  # fmt: skip
                writer.add_scalar(name, value, iteration)
            bar.update()
            bar.set_postfix(success=f"{100 * success.mean():.0f}%", SPS=f"{steps_per_s:.0f}", refresh=False)
            if args.eval_every and iteration % args.eval_every == 0 and not last:
                result = success_rate(policy, args.eval_episodes, "evaluation")
                note(result)
                tqdm.write(f"iteration {iteration}, {env_steps} environment steps, {trained_s / 60:.1f} min: {result}")
                start = time.time() - trained_s  # evaluations do not count as training time
            if iteration % args.save_every == 0 or last:
                save()
        bar.close()

        # ---------------------------------------------------------------------- before → after
        after = success_rate(policy, args.final_eval_episodes, "evaluation of θ")
        after_old = success_rate(rollout_policy, args.final_eval_episodes, "evaluation of θ_old")
        note(after)
        save()
        if args.video:
            generator = torch.Generator(device).manual_seed(0)
            record(venv, lambda obs, text: policy.act(obs, text, K, generator), f"videos/{run.name}.mp4", execute=execute,
                   seed=args.eval_seed)  # fmt: skip
        venv.close()
        writer.add_scalar("eval/success_rollout_policy", after_old.rate, iteration)
        writer.close()
        outcome = ("success", "interval", "episodes")
        result = dict(
            command="python " + shlex.join(sys.argv), algorithm="stepnft_pi05", env_id=args.env_id, obs_mode=args.obs_mode,
            seed=args.seed, checkpoint=checkpoint, iterations=iteration, env_steps=env_steps, training_minutes=trained_s / 60,
            parameters_trained=sum(p.numel() for p in parameters), peak_memory_gb=peak_gb,
            forward_passes=K if args.transitions == "all" else 1,  # velocities of a chunk in one pass of the update
            before={k: curve[0][k] for k in outcome}, after={k: curve[-1][k] for k in outcome},
            after_rollout_policy=dict(success=after_old.rate, interval=after_old.interval, episodes=len(after_old.success)),
            versions=dict(torch=torch.__version__, python=sys.version.split()[0]), args=asdict(args), curve=curve,
        )  # fmt: skip
        (run / "result.json").write_text(json.dumps(result, indent=2))
        low, high = curve[0]["interval"]
        print(f"checkpoints, curve.png and result.json in {run}" + (f", video in videos/{run.name}.mp4" if args.video else ""))
        print(
            f"{args.env_id} ({args.obs_mode}): {100 * curve[0]['success']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] → {after} (θ; "
            f"rollout policy θ_old: {after_old}) after {env_steps} environment steps in {trained_s / 60:.1f} min of training"
        )
    except (envs.EnvError, policies.CheckpointError, OSError) as error:  # OSError: a full disk, a folder that is not ours
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with --resume and the run's folder under runs/")
