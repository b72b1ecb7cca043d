"""Does a long run need more and more memory? python benchmarks/flat_memory.py

Trains for many short iterations with evaluations and checkpoints, and reads what the program and its workers hold (resident, from
/proc: Linux alone) every few seconds. Writes the series and its medians to results/flat_memory.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import tyro

from pi_stepnft import harness

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "flat_memory.json"


@dataclass
class Args:
    algo: str = "stepnft_pi0"
    """algorithm file"""
    options: str = ("--env-id PickCube-v1 --num-envs 16 --rollout-epochs 1 --iterations 66 --max-minutes 0 --eval-every 18 "
                    "--eval-episodes 16 --final-eval-episodes 16 --save-every 6 --num-threads 1 --no-video")
    """of the program; all else is the default"""
    every: float = 1.0
    """seconds between two looks"""


def resident_mb(pid: int) -> float | None:
    """Memory that a process holds, MB; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return None


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def summary(series: list[float]) -> dict[str, float]:
    """Medians over the second and the last eighth of the iterations: the first eighth fills caches."""
    eighth = max(1, len(series) // 8)
    early, late = statistics.median(series[eighth : 2 * eighth]), statistics.median(series[-eighth:])
    return dict(early_mb=round(early, 1), late_mb=round(late, 1), peak_mb=round(max(series), 1))


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with open(log, "w") as file:
            command = [sys.executable, str(ROOT / "algos" / f"{args.algo}.py"), *args.options.split()]
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
        program, workers = [], []
        while process.poll() is None:
            time.sleep(args.every)
            held = [size for child in children(process.pid) if (size := resident_mb(child))]
            if held and b"before: " in log.read_bytes():  # it trains
                program.append(resident_mb(process.pid) or program[-1])
                workers.append(sum(held))
        if process.returncode:
            sys.exit(log.read_text()[-2000:])
    found = dict(program=summary(program), workers=summary(workers), looks=len(program))
    print(json.dumps(found))
    series = dict(program_mb=[round(size) for size in program], workers_mb=[round(size) for size in workers])
    OUT.write_text(json.dumps(dict(commit=harness.commit(), algo=args.algo, options=args.options, **found, **series)) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
