"""Arguments that all programs share, with their ranges beside them, and how a command line becomes them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from pi_stepnft import envs, policies

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

LIMITS = dict(greater_than="greater than {gt:.10g}", greater_than_equal="at least {ge:.10g}", less_than="less than {lt:.10g}",
              less_than_equal="at most {le:.10g}", finite_number="a finite number")
"""What pydantic's errors say of a number, in our words."""

FREE_ON_RESUME = "num_threads", "max_minutes", "iterations", "track", "video", "device"
"""What a run may change when it goes on; all else is part of what it computes."""


class RunError(RuntimeError):
    """An argument, a run or a checkpoint that cannot work, told in one line: what was given, what was expected, what to do."""


@dataclass
class TaskArgs:
    """Of every program that has to do with a task."""

    env_id: str = "PickCube-v1"
    """ManiSkill task, LIBERO suite or one of its tasks, or a task of your own as module:Task-v1"""
    obs_mode: Literal["rgb", "state"] = "rgb"
    """rgb: camera images, proprioception and goal; state: no camera, privileged object poses in the state"""
    env_options: tuple[str, ...] = ()
    """further options of the environment as name=value, e.g. control_mode=pd_joint_delta_pos robot=fetch (docs/environments.md)"""
    seed: Seed = 1
    """seed of everything random"""
    num_threads: CountOrZero = 0
    """torch threads; 0: one per core"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy computes; auto: cuda where there is one"""


@dataclass
class TrainArgs(TaskArgs):
    """Of every program that trains a policy to act."""

    track: bool = False
    """log to Weights & Biases too (offline without an account)"""
    video: bool = True
    """write videos/<run name>.mp4 at the end"""

    # memory and speed of large policies (docs/memory.md); none changes what is computed but for rounding
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of frozen weights and of the computation, with the published float32 parts; trained weights are float32"""
    lora_rank: Count = 16
    """rank of --train lora (openpi: 16 in the language model, 32 in the expert)"""
    lora_alpha: Positive = 16.0
    """its scale: the additions are (alpha / rank)·B·A (openpi: as the rank)"""
    micro_batch: CountOrZero = 0
    """rows per forward and backward pass, whose gradients add up to the minibatch's; 0: the whole minibatch at once"""
    gradient_checkpointing: bool = False
    """keep layer inputs only and compute the rest again in the backward pass"""


@dataclass
class RLArgs(TrainArgs):
    """Of every program that learns from rollouts."""

    checkpoint: str | None = None
    """policy to start from: a folder or a bundled name; default: the bundled one for the task and obs mode"""
    resume: str | None = None
    """run folder (runs/<name>) to go on with, under its own arguments; of these --iterations, --max-minutes, --num-threads,
    --device, --track and --video may be given anew"""
    iterations: Count | None = None
    """rollout + update rounds; default: 120 for π0, 200 for π0.5 (the method's authors: 400 LIBERO, 240 ManiSkill)"""
    max_minutes: PositiveOrZero = 24.0
    """stop training after so many minutes of this call even if iterations remain (--resume goes on); 0: no limit"""
    train: Literal["expert", "all", "lora"] = "expert"
    """expert: the VLM is frozen (the authors' choice); all: everything is trained; lora: low-rank additions to both transformers
    are, see policies/lora.py"""
    num_envs: Count = 64
    """environments side by side"""
    rollout_epochs: Count = 4
    """rounds of episodes per iteration: num_envs × rollout_epochs episodes (authors: 64 × 8 LIBERO, 128 × 10 ManiSkill)"""
    rollout_steps: CountOrZero = 32
    """steps after which a training episode is cut off and counts as failed; 0: the task's own limit, as in evaluations (authors'
    ManiSkill: 60, evaluation 80)"""
    execute: CountOrZero = 0
    """actions executed of each predicted chunk; 0: as in the checkpoint (authors: 5, LIBERO-long 10)"""
    num_steps: Count = 4
    """solver steps K (authors: 4)"""
    num_minibatches: Count = 8
    """minibatches per epoch: few and large, as Adam's full-size steps amplify gradient noise"""
    warmup_iterations: CountOrZero = 5
    """iterations of linear learning-rate warm-up"""
    max_grad_norm: Positive = 1.0
    """gradient clipping (authors: 1)"""
    prefix_cache: Literal["device", "cpu", "off"] | None = None
    """where a frozen VLM's prefixes wait for the update; off: their inputs wait in host memory and are encoded again in each
    minibatch. Default: device; off where the VLM is trained"""
    compile: bool = False
    """torch.compile for the velocity"""
    eval_every: CountOrZero = 10
    """iterations between evaluations on held-out seeds; 0: only before and after"""
    eval_episodes: Count = 128
    """episodes of an evaluation while training"""
    final_eval_episodes: Count = 512
    """episodes of the evaluations before and after"""
    eval_seed: Seed = envs.EVAL_SEED
    """first seed of the evaluation episodes; choose settings on others (envs.TUNING_SEED) than those you report on"""
    save_every: Count = 10
    """iterations between checkpoints"""
    save_minutes: Positive = 10.0
    """minutes after which a checkpoint is written in any case"""
    keep: Count = 2
    """checkpoints to keep, the newest ones: where the last is damaged, --resume goes back to the one before"""


A = TypeVar("A")


def option(name: str) -> str:
    """A field's name as it is given: num_envs → --num-envs."""
    return f"--{name.replace('_', '-')}"


def check(args: Any) -> None:
    """Raise RunError, in one line, for an argument out of its range or that does not go with another."""
    try:
        TypeAdapter(type(args)).validate_python(asdict(args))
    except ValidationError as error:
        first = error.errors()[0]
        limit = LIMITS.get(first["type"], first["msg"].removeprefix("Input should be ")).format(**first.get("ctx", {}))
        raise RunError(f"{option(str(first['loc'][0]))} must be {limit}, got {first['input']}") from None
    env_options(getattr(args, "env_options", None) or ())
    if getattr(args, "track", False) and importlib.util.find_spec("wandb") is None:
        raise RunError("--track needs Weights & Biases: pip install wandb")
    if getattr(args, "train", "all") != "expert" and getattr(args, "prefix_cache", None) in ("device", "cpu"):
        raise RunError(f"--prefix-cache {args.prefix_cache} needs a frozen VLM, --train {args.train} changes it: leave "
                       "--prefix-cache out, or add --train expert")
    group_size = getattr(args, "group_size", 1)
    if getattr(args, "num_envs", group_size) % group_size:
        raise RunError(f"--num-envs {args.num_envs} must be a multiple of --group-size {group_size}")
    episodes = max(getattr(args, name, 0) for name in ("episodes", "eval_episodes", "final_eval_episodes"))
    if getattr(args, "eval_seed", 0) + episodes > 2**32:
        raise RunError(f"--eval-seed {args.eval_seed} leaves no {episodes} seeds below 2^32")


def env_options(texts: Iterable[str]) -> dict[str, Any]:
    """--env-options as keyword arguments of `envs.make`; a value is JSON where it can be read as that, otherwise text."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise RunError(f"--env-options takes name=value, got {text!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def parse(Args: type[A], description: str, presets: dict[str, dict] | None = None) -> A:
    """The command line as `Args`. With --resume, the run's own arguments, but for FREE_ON_RESUME where they are given.

    presets: sets of defaults, which --paper NAME chooses from; what is given beside it counts all the same.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no θ gets a question mark, not a traceback
            stream.reconfigure(errors="replace")
    default = None
    if presets:
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--paper")
        default = replace(Args(), **presets.get(early.parse_known_args()[0].paper, {}))
    args = expanded(tyro.cli(Args, description=description, **(dict(default=default) if presets else {})))
    return resumed(args) if getattr(args, "resume", None) else args


def expanded(args: A) -> A:
    """The arguments with ~ at the beginning of a path as the home folder, which a shell leaves in --name=~/path."""
    home = lambda value: os.path.expanduser(value) if isinstance(value, str) else value
    values = {field.name: getattr(args, field.name) for field in fields(args)}
    values = {name: tuple(map(home, value)) if isinstance(value, tuple) else home(value) for name, value in values.items()}
    return replace(args, **values)


def resumed(given: A) -> A:
    """The arguments of the run that --resume names. Raises RunError for options that are given and cannot be followed."""
    folder = Path(given.resume)
    if not (folder / "args.json").is_file():
        for parent in list(folder.parents)[:3]:
            if (parent / "args.json").is_file():
                raise RunError(f"--resume {folder}: the run's folder is {parent}")
    stored = policies.read_json(folder / "args.json")
    names = {field.name for field in fields(type(given))}
    if not isinstance(stored, dict) or (unknown := sorted(set(stored) - names)):
        what = f"unknown {', '.join(unknown)}" if isinstance(stored, dict) else "it holds no arguments"
        raise RunError(f"{folder}/args.json is not of this program and version: {what}")
    args = type(given)(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
    now = {name: getattr(given, name) for name in names - {"resume"} if option(name) in flags()}
    if fixed := sorted(option(name) for name in now if name not in FREE_ON_RESUME and now[name] != getattr(args, name)):
        raise RunError(f"--resume goes on under the run's own arguments, which have another {', '.join(fixed)}: leave it out, or "
                       f"start a new run with --checkpoint {folder}/policy")
    return replace(args, **{name: now[name] for name in FREE_ON_RESUME if name in now}, resume=given.resume)


def flags() -> set[str]:
    """The options on the command line, --no-video as --video."""
    return {word.split("=")[0].replace("--no-", "--").replace("_", "-") for word in sys.argv[1:] if word.startswith("--")}
