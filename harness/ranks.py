"""The processes, one per GPU, that train one policy together: `torchrun --nproc-per-node N algos/stepnft_pi0.py …` starts them.

Each plays its share of the episodes in environments of its own; gradients are added up, statistics gathered. Rank 0 tells of all
and writes the files. Without torchrun there is one process, rank 0 of 1, and nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from pi_stepnft.policies.weights import is_divided

RANK, SIZE, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items())
TIMEOUT = datetime.timedelta(hours=2)
"""How long the others wait for a rank, whose simulators may have to start anew."""
T = TypeVar("T")
advice = ""
"""How to go on where the processes end too early."""
_peers: list[tuple[str, int]] = []


def mute() -> None:
    """What all ranks would print alike, rank 0 prints."""
    if RANK:
        sys.stdout = open(os.devnull, "w")


def choose_gpu() -> None:
    """Each process sees one GPU of its machine, as would one that is alone; before CUDA starts."""
    if SIZE > 1:
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = known.split(",") if known else [str(i) for i in range(LOCAL_RANK + 1)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[LOCAL_RANK] if LOCAL_RANK < len(names) else ""


@cache
def store() -> distributed.Store:
    """What all ranks read and write."""
    return next(distributed.rendezvous("env://"))[0]


def start(device: torch.device) -> None:
    """Connect the processes, which compute on devices of this kind."""
    if SIZE > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store(), rank=RANK, world_size=SIZE, timeout=TIMEOUT)
        atexit.register(distributed.destroy_process_group)
        _peers.extend(gather((socket.gethostname(), os.getpid())))


def tell(message: str) -> None:
    """Print why the program ends. Of several ranks the first one does, whatever the others then have to tell."""
    first = True
    if SIZE > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which ends all where one ends
        with contextlib.suppress(RuntimeError):  # torchrun is gone
            first = store().add("told", 1) == 1
    if first:
        for bar in list(getattr(tqdm, "_instances", ())):  # on a line of its own
            bar.close()
        print(message, file=sys.stderr)


def others_are_gone() -> bool:
    """Whether a process of this training on this machine is no more."""
    return SIZE > 1 and any(not Path("/proc", str(pid)).exists() for host, pid in _peers if host == socket.gethostname())


def is_gone(error: Exception) -> bool:
    """Whether this is how it shows that another process is no more."""
    return SIZE > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error) or others_are_gone())


def gone() -> str:
    return "; ".join(filter(None, [f"one of the {SIZE} processes has ended, and with it all of them", advice]))


def seed(*numbers: int) -> int:
    """For a random generator of this rank's."""
    return int(np.random.SeedSequence((*numbers, RANK)).generate_state(1, np.uint64)[0])


def share(num_envs: int) -> dict[str, Any]:
    """Which of so many environments are this rank's, for `envs.make`."""
    own = num_envs // SIZE
    return dict(num_envs=own, among=(own * RANK, num_envs))


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    values: list[Any] = [value] * SIZE
    if SIZE > 1:
        distributed.all_gather_object(values, value)
    return values


def collect(value: T) -> list[T]:
    """The values of all ranks, in their order, in rank 0; nothing in the others."""
    values: list[Any] = [value] * (SIZE if RANK == 0 else 0)
    if SIZE > 1:
        distributed.gather_object(value, values or None)
    return values


def first(function: Callable[[], T]) -> T:
    """What a function returns in rank 0, which alone calls it."""
    return gather(function() if RANK == 0 else None)[0]


def total(array: np.ndarray) -> np.ndarray:
    """The sum over all ranks of arrays of one shape."""
    if SIZE == 1:
        return array
    tensor = torch.from_numpy(array.astype(np.uint8 if array.dtype == bool else array.dtype))
    distributed.all_reduce(tensor)
    return tensor.numpy().astype(array.dtype)


def mean(values: np.ndarray | Tensor) -> float:
    """The mean of all values that the ranks have; nan where none has any."""
    values = torch.as_tensor(values)
    sums, counts = zip(*gather((values.double().sum().item(), values.numel())))
    return sum(sums) / sum(counts) if sum(counts) else float("nan")


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Give all ranks the sum of their gradients: each has a part of the loss, which is a mean over the rows of all of them."""
    if SIZE == 1:
        return
    for parameter in (parameters := list(parameters)):
        if is_divided(parameter) and parameter.grad is not None:
            parameter.grad.mul_(SIZE)  # FSDP2 has taken the mean
    parameters = [parameter for parameter in parameters if not is_divided(parameter)]
    if parameters:
        has = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(part.flatten() for part in parts), has])
        distributed.all_reduce(flat)
        *parts, has = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, part, used in zip(parameters, parts, has.tolist()):
            parameter.grad = part.view_as(parameter) if used else None


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients so that their norm is at most `limit`; returns what it was."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(is_divided(parameter) for parameter in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    local = lambda gradient: gradient.to_local() if is_divided(gradient) else gradient
    square = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:  # of what every rank has whole, each counts a share
        share = 1 if is_divided(parameter) else 1 / SIZE
        square += share * local(parameter.grad).square().sum()
    distributed.all_reduce(square)
    norm = square.sqrt()
    for parameter in parameters:
        local(parameter.grad).mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
