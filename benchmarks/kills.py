"""Does a run that is interrupted again and again end as the one that never was? python benchmarks/kills.py

Trains each algorithm once in peace, and once with interruptions of every kind, after each of which it goes on with --resume: killed
(SIGKILL) at random moments and at single file operations of its saves, a disk that is full after a random number of bytes (a tmpfs,
for which one has to be root), SIGTERM, Ctrl-C. At the end all tensors of both (weights, moments, rng) and evaluations are
compared. Writes results/kills.json.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import torch
import tyro
from safetensors.torch import load_file

from pi_stepnft import harness
from pi_stepnft.harness import checkpoints

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import os, runpy, signal, sys
program, number, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], left = program, int(number)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

def hook(event, arguments):
    global left
    if event in OPERATIONS and "/checkpoints/" in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

OPERATIONS = "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink"
if left:
    sys.addaudithook(hook)
runpy.run_path(program, run_name="__main__")
"""
"""Runs a program whose number-th file operation in its checkpoints is its last; 0: none is."""


@dataclass
class Args:
    algos: tuple[str, ...] = ("stepnft_pi0", "ppo")
    """algorithm files"""
    moments: int = 10
    """SIGKILLs at random moments"""
    operations: int = 6
    """SIGKILLs at a random one of a save's file operations"""
    full: int = 2
    """full disks"""
    signals: int = 1
    """of SIGTERM and of SIGINT (Ctrl-C) each"""
    options: str = ("--obs-mode state --num-envs 32 --rollout-epochs 1 --iterations 16 --save-every 1 --eval-every 5 "
                    "--eval-episodes 32 --final-eval-episodes 64 --num-threads 1 --no-video")
    """of the programs; all else is the default"""
    seed: int = 1
    """of the interruptions"""
    output: Path = ROOT / "benchmarks" / "results" / "kills.json"
    """file of the results"""


def start(algo: str, folder: Path, options: list[str], number: int = 0) -> subprocess.Popen:
    program = [str(ROOT / "algos" / f"{algo}.py"), str(number)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *program, *options], cwd=folder, stdout=log, stderr=log)


def run_folder(folder: Path) -> Path | None:
    """The run that was begun there, once it has a checkpoint."""
    return next((path.parents[1] for path in folder.glob("runs/*/checkpoints/last")), None)


def resize(folder: Path, size: int = 10**9) -> None:
    """Give the disk that the runs of this folder lie on a size in bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder / "runs")], check=True)


def used(folder: Path) -> int:
    """Bytes that the files below a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def interrupt(algo: str, folder: Path, options: list[str], kind: str, draw: random.Random, iteration_s: float) -> int | None:
    """Start the program or go on with it, and interrupt it; its status, None where it came to its end before."""
    run = run_folder(folder)
    number = draw.randint(1, 60) if kind == "operation" else 0
    if kind == "full disk":
        checkpoint = used((run / "checkpoints" / "last").resolve()) if run else 2e7
        resize(folder, used(folder / "runs") + int(checkpoint * draw.random()))
    process = start(algo, folder, ["--resume", str(run)] if run else options, number)
    if kind not in ("operation", "full disk"):
        log, bar = folder / "log.txt", f"{algo.split('_')[0].upper()}:".encode()
        begun = log.stat().st_size
        while process.poll() is None and bar not in log.read_bytes()[begun:]:
            time.sleep(0.1)  # until there is something to interrupt
        time.sleep(draw.uniform(0, 1.5 * iteration_s))
        process.send_signal({"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(kind, signal.SIGKILL))
    status = process.wait()
    if kind == "full disk":
        resize(folder)
    return status or None


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list, dict]:
    """All tensors of a run's last checkpoint, its evaluations or validation loss, and what became of its episodes."""
    run = run_folder(folder)
    last = (run / "checkpoints" / "last").resolve()
    files = {path.relative_to(last): load_file(path) for path in last.rglob("*.safetensors")}
    tensors = {f"{file}: {name}": value for file, held in files.items() for name, value in held.items()}
    result = json.loads((run / "result.json").read_text())
    measured = [(point["iteration"], point["env_steps"], point["success"]) for point in result.get("curve", [])]
    return tensors, measured or [result.get("val_flow")], result


def main(args: Args) -> None:
    found = {}
    for algo in args.algos:
        draw = random.Random(args.seed)
        options = ["--env-id", "PickCube-v1", *args.options.split()]
        peace, war = (Path(tempfile.mkdtemp(prefix=f"{algo}-{name}-")) for name in ("peace", "war"))
        if args.full:
            (war / "runs").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(war / "runs")], check=True)
        if start(algo, peace, options).wait():
            sys.exit((peace / "log.txt").read_text()[-2000:])
        tensors, curve, result = outcome(peace)
        iteration_s = 60 * result["training_minutes"] / result["iterations"]

        kinds = ["moment"] * args.moments + ["operation"] * args.operations + ["full disk"] * args.full
        kinds += ["SIGTERM", "SIGINT"] * args.signals
        draw.shuffle(kinds)
        happened: dict[str, int] = dict.fromkeys(kinds, 0)
        statuses: dict[str, set[int]] = {kind: set() for kind in kinds}
        for kind in kinds:
            status = interrupt(algo, war, options, kind, draw, iteration_s)
            if status is None:
                break
            happened[kind] += 1
            statuses[kind].add(status)
            print(f"{algo}: {kind}, status {status}; {sum(happened.values())} interruptions", flush=True)
        while (run := run_folder(war)) is None or not (run / "result.json").is_file():
            if start(algo, war, ["--resume", str(run)] if run else options).wait():
                sys.exit((war / "log.txt").read_text()[-2000:])
        again, curve_again, _ = outcome(war)
        different = [name for name in tensors.keys() | again.keys()
                     if name not in tensors or name not in again or not torch.equal(tensors[name], again[name])]
        whole = [checkpoints.newest(run_folder(folder)).name for folder in (peace, war)]
        found[algo] = dict(
            interruptions=happened, statuses={kind: sorted(values) for kind, values in statuses.items()}, tensors=len(tensors),
            different=len(different), same_evaluations=curve == curve_again, last=whole, iteration_s=round(iteration_s, 1),
            left_over=[path.name for path in run_folder(war).rglob(".*")],
        )
        print(json.dumps(found[algo]), flush=True)
        if args.full:
            subprocess.run(["umount", "-l", str(war / "runs")], check=True)
        for folder in (peace, war):
            shutil.rmtree(folder)
    args.output.write_text(json.dumps(dict(commit=harness.commit(), options=args.options, runs=found), indent=2) + "\n")
    if any(run["different"] or not run["same_evaluations"] for run in found.values()):
        sys.exit("an interrupted run ended otherwise")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
