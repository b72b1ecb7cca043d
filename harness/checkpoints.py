"""Checkpoints of a run: each is whole or not there, and says what it holds.

    runs/<name>/checkpoints/000020/             policy/, …, training.safetensors, training.json, manifest.json
    runs/<name>/checkpoints/last -> 000020      renamed when all else is on the disk
    runs/<name>/policy -> checkpoints/last/policy

A checkpoint is written to a folder of another name, flushed to the disk with its digests, and renamed; only then the pointer moves,
and older checkpoints go. So a run that is killed, or finds the disk full, at whatever moment, has the checkpoint before or the new
one. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pi_stepnft import policies
from pi_stepnft.harness import ranks
from pi_stepnft.harness.args import Count, CountOrZero, PositiveOrZero, RunError, Share, typed
from pi_stepnft.policies import CheckpointError, lora
from pi_stepnft.policies.weights import divided, whole

FOLDER, POINTER, MANIFEST = "checkpoints", "last", "manifest.json"
Steps = Annotated[int, Field(ge=0)]


@dataclass
class Point:
    """Of a learning curve."""

    __pydantic_config__ = dict(extra="forbid")
    iteration: CountOrZero
    env_steps: Steps
    minutes: PositiveOrZero
    success: Share
    interval: tuple[Share, Share]
    episodes: Count


@dataclass
class Lost:
    __pydantic_config__ = dict(extra="forbid")
    rollouts: Steps
    evaluations: Steps
    broken: Steps


@dataclass(kw_only=True)
class Progress:
    """Attributes of a training that go with its checkpoints."""

    __pydantic_config__ = dict(extra="forbid")
    iteration: CountOrZero
    trained_s: PositiveOrZero
    bad_updates: Steps
    peak_gb: PositiveOrZero = 0.0  # checkpoints of 0.1.0 have none


@dataclass(kw_only=True)
class RLProgress(Progress):
    env_steps: Steps
    curve: list[Point]
    lost: Lost


@dataclass
class State:
    """What training.json holds."""

    __pydantic_config__ = dict(extra="forbid")
    numpy_rng: dict[str, Any]
    progress: RLProgress | Progress


def save(
    folder: Path,
    trained: dict[str, policies.Pi0],
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    progress: dict,
    unsaved: dict[str, list[torch.Tensor]],
    memory: Iterable[list[torch.Tensor]] = (),
    keep: int = 2,
) -> None:
    """Write a checkpoint of the run in `folder` and remove all but the newest `keep`.

    trained: policies by name; optimizer and rng: whose states go with them; progress: plain JSON, with "iteration"; unsaved: named
    lists of tensors that no policy's checkpoint holds, such as a LoRA run's adapters; memory: lists of tensors, however many, that
    later iterations learn from, each with as many rows. Rank 0 writes what all ranks have.
    Raises CheckpointError, and leaves the checkpoints that are there, if it cannot be written or a weight is not finite.
    """
    if ranks.RANK:  # it contributes
        for policy in trained.values():
            deque(lora.merged(policy), maxlen=0)
        deque(_tensors(optimizer, unsaved, memory), maxlen=0)
        return
    parent = folder / FOLDER
    name = f"{progress['iteration']:06d}"
    if saved := [path.name for path in _all(parent) if path.name.rstrip("+") == name]:  # once more, with an evaluation
        name = max(saved) + "+"
    part = parent / f".{name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for title, policy in trained.items():
            policies.save(policy, part / title)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(optimizer, unsaved, memory)}
        save_file(tensors, part / "training.safetensors")
        state = {"numpy_rng": rng.bit_generator.state, "progress": progress}
        (part / "training.json").write_text(json.dumps(state, indent=2))
        files = sorted(path for path in part.rglob("*") if path.is_file())
        digests = {path.relative_to(part).as_posix(): digest(path) for path in files}
        (part / MANIFEST).write_text(json.dumps({"iteration": progress["iteration"], "sha256": digests}, indent=2))
        for path in [*part.rglob("*"), part]:
            flush(path)
        os.rename(part, parent / name)
        flush(parent)
        link(parent / POINTER, name)
        for title in trained:
            link(folder / title, f"{FOLDER}/{POINTER}/{title}")
        flush(folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"checkpoint {name} not saved to {parent}: {error}; the one before it is intact") from None
    passed_over = [path for path in _all(parent) if path.name > name]  # damaged: the run went back and has come here anew
    older = [path for path in _all(parent) if path.name < name]
    for old in [*passed_over, *older[keep - 1 :], *parent.glob(".*.part")]:
        removed = old if old.name.startswith(".") else old.with_name(f".{old.name}.part")
        with contextlib.suppress(OSError):  # what cannot be removed costs room only
            os.rename(old, removed)
            shutil.rmtree(removed, ignore_errors=True)


def newest(folder: Path) -> Path:
    """The newest whole checkpoint of the run in `folder`. Damaged ones are passed over, with a line for each.

    Raises CheckpointError where there is none.
    """
    parent, damage = folder / FOLDER, "there is none"
    for path in _all(parent):
        damage = _damage(path)
        if damage is None:
            return path
        print(f"{path} is damaged ({damage}): going back to the checkpoint before it")
    raise CheckpointError(f"{folder} holds no checkpoint to go on with: {damage}")


def restore(
    path: Path,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    unsaved: dict[str, list[torch.Tensor]],
) -> tuple[dict, list[list[torch.Tensor]]]:
    """Give optimizer, rng and the `unsaved` tensors the states of a checkpoint; returns its progress and, of its memory, this
    rank's rows, on the CPU: some of them are there by choice.

    The policies are loaded by `policies.load`. Raises CheckpointError where the checkpoint is that of another training.
    """
    stored = policies.read_json(path / "training.json")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        tensors = load_file(policies.inside(path, "training.safetensors", path))
        for title, targets in unsaved.items():
            for index, target in enumerate(targets):
                value = tensors.pop(f"trained.{title}.{index}")
                if value.shape != target.shape:
                    raise ValueError(f"{title} {index} has shape {tuple(value.shape)} instead of {tuple(target.shape)}")
                target.data.copy_(value)
        memory: list[list[torch.Tensor]] = []
        while f"memory.{len(memory)}.0" in tensors:
            place = f"memory.{len(memory)}."
            names = sorted((key for key in tensors if key.startswith(place)), key=lambda key: int(key.removeprefix(place)))
            memory.append([tensors.pop(name).tensor_split(ranks.SIZE)[ranks.RANK] for name in names])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            _, index, kind = key.split(".")
            if value.dim() and value.shape != (shape := parameters[int(index)].shape):
                raise ValueError(f"{key} has shape {tuple(value.shape)} instead of {tuple(shape)}")
            state.setdefault(int(index), {})[kind] = divided(value, parameters[int(index)])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        rng.bit_generator.state = stored["numpy_rng"]
        return stored["progress"], memory
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        reason = f"there is no {error}" if isinstance(error, LookupError) else error
        raise CheckpointError(f"{path} holds no training state to go on with: {reason}") from None


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def flush(path: Path) -> None:
    """What a file or folder holds is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(path: Path, target: str) -> None:
    """A symbolic link at `path`, in place of an older one at once."""
    temporary = path.with_name(f".{path.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if path.is_dir() and not path.is_symlink():  # the run was copied, and what its links point to with it
        shutil.rmtree(path)
    os.replace(temporary, path)


def _tensors(
    optimizer: torch.optim.Optimizer, unsaved: dict[str, list[torch.Tensor]], memory: Iterable[list[torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a training under the names that `restore` knows. All ranks have to ask for them; rank 0 gets them."""
    for index, state in optimizer.state_dict()["state"].items():
        for kind, value in state.items():
            yield f"optimizer.{index}.{kind}", whole(value)
    for title, values in unsaved.items():
        for index, value in enumerate(values):
            yield f"trained.{title}.{index}", value
    entries = list(memory)
    for place, age in enumerate(range(max(ranks.gather(len(entries))), 0, -1)):
        own = [tensor.cpu() for tensor in entries[-age]] if age <= len(entries) else []
        for index, parts in enumerate(zip(*filter(None, ranks.collect(own)))):
            yield f"memory.{place}.{index}", parts[0] if len(parts) == 1 else torch.cat(parts)


def _all(parent: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    return sorted((path for path in parent.glob("[0-9]*") if path.is_dir()), reverse=True) if parent.is_dir() else []


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None where they are as they were written."""
    try:
        files = policies.read_json(path / MANIFEST)["sha256"]
        if changed := [name for name, known in files.items() if digest(policies.inside(path, name, path / MANIFEST)) != known]:
            return f"{', '.join(changed)} changed since it was written"
        state = typed(State, policies.inside(path, "training.json", path).read_text(), "training.json: ".__add__, depth=4)
        np.random.PCG64().state = state.numpy_rng
    except (OSError, RunError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return str(error) or type(error).__name__
    return None
