"""Seconds and memory to load a full-size π0 and π0.5 from a file in openpi's layout, and to get one observation's actions.

    python benchmarks/load_full_size.py                 # about 7 GB of disk and 12 GB of memory, one policy at a time
    python benchmarks/load_full_size.py --types pi0 --num-steps 4

Writes a file of random bfloat16 weights with the published names and sizes, drops it from the page cache, loads it with
`policies.load` in a process of its own, and deletes it. Peak memory is that process's resident set, its imports included.
Prints a Markdown table and writes a JSON file.
"""

import json
import multiprocessing as mp
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from pi_stepnft import policies
from pi_stepnft.policies.checkpoint import TYPES
from pi_stepnft.policies.weights import EXPERT, published_name

TINY_TOKENIZER = policies.processor.TINY_TOKENIZER  # PaliGemma's is not ours to ship; the length of the prompt is the same


@dataclass
class Args:
    types: list[str] = field(default_factory=lambda: ["pi0", "pi05"])
    """policies to measure"""
    folder: Path = Path(tempfile.gettempdir())
    """where the files are written for a while"""
    cameras: int = 2
    """images per observation, as in LIBERO"""
    num_steps: int = 10
    """solver steps per chunk of actions"""
    out: Path = Path(__file__).parent / "results" / "load_full_size.json"
    """JSON file of the result"""


def write(kind: str, folder: Path) -> None:
    """A checkpoint in openpi's layout: random weights, statistics of a 7-dimensional arm."""
    model, config_class = TYPES[kind]
    with torch.device("meta"):
        policy = model(config_class())
    c = policy.config
    shapes = {published_name(name): tensor.shape for name, tensor in policy.state_dict().items()}
    shapes[f"{EXPERT}lm_head.weight"] = (c.vocab_size, c.expert_width)
    torch.manual_seed(0)
    # Fan-in scaled, so that actions stay finite; one block of random numbers repeated, because drawing 3 B takes minutes.
    block = torch.randn(1 << 20).to(torch.bfloat16)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16)
        scaled = block * 0.5 * shape[-1] ** -0.5
        for part in tensors[name].view(-1).split(len(block)):
            part.copy_(scaled[: len(part)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stats = {name: dict(mean=[0.0] * n, std=[1.0] * n, q01=[-1.0] * n, q99=[1.0] * n) for name, n in (("state", 8), ("actions", 7))}
    (folder / "assets" / "benchmark").mkdir(parents=True)
    (folder / "assets" / "benchmark" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    with open(folder / "model.safetensors", "rb+") as file:  # what follows reads the disk, not the page cache
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(folder: Path, args: Args) -> dict:
    """Load a checkpoint and act on one observation; seconds, processor seconds and peak memory of both."""
    result = {"file_bytes": (folder / "model.safetensors").stat().st_size, "import_peak_bytes": peak_memory()}
    began, cpu = time.perf_counter(), time.process_time()
    policy = policies.load(folder, dtype=torch.bfloat16, tokenizer=TINY_TOKENIZER, num_cameras=args.cameras)
    result |= {"load_s": time.perf_counter() - began, "load_cpu_s": time.process_time() - cpu, "load_peak_bytes": peak_memory()}
    result["parameters"] = sum(parameter.numel() for parameter in policy.parameters())
    result["peak_per_file"] = result["load_peak_bytes"] / result["file_bytes"]
    images = np.random.default_rng(0).integers(0, 256, (1, args.cameras, 256, 256, 3), dtype=np.uint8)
    began, cpu = time.perf_counter(), time.process_time()
    actions = policy.act({"image": images, "state": np.zeros((1, 8), np.float32)}, ["pick up the bowl"], args.num_steps)
    result |= {"act_s": time.perf_counter() - began, "act_cpu_s": time.process_time() - cpu, "act_peak_bytes": peak_memory()}
    result |= {"actions_shape": list(actions.shape), "actions_finite": bool(np.isfinite(actions).all())}
    return result


def main(args: Args) -> None:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    report = dict(
        cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(), packages=packages,
        cameras=args.cameras, num_steps=args.num_steps, results={},
    )
    print("| policy | parameters | file | load, s (of a core) | peak memory | peak / file | actions, s (of a core) |")
    print("|---|---|---|---|---|---|---|", flush=True)
    context = mp.get_context("spawn")
    for kind in args.types:
        if shutil.disk_usage(args.folder).free < 10e9:
            sys.exit(f"error: {args.folder} has less than 10 GB free; give another --folder")
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            with context.Pool(1) as pool:
                pool.apply(write, (kind, folder))
            with context.Pool(1) as pool:
                r = report["results"][kind] = pool.apply(measure, (folder, args))
        print(
            f"| {kind} | {r['parameters'] / 1e9:.3f} B | {r['file_bytes'] / 1e9:.2f} GB "
            f"| {r['load_s']:.1f} ({r['load_cpu_s']:.1f}) | {r['load_peak_bytes'] / 1e9:.2f} GB | {r['peak_per_file']:.2f} "
            f"| {r['act_s']:.1f} ({r['act_cpu_s']:.1f}) |",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except policies.CheckpointError as error:
        sys.exit(f"error: {error}")
