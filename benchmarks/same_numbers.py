"""Does a checkpoint give the same episodes on another machine? python benchmarks/same_numbers.py

Evaluates the bundled π0 checkpoints by algos/evaluate.py on the same seeds, compares every episode's outcome and number of steps
with those that benchmarks/results/same_numbers.json has of other machines, with their versions, and adds this machine's to it.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import tyro

from pi_stepnft import harness

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "same_numbers.json"


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ("pi0-tiny-pickcube-state", "pi0-tiny-pickcube-rgb")
    """bundled checkpoints"""
    episodes: int = 128
    """episodes of each, with the seeds of every evaluation"""
    num_threads: int = 2
    """torch threads: sums are rounded differently with another number"""


def play(checkpoint: str, episodes: int, num_threads: int) -> dict:
    """All that evaluate.py tells about these episodes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "algos/evaluate.py", checkpoint, "--suites", "id", "--episodes", str(episodes), "--no-video",
                   "--num-threads", str(num_threads), "--device", "cpu", "--output", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        results = json.loads((Path(folder) / "results.json").read_text())
        with open(Path(folder) / "outcomes.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    return dict(
        checkpoint=checkpoint, sha256=results["checkpoints"][0]["sha256"], episodes=episodes, seed=int(rows[0]["seed"]),
        num_threads=num_threads, commit=results["commit"], noise="by episode", versions=results["versions"],
        success=[int(row["success"]) for row in rows],
        steps=[int(row["steps"]) for row in rows],
    )


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    known = json.loads(OUT.read_text()) if OUT.exists() else []
    here = harness.machine()["processor"]
    for checkpoint in args.checkpoints:
        new = dict(processor=here) | play(checkpoint, args.episodes, args.num_threads)
        print(f"{checkpoint}: {sum(new['success'])} of {args.episodes} succeed on {here}")
        same_setting = [
            old for old in known  # those of 0.1.0 have another noise, and say nothing of it
            if all(old.get(key) == new[key] for key in ("checkpoint", "sha256", "episodes", "seed", "num_threads", "noise"))
        ]
        for old in same_setting:
            outcomes = sum(a != b for a, b in zip(old["success"], new["success"]))
            steps = sum(a != b for a, b in zip(old["steps"], new["steps"]))
            versions = "same versions" if old["versions"] == new["versions"] else f"versions there: {old['versions']}"
            print(f"  {outcomes} outcomes and {steps} numbers of steps differ from those on {old['processor']} ({versions})")
        if new not in known:
            known.append(new)
    OUT.write_text(json.dumps(known) + "\n")
