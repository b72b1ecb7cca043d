"""Arguments that all programs share, with their ranges beside them, and how a command line becomes them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from pi_stepnft import envs, policies
from pi_stepnft.envs.base import did_you_mean, explain
from pi_stepnft.harness import ranks

Count = Annotated[int, Field(ge=1, le=10**6)]
"""Of what comes one after the other: a million take weeks."""
CountOrZero = Annotated[int, Field(ge=0, le=10**6)]
Size = Annotated[int, Field(ge=1, le=1024)]
"""Of what is built, or goes into each step: with a few digits too many it would build for minutes, then be out of memory."""
SizeOrZero = Annotated[int, Field(ge=0, le=1024)]
Batch = Annotated[int, Field(ge=1, le=8192)]
"""Of environments side by side, or rows of a batch: a GPU takes thousands."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]

FREE_ON_RESUME = "num_threads", "max_minutes", "iterations", "output", "track", "video", "device", "step_timeout", "fsdp"
"""What a run may change when it goes on; all else is part of what it computes."""


class RunError(RuntimeError):
    """An argument, a run or a checkpoint that cannot work, told in one line: what was given, what was expected, what to do."""


@dataclass
class TaskArgs:
    """Of every program that has to do with a task."""

    env_id: Text = "PickCube-v1"
    """ManiSkill task, LIBERO suite or one of its tasks, or a task of your own as module:Task-v1"""
    obs_mode: Literal["rgb", "state"] = "rgb"
    """rgb: camera images, proprioception and goal; state: no camera, privileged object poses in the state"""
    env_options: tuple[str, ...] = ()
    """further options of the environment as name=value, e.g. control_mode=pd_joint_delta_pos robot=fetch (docs/environments.md)"""
    seed: Seed = 1
    """seed of everything random"""
    num_threads: SizeOrZero = 0
    """torch threads of each process; 0: one per core"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy computes; auto: cuda where there is one"""
    step_timeout: Seconds = 300.0
    """seconds for which a simulator's process may be silent before it is taken for hung and replaced"""


@dataclass
class RunArgs(TaskArgs):
    """Of every training: it can be left alone, and gone on with."""

    resume: Text | None = None
    """run folder (runs/<name>) to go on with, under its own arguments; of these --iterations, --max-minutes, --num-threads,
    --device, --step-timeout, --fsdp, --output, --track and --video may be given anew, where there are such"""
    track: bool = False
    """log to Weights & Biases too (offline without an account)"""
    save_every: Count = 10
    """iterations between checkpoints"""
    save_minutes: Positive = 10.0
    """minutes after which a checkpoint is written in any case"""
    keep: Count = 2
    """checkpoints to keep, the newest ones: where the last is damaged, --resume goes back to the one before"""
    max_grad_norm: Positive = 1.0
    """gradient clipping (authors: 1)"""
    max_bad_updates: Count = 20
    """updates in a row that are left out, as their gradient is no finite number, before the run stops"""


@dataclass
class TrainArgs(RunArgs):
    """Of every program that trains a policy to act."""

    video: bool = True
    """write videos/<run name>.mp4 at the end"""

    # memory and speed of large policies (docs/memory.md); none changes what is computed but for rounding
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of frozen weights and of the computation, with the published float32 parts; trained weights are float32"""
    lora_rank: Size = 16
    """rank of --train lora (openpi: 16 in the language model, 32 in the expert)"""
    lora_alpha: Positive = 16.0
    """its scale: the additions are (alpha / rank)·B·A (openpi: as the rank)"""
    micro_batch: CountOrZero = 0
    """rows per forward and backward pass, whose gradients add up to the minibatch's; 0: the whole minibatch at once"""
    fsdp: bool = False
    """divide weights, gradients and moments of --train all among the processes that torchrun starts (FSDP2, docs/scaling.md)"""
    gradient_checkpointing: bool = False
    """keep layer inputs only and compute the rest again in the backward pass"""


@dataclass
class RLArgs(TrainArgs):
    """Of every program that learns from rollouts."""

    checkpoint: Text | None = None
    """policy to start from: a folder or a bundled name; default: the bundled one for the task and obs mode"""
    iterations: Count | None = None
    """rollout + update rounds; default: 120 for π0, 200 for π0.5 (the method's authors: 400 LIBERO, 240 ManiSkill)"""
    max_minutes: PositiveOrZero = 24.0
    """stop training after so many minutes of this call even if iterations remain (--resume goes on); 0: no limit"""
    train: Literal["expert", "all", "lora"] = "expert"
    """expert: the VLM is frozen (the authors' choice); all: everything is trained; lora: low-rank additions to both transformers
    are, see policies/lora.py"""
    num_envs: Batch = 64
    """environments side by side, of all processes together"""
    rollout_epochs: Count = 4
    """rounds of episodes per iteration: num_envs × rollout_epochs episodes (authors: 64 × 8 LIBERO, 128 × 10 ManiSkill)"""
    rollout_steps: CountOrZero | None = None
    """steps, in whole chunks, after which a training episode is cut off and counts as failed; 0: the task's own limit, as in
    evaluations (authors' ManiSkill: 60, evaluation 80). Default: 0.64 of that limit, 32 of 50"""
    overlap: bool = False
    """simulate one half of the environments while the policy acts for the other; pays where the policy has a GPU of its own"""
    execute: SizeOrZero = 0
    """actions executed of each predicted chunk; 0: as in the checkpoint (authors: 5, LIBERO-long 10)"""
    num_steps: Size = 4
    """solver steps K (authors: 4)"""
    num_minibatches: Count = 8
    """minibatches per epoch: few and large, as Adam's full-size steps amplify gradient noise"""
    warmup_iterations: CountOrZero = 5
    """iterations of linear learning-rate warm-up"""
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


A = TypeVar("A")


def option(name: str) -> str:
    """A field's name as it is given: num_envs → --num-envs."""
    return f"--{name.replace('_', '-')}"


def check(args: Any) -> None:
    """Raise RunError, in one line, for an argument out of its range or that does not go with another."""
    typed(type(args), json.dumps(asdict(args)), option)
    env_options(getattr(args, "env_options", None) or ())
    if getattr(args, "track", False) and importlib.util.find_spec("wandb") is None:
        raise RunError("--track needs Weights & Biases: pip install wandb")
    if getattr(args, "train", "all") != "expert" and getattr(args, "prefix_cache", None) in ("device", "cpu"):
        raise RunError(f"--prefix-cache {args.prefix_cache} needs a frozen VLM, --train {args.train} changes it: leave "
                       "--prefix-cache out, or add --train expert")
    group_size, N = getattr(args, "group_size", 1), ranks.SIZE
    if N > 1 and not hasattr(args, "fsdp"):
        raise RunError(f"this program runs as one process, not {N}: start it without torchrun")
    if getattr(args, "num_envs", 0) % (group_size * N):
        each = f"{N} (processes) × " * (N > 1)
        raise RunError(f"--num-envs {args.num_envs} must be a multiple of {each}--group-size {group_size}")
    if getattr(args, "fsdp", False) and (N == 1 or args.train != "all"):
        raise RunError("--fsdp divides what is trained among several processes: start them by torchrun, with --train all")
    if getattr(args, "fsdp", False) and getattr(args, "compile", False):
        raise RunError("--fsdp does not go with --compile: leave one out")
    episodes = max(getattr(args, name, 0) for name in ("episodes", "eval_episodes", "final_eval_episodes"))
    if getattr(args, "eval_seed", 0) + episodes > 2**32 - 10**5:  # the tasks of a suite count from each other's thousands on
        raise RunError(f"--eval-seed {args.eval_seed} leaves too few seeds below 2^32 for {episodes} episodes")
    output = Path(getattr(args, "output", None) or "runs")
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RunError(f"nothing can be written to {output}: {there} is {'not yours' if there.is_dir() else 'a file'}")


def typed(kind: type[A], text: str, name: Callable[[str], str] = str, depth: int = 1) -> A:
    """What a JSON text holds, as an object of a declared type, with nothing converted. Raises RunError, in one line, for a value of
    another type or out of its range. name, depth: how that is told, as of `envs.base.explain`."""
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise RunError(explain(error, name, depth)) from None


def env_options(texts: Iterable[str], fixed: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """--env-options as keyword arguments of `envs.make`; a value is JSON where it can be read as that, otherwise text.

    fixed: those that the program decides itself. Raises RunError for one of them.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise RunError(f"--env-options takes name=value, got {text!r}")
        if name in fixed:
            raise RunError(f"--env-options {text}: {name} is {fixed[name]!r} here, by the program's other options or the policy")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def parse(Args: type[A], description: str, presets: dict[str, dict] | None = None) -> A:
    """The command line as `Args`. With --resume, the run's own arguments, but for FREE_ON_RESUME where they are given.

    presets: sets of defaults, which --paper NAME chooses from; what is given beside it counts all the same.
    A mistake ends the program with one line and, as shells expect of a wrong command line, status 2.
    """
    ranks.mute()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no θ gets a question mark, not a traceback
            stream.reconfigure(errors="replace")
    options = {}
    if presets:
        options["default"] = replace(Args(), **presets.get("".join(given().get("--paper", ())), {}))
    told = io.StringIO()
    try:
        if odd := [word for word in sys.argv[1:] if not word.isprintable()]:
            raise RunError(f"{odd[0]!r} holds characters that cannot be printed")
        with contextlib.redirect_stderr(told):
            args = tyro.cli(Args, description=description, args=[*switched(Args)], **options)
        args = expanded(args)
        if getattr(args, "resume", None) is not None:
            args = resumed(args)
        check(args)
        return args
    except (RunError, policies.CheckpointError) as error:
        mistake = error
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        mistake = misread(Args, told.getvalue())
    ranks.tell(f"error: {mistake}")
    sys.exit(2)


def given() -> dict[str, list[str]]:
    """The words behind each option of the command line, and under "" those before all."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for word in sys.argv[1:]:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            found[name] = [value] if equals else []
        else:
            found[name].append(word)
    return found


def switched(Args: type) -> Iterator[str]:
    """The words of the command line; of an option that is on, off or left to the program, --x is --x=True and --no-x --x=False."""
    hints = get_type_hints(Args)
    undecided = {option(name) for name, hint in hints.items() if hint == bool | None}
    for word in sys.argv[1:]:
        name = word.replace("_", "-").replace("--no-", "--", 1)
        yield f"{name}={not word.startswith('--no')}" if name in undecided else word


def misread(Args: type, told: str) -> str:
    """What is wrong with the words of the command line, in one line. told: what tyro says, in a box of some lines."""
    hints = get_type_hints(Args, include_extras=True)
    known = {option(name): hint for name, hint in hints.items()}
    known |= {alias: hint for hint in hints.values() for extra in get_args(hint) for alias in getattr(extra, "aliases", None) or ()}
    known |= {option(f"no_{name}"): hint for name, hint in hints.items() if hint in (bool, bool | None)}
    for name, words in given().items():
        if name and name not in known:
            return f"unknown option {name}{did_you_mean(name, known) or '; --help lists all'}"
        hint = known.get(name, Any)
        several = any(get_origin(part) in (list, tuple) for part in (hint, *get_args(hint)))
        if hint in (bool, bool | None) and words:
            return f"{name} takes no value, got {words[0]!r}"
        if hint in (Any, bool, bool | None):
            continue
        try:
            TypeAdapter(hint).validate_python(words if several else words[0] if words else ())
        except ValidationError as error:
            mistake = explain(error, lambda _, name=name: name, depth=0)
            return mistake if words else mistake.replace("got ()", "and nothing is given")
        if len(words) > 1 and not several:
            return f"{name} takes one value, got {' '.join(words)}"
    lines = [text for line in told.splitlines() if (text := line.strip(" ─-│╭╮╰╯"))]
    return f"{lines[1] if len(lines) > 1 else told}; --help lists all options"  # after the box's title


def expanded(args: A) -> A:
    """The arguments with ~ at the beginning of a path as the home folder, which a shell leaves in --name=~/path."""
    home = lambda value: os.path.expanduser(value) if isinstance(value, str) else value
    values = {field.name: getattr(args, field.name) for field in fields(args)}
    values = {name: tuple(map(home, value)) if isinstance(value, tuple) else home(value) for name, value in values.items()}
    return replace(args, **values)


def resumed(now: A) -> A:
    """The arguments of the run that --resume names. Raises RunError for options that are given and cannot be followed."""
    folder = Path(now.resume)
    if not (folder / "args.json").is_file():
        for parent in list(folder.parents)[:3]:
            if (parent / "args.json").is_file():
                raise RunError(f"--resume {folder}: the run's folder is {parent}")
    stored = policies.read_json(folder / "args.json")
    names = {field.name for field in fields(type(now))}
    for what, odd in (("unknown", set(stored) - names), ("no", names - set(stored))):
        if odd:
            raise RunError(f"{folder}/args.json is not of this program and version: {what} {', '.join(sorted(odd))}")
    args = typed(type(now), json.dumps(stored), lambda name: f"{folder}/args.json: {name}")
    chosen = {name: getattr(now, name) for name in names - {"resume"} if {option(name), option(f"no_{name}")} & set(given())}
    if fixed := sorted(option(name) for name in chosen if name not in FREE_ON_RESUME and chosen[name] != getattr(args, name)):
        start = "".join(f" with {option(name)} {folder}/policy" for name in ("checkpoint", "base") if name in names)
        raise RunError(f"--resume goes on under the run's own arguments, which have another {', '.join(fixed)}: leave it out, or "
                       f"start a new run{start}")
    return replace(args, **{name: chosen[name] for name in FREE_ON_RESUME if name in chosen}, resume=now.resume)
