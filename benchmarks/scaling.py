"""How much faster do two ranks play than one, a core each? python benchmarks/scaling.py

Environments are what takes the time: π-StepNFT on PickCube-v1 in state mode with the shipped policy. One rank on one core and two
ranks on one core each train for a few iterations, in turn, with the same options; the environment steps per second of rollouts are
read from their logs, but for the first iteration's. Writes all and the ratio of the medians to results/scaling.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_stepnft import harness

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "scaling.json"
OPTIONS = ("--env-id PickCube-v1 --obs-mode state --num-envs 128 --rollout-epochs 1 --max-minutes 0 --eval-every 0 "
           "--final-eval-episodes 2 --num-threads 1 --no-video --env-options num_workers=0")


@dataclass
class Args:
    iterations: int = 5
    """of each training, the first of which is not counted"""
    repeats: int = 3
    """trainings of one rank, and of two"""
    ranks: int = 2
    """how many are compared with one; as many cores are needed"""
    options: str = OPTIONS
    """of the program; num_workers=0: environments live in the rank itself, so that it needs one core"""


def speeds(ranks: int, args: Args) -> dict[str, list[float]]:
    """Environment steps per second, of rollouts and of whole iterations, by iteration."""
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    program = [sys.executable, *torchrun, str(ROOT / "algos" / "stepnft_pi0.py")]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*program, *args.options.split(), "--iterations", str(args.iterations)], cwd=folder, text=True,
                              capture_output=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        (run,) = Path(folder, "runs").iterdir()
        log = EventAccumulator(str(run)).Reload()
    steps, rollout, update = ([e.value for e in log.Scalars(f"charts/{name}")] for name in ("env_steps", "rollout_s", "update_s"))
    played = [later - earlier for earlier, later in zip(steps, steps[1:])]
    return dict(rollout=[n / s for n, s in zip(played, rollout[1:])],
                iteration=[n / (r + u) for n, r, u in zip(played, rollout[1:], update[1:])])


def main(args: Args) -> None:
    if len(os.sched_getaffinity(0)) < args.ranks:
        sys.exit(f"error: {args.ranks} ranks need as many cores")
    found = {ranks: dict(rollout=[], iteration=[]) for ranks in (1, args.ranks)}
    for _ in range(args.repeats):
        for ranks, series in found.items():
            for name, values in speeds(ranks, args).items():
                series[name] += [round(value, 1) for value in values]
        ratios = {name: round(statistics.median(found[args.ranks][name]) / statistics.median(found[1][name]), 2)
                  for name in ("rollout", "iteration")}
        print(json.dumps(ratios), flush=True)
    result = dict(commit=harness.commit(), **vars(args), load=os.getloadavg()[0], ratio=ratios, steps_per_second=found)
    OUT.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
