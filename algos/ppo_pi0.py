# Docs: docs/ppo.md. Online RL for π0 with a critic and a likelihood: python algos/ppo_pi0.py --env-id PickCube-v1
"""PPO as in πRL (arXiv 2510.25889) for π0: one noisy solver step per action chunk among ODE steps, its Gaussian likelihood in a
clipped ratio, generalised advantages over chunks from a value head on the expert's features."""

from __future__ import annotations

import atexit
import json
import math
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
import tyro
from torch import nn
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
    iterations: int = 120
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
    """steps after which a training episode is cut off; 0: the task's own limit, as in evaluations (authors' ManiSkill: 80)"""
    num_steps: int = 4
    """solver steps K (authors: 4)"""
    noise: Literal["sde", "learned"] = "sde"
    """sde: Flow-SDE, one random solver step of a chunk is noisy; learned: Flow-Noise, all are, by a noise network"""
    noise_level: float = 1.0
    """sde: a of σ_t = a·sqrt(t / (1 − t)), the exploration noise of the one step (authors: 0.5)"""
    noise_min: float = 0.08
    """learned: least standard deviation of a solver step (πRL: between 0.08 and 0.16)"""
    noise_max: float = 0.16
    """learned: its greatest"""
    gamma: float = 0.99
    """discount per chunk (authors: 0.99)"""
    gae_lambda: float = 0.95
    """λ of the generalised advantages, per chunk (authors: 0.95)"""
    bootstrap: bool = True
    """where an episode is cut off, count its last observation's value as what would follow; False: nothing, as after a failure"""
    normalize_advantages: bool = True
    """to mean 0 and deviation 1 over an iteration's chunks (authors: True)"""

    # update
    update_epochs: int = 2
    """passes over each iteration's chunks (authors, with larger batches: 4)"""
    num_minibatches: int = 8
    """minibatches per epoch: few and large, as Adam's full-size steps amplify gradient noise"""
    learning_rate: float = 3e-5
    """Adam's for the policy (authors: 5e-6 LIBERO, 7.9e-6 ManiSkill, at 3 B parameters)"""
    value_learning_rate: float = 1e-3
    """Adam's for the value head (authors: 1e-4 LIBERO, 1.6e-4 ManiSkill)"""
    critic_warmup: int = 2
    """first iterations in which only the value head is updated"""
    warmup_iterations: int = 5
    """iterations of linear warm-up of the policy's learning rate, after those"""
    max_grad_norm: float = 1.0
    """gradient clipping, of the policy and of the value head each (authors: 1)"""
    clip: float = 0.2
    """ε, how far the ratio may move from 1 with gradient (authors: 0.2)"""
    value_clip: float = 0.2
    """how far a value may move from its rollout's with gradient (authors: 0.2)"""
    detach_critic: bool = True
    """keep the value loss from training the policy's own weights (authors: True)"""
    entropy_coef: float = 0.0
    """learned: weight of the entropy bonus, a mean over action entries and solver steps (authors: 0.005)"""

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


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU in between; the last one begins at zero."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.GELU())][:-1]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class ValueHead(nn.Module):
    """V from the mean of the expert's features over the action positions; πRL's widths 1024, 512, 256, 128, 1, in proportion."""

    def __init__(self, width: int):
        super().__init__()
        self.net = mlp(width, width // 2, width // 4, width // 8, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features (B, H, width) -> values (B,)"""
        return self.net(features.mean(1)).squeeze(-1)


class NoiseHead(nn.Module):
    """Flow-Noise: the standard deviation of every entry of a solver step, between two bounds."""

    def __init__(self, width: int, action_dim: int, low: float, high: float):
        super().__init__()
        self.low, self.ratio = low, high / low
        self.net = mlp(width, width // 2, action_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The expert's features (..., H, width) -> std (..., H, A); in the middle of the (logarithmic) range at first"""
        return self.low * self.ratio ** self.net(features).sigmoid()


def actor_critic(
    policy: policies.Pi0,
    value_head: ValueHead,
    noise_head: NoiseHead | None,
    prefix: policies.Prefix,
    state: torch.Tensor,
    x_t: torch.Tensor,
    step: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
    detach_critic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward pass at n solver steps per chunk, in the rollout and in the update alike.

    x_t: (B, n, H, A); step: (B, n) int. Returns the velocity (B, n, H, A), mean and standard deviation of x_next, and values (B,),
    read at the first of the steps: its x_t was there before any noise that the likelihood counts, so as a baseline the value
    leaves the policy gradient unbiased.
    """
    features = policy.features(prefix, state, x_t, 1 - step / num_steps)  # (B, n, H, W)
    v = policy.action_out_proj(features).float()
    if noise_head is None:
        mean, std = flow_sde_step(*(x.flatten(0, 1) for x in (x_t, v, step)), num_steps=num_steps, noise_level=noise_level)
        mean, std = mean.view_as(v), std.view(*step.shape, 1, 1)
    else:
        mean, std = x_t - v / num_steps, noise_head(features)
    first = features[:, 0]
    value = value_head(first.detach() if detach_critic else first)
    return v, mean, std, value


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Gaussian log density of the executed entries, summed over a chunk's noisy steps: (B, n, H, A), mask (H, A) -> (B,)."""
    density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return (density * mask).sum((1, 2, 3))


def flow_sde_sample(
    policy: policies.Pi0,
    value_head: ValueHead,
    noise_head: NoiseHead | None,
    prefix: policies.Prefix,
    state: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_steps: int,
    noise_level: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Explore: sample action chunks by the ODE, but for one random noisy step each; with a noise head all steps are noisy.

    mask: (H, A) bool, the executed entries, whose likelihood it is. Returns the path x (B, K + 1, H, A), whose last entry is the
    action chunk, the noisy steps (B, n), and log-probability and value (B,) of each chunk.
    """
    B, K, device = len(state), num_steps, state.device
    step = torch.randint(K, (B, 1), device=device) if noise_head is None else torch.arange(K, device=device).expand(B, K)
    x = torch.randn(B, 1, policy.config.horizon, policy.config.action_dim, device=device)
    xs, log_probs, values = [x], torch.zeros(B, device=device), torch.zeros(B, device=device)
    for i in range(K):
        now = torch.full((B, 1), i, device=device)
        v, mean, std, value = actor_critic(
            policy, value_head, noise_head, prefix, state, x, now, num_steps=K, noise_level=noise_level
        )
        noisy = (step == i).any(1)  # (B,)
        x = torch.where(noisy.view(-1, 1, 1, 1), mean + std * torch.randn_like(mean), x - v / K)
        log_probs += noisy * log_prob(x, mean, std, mask)
        values = torch.where(step[:, 0] == i, value, values)
        xs.append(x)
    return torch.cat(xs, 1), step, log_probs, values


def gae(
    rewards: np.ndarray, values: np.ndarray, valid: np.ndarray, terminated: np.ndarray, last_values: np.ndarray,
    *, gamma: float, gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Generalised advantages and returns (E, P) of E episodes of up to P chunks.

    rewards, values: (E, P) of each chunk; valid: (E, P) bool, True for the chunks an episode has, its first ones. terminated: (E,)
    bool, whether nothing follows; where an episode was cut off instead, last_values (E,) is the value of its last observation.
    """
    following, advantage, advantages = np.where(terminated, 0.0, last_values), np.zeros(len(rewards)), np.zeros(rewards.shape)
    for p in reversed(range(rewards.shape[1])):
        delta = rewards[:, p] + gamma * following - values[:, p]
        advantage = np.where(valid[:, p], delta + gamma * gae_lambda * advantage, 0.0)
        following = np.where(valid[:, p], values[:, p], following)
        advantages[:, p] = advantage
    return advantages, advantages + values


def ppo_loss(
    new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate −min(r·A, clamp(r, 1 − ε, 1 + ε)·A), mean over chunks, with r = exp(new − old) (arXiv 1707.06347).

    new, old: (B,) log-probabilities; advantages: (B,). Returns the scalar loss and metrics: approx_kl (mean r − 1 − log r),
    clip_fraction (share of ratios beyond the clip), ratio_deviation (mean |r − 1|).
    """
    ratio = (new - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    with torch.no_grad():
        deviation = (ratio - 1).abs()
        metrics = dict(
            policy=loss.detach(),
            approx_kl=(ratio - 1 - (new - old)).mean(),
            clip_fraction=(deviation > clip).float().mean(),
            ratio_deviation=deviation.mean(),
        )
    return loss, metrics


def value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, *, clip: float) -> torch.Tensor:
    """½·max of the squared errors of the value and of the value held within ±clip of the rollout's, mean over chunks; all (B,)."""
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.max((new - returns) ** 2, (clipped - returns) ** 2).mean()


# ------------------------------------------------------------------------------------------------------------- the program


def check(args: Args) -> None:
    """Raise envs.EnvError, in one line, for arguments that cannot work."""
    for name in ("iterations", "num_envs", "rollout_epochs", "num_steps", "update_epochs", "num_minibatches",
                 "eval_episodes", "final_eval_episodes", "save_every", "lora_rank"):  # fmt: skip
        if getattr(args, name) < 1:
            raise envs.EnvError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("execute", "rollout_steps", "eval_every", "critic_warmup", "warmup_iterations", "max_minutes", "entropy_coef",
                 "seed", "eval_seed", "num_threads", "micro_batch"):  # fmt: skip
        if not getattr(args, name) >= 0:
            raise envs.EnvError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    for name in ("noise_level", "noise_min", "learning_rate", "value_learning_rate", "clip", "value_clip", "max_grad_norm",
                 "lora_alpha"):  # fmt: skip
        if not getattr(args, name) > 0:
            raise envs.EnvError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            raise envs.EnvError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {getattr(args, name)}")
    if args.device not in ("auto", "cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise envs.EnvError(f"--device must be auto, cpu, or cuda where PyTorch finds a GPU, got {args.device}")
    if not args.noise_min <= args.noise_max:
        raise envs.EnvError(f"--noise-max {args.noise_max} must not be less than --noise-min {args.noise_min}")
    if args.noise == "sde" and args.entropy_coef:
        raise envs.EnvError("--entropy-coef has nothing to raise where the noise is given: add --noise learned")
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
        checkpoint = args.checkpoint or f"pi0-tiny-{args.env_id.split('-')[0].lower()}-{args.obs_mode}"
        if not args.checkpoint and checkpoint not in policies.bundled():
            envs.check(args.env_id)
            raise envs.EnvError(
                f"no bundled checkpoint for {args.env_id} in {args.obs_mode} mode; make one with: python algos/sft_pi0.py "
                f"--env-id {args.env_id} --obs-mode {args.obs_mode} --output runs/sft, then add --checkpoint runs/sft"
            )
        run = Path(args.resume or f"runs/ppo-{args.env_id.replace('/', '-')}-{args.obs_mode}-{args.seed}-{int(time.time())}")

        # Seeds
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        rng = np.random.default_rng(args.seed)  # initial states of the training episodes
        torch.set_num_threads(args.num_threads or envs.num_cores())
        device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))

        # Policy, value head and, for Flow-Noise, noise network
        lora = args.train == "lora"
        source = run / "policy" if args.resume and not lora else checkpoint  # saved policies have their adapters merged
        policy = policies.load(source, device, getattr(torch, args.dtype), expect="pi0", trained=None if lora else args.train)
        trained_on = policy.meta.get("obs_mode", args.obs_mode)
        if trained_on != args.obs_mode:
            raise envs.EnvError(f"{checkpoint} acts in {trained_on} mode: add --obs-mode {trained_on}, or another --checkpoint")
        if args.train == "expert":
            policy.freeze_vlm()
        elif lora:
            policies.add_lora(policy, args.lora_rank, args.lora_alpha)
        policy.checkpoint_gradients(args.gradient_checkpointing)
        c, noise_head = policy.config, None
        value_head = ValueHead(c.expert_width).to(device)
        if args.noise == "learned":
            noise_head = NoiseHead(c.expert_width, c.action_dim, args.noise_min, args.noise_max).to(device)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        heads = dict(value_head=list(value_head.parameters()), noise_head=list(noise_head.parameters()) if noise_head else [])
        actor, critic = parameters + heads["noise_head"], heads["value_head"]
        fused = device.type == "cuda"  # no temporary copies
        groups = [dict(params=actor), dict(params=critic, lr=args.value_learning_rate)]
        optimizer = torch.optim.Adam(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=fused)  # as StepNFT's
        if args.compile:
            policy.features = torch.compile(policy.features)
        prefix_cache = args.prefix_cache or ("device" if args.train == "expert" else "off")
        H, A = policy.config.horizon, policy.config.action_dim
        execute = args.execute or policy.meta.get("execute", H)
        if execute > H:
            raise envs.EnvError(f"--execute {execute} is longer than the {H} actions that {checkpoint} predicts")
        K = args.num_steps
        mask = torch.zeros(H, A, dtype=torch.bool, device=device)  # the executed part of a chunk
        mask[:execute, : len(policy.processor.action_stats.mean)] = True
        solver = dict(num_steps=K, noise_level=args.noise_level)

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
        unsaved = heads | ({"policy": parameters} if lora else {})  # what checkpoints do not hold
        if args.resume:
            progress = policies.load_training(run, optimizer, rng, unsaved)
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

        def explore(obs: dict[str, np.ndarray], index: np.ndarray):
            """What the environments `index` might do next: the policy's inputs and prefix, the state, and a sample of chunks."""
            *inputs, state = policy.processor({k: v[index] for k, v in obs.items()}, [venv.instructions[i] for i in index])
            prefix = policy.encode_prefix(*inputs)
            return inputs, prefix, state, *flow_sde_sample(policy, value_head, noise_head, prefix, state, mask, **solver)

        def note(result) -> None:
            """Add an evaluation to the learning curve."""
            curve.append(dict(iteration=iteration, env_steps=env_steps, minutes=trained_s / 60, success=result.rate,
                              interval=result.interval, episodes=len(result.success)))  # fmt: skip
            writer.add_scalar("eval/success", result.rate, iteration)

        def save() -> None:
            policy.meta = policy.meta | {
                "execute": execute, "num_steps": K, "ppo": {"iteration": iteration, "env_steps": env_steps, "seed": args.seed},
            }  # fmt: skip
            policies.save(policy, run / "policy")
            progress = dict(iteration=iteration, env_steps=env_steps, trained_s=trained_s, curve=curve)
            policies.save_training(run, optimizer, rng, progress, unsaved)
            plot_curve(curve, run / "curve.png", f"{args.env_id} ({args.obs_mode}), seed {args.seed}")

        if not curve:
            before = success_rate(args.final_eval_episodes, "evaluation before")
            note(before)
            print(f"before: {before}")
        start, trained_before_s = time.time() - trained_s, trained_s
        bar = tqdm(total=args.iterations, initial=iteration, desc="PPO", smoothing=0.1)
        while iteration < args.iterations and not 0 < 60 * args.max_minutes < trained_s - trained_before_s:
            # ------------------------------------------------------------------ rollout: one noisy solver step per chunk
            began = time.time()
            chunks, success, lost, ended, last_values = [], [], [], [], []
            stored = Rows(device if prefix_cache == "device" else "cpu")  # each chunk's prefix, or what it is made of
            policy.eval()
            with torch.inference_mode():
                for epoch in range(args.rollout_epochs):
                    obs, _ = venv.reset(seed=rng.integers(envs.TRAIN_SEEDS, size=args.num_envs))
                    running, gone, done = (np.full(args.num_envs, x) for x in (True, False, False))
                    last_value, position = np.zeros(args.num_envs), 0
                    while running.any() and not 0 < args.rollout_steps <= position * execute:
                        index = np.flatnonzero(running)
                        inputs, prefix, state, xs, step, log_probs, values = explore(obs, index)
                        stored.append(policies.Inputs(*inputs) if prefix_cache == "off" else prefix)
                        actions = np.zeros((args.num_envs, execute, venv.action_dim), np.float32)
                        chunk = policy.processor.unnormalize_actions(xs[:, -1, :execute], obs["state"][index])
                        actions[index] = chunk.cpu().numpy()
                        obs, reward, terminated, truncated, info = venv.step(actions)
                        row = epoch * args.num_envs + index
                        chunks.append((state, xs, step, log_probs, values, row, np.full(len(index), position), reward[index]))
                        position += 1
                        env_steps += int(info["steps"].sum())
                        done |= running & terminated
                        running &= ~(terminated | truncated)
                        gone |= info["lost"]
                    index = np.flatnonzero(~done & ~gone)  # cut off
                    if args.bootstrap and len(index):
                        *_, values = explore(obs, index)
                        last_value[index] = values.cpu().numpy()
                    success.append(info["success"])
                    lost.append(gone)
                    ended.append(done)
                    last_values.append(last_value)
            rollout_s, rollout_gb = time.time() - began, memory_gb(device)

            # ------------------------------------------------------------------ advantages
            success, lost, ended, last_values = (np.concatenate(x) for x in (success, lost, ended, last_values))  # (E,)
            episode, position, reward = (np.concatenate([c[i] for c in chunks]) for i in (5, 6, 7))  # (M,) of each chunk
            values = torch.cat([c[4] for c in chunks]).cpu().numpy()
            table = np.zeros((3, len(success), position.max() + 1))  # (E, P) each: rewards, values, and where there is a chunk
            table[:, episode, position] = reward, values, np.ones(len(values))
            kwargs = dict(gamma=args.gamma, gae_lambda=args.gae_lambda)
            advantages, returns = (x[episode, position] for x in gae(*table[:2], table[2] > 0, ended, last_values, **kwargs))
            keep = ~lost[episode]
            used = torch.from_numpy(np.flatnonzero(keep)).to(device)
            b_values, b_advantages, b_returns = (torch.tensor(x[keep]).float().to(device) for x in (values, advantages, returns))
            b_state, b_x, b_step, b_log_probs = (torch.cat([c[i] for c in chunks]).clone()[used] for i in range(4))
            if args.normalize_advantages:
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std(correction=0) + 1e-8)
            M = len(used)
            del chunks

            # ------------------------------------------------------------------ update
            policy.train()
            sums, updates = {}, 0
            warming = iteration < args.critic_warmup
            ramp = (iteration + 1 - args.critic_warmup) / max(1, args.warmup_iterations)
            optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, max(0.0, ramp))
            for _ in range(args.update_epochs if M else 0):
                for minibatch in torch.randperm(M, device=device).chunk(args.num_minibatches):
                    optimizer.zero_grad()
                    for mb in minibatch.split(args.micro_batch or M):  # the loss is a mean over chunks, so are the gradients
                        share = len(mb) / len(minibatch)
                        prefix = stored[used[mb]].to(device)
                        if prefix_cache == "off":
                            prefix = policy.encode_prefix(*prefix)
                        step, row = b_step[mb], mb[:, None]  # (b, n): n noisy steps per chunk, which share its prefix
                        x_t, x_next = b_x[row, step], b_x[row, step + 1]  # (b, n, H, A)
                        _, mean, std, new_values = actor_critic(
                            policy, value_head, noise_head, prefix, b_state[mb], x_t, step,
                            detach_critic=args.detach_critic or warming, **solver,
                        )  # fmt: skip
                        new_log_probs = log_prob(x_next, mean, std, mask)
                        loss, metrics = ppo_loss(new_log_probs, b_log_probs[mb], b_advantages[mb], clip=args.clip)
                        if args.noise == "learned":
                            log_std = std.log()[:, :, mask].mean()
                            loss = loss - args.entropy_coef * log_std  # a Gaussian's entropy, but for a constant
                            metrics["noise_std"] = log_std.detach().exp()
                        critic_loss = value_loss(new_values, b_values[mb], b_returns[mb], clip=args.value_clip)
                        (share * (critic_loss if warming else loss + critic_loss)).backward()
                        for name, value in {**metrics, "value": critic_loss.detach()}.items():
                            sums[name] = sums.get(name, 0.0) + share * value.item()
                    norms = dict(grad_norm=torch.nn.utils.clip_grad_norm_(actor, args.max_grad_norm),
                                 value_grad_norm=torch.nn.utils.clip_grad_norm_(critic, args.max_grad_norm))  # fmt: skip
                    if not torch.isfinite(sum(norms.values())):  # keep the weights that still work
                        raise envs.EnvError(f"the gradient is not finite at iteration {iteration}: lower --learning-rate; "
                                            f"the last checkpoint in {run} is intact")  # fmt: skip
                    optimizer.step()
                    updates += 1
                    for name, value in norms.items():
                        sums[name] = sums.get(name, 0.0) + value.item()

            # ------------------------------------------------------------------ log, evaluate, save
            iteration += 1
            last = iteration == args.iterations
            trained_s = time.time() - start
            steps_per_s = env_steps / trained_s
            update_gb = memory_gb(device)
            peak_gb = max(peak_gb, rollout_gb, update_gb)
            for name, value in {
                "charts/rollout_success": success[~lost].mean(), "charts/SPS": steps_per_s, "charts/env_steps": env_steps,
                "charts/rollout_s": rollout_s, "charts/update_s": time.time() - began - rollout_s,
                "charts/memory_rollout_gb": rollout_gb, "charts/memory_update_gb": update_gb,
                "charts/value_mean": b_values.mean().item(), "charts/return_mean": b_returns.mean().item(),
                "charts/explained_variance": 1 - ((b_returns - b_values).var() / b_returns.var().clamp(min=1e-8)).item(),
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
            command="python " + shlex.join(sys.argv), algorithm="ppo_pi0", env_id=args.env_id, obs_mode=args.obs_mode,
            seed=args.seed, checkpoint=checkpoint, iterations=iteration, env_steps=env_steps, training_minutes=trained_s / 60,
            parameters_trained=sum(p.numel() for p in actor + critic), peak_memory_gb=peak_gb,
            forward_passes=K if args.noise == "learned" else 1,  # velocities of a chunk in one pass of the update
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
