"""The main job's results: one run per seed and observation mode, then a table and the learning curves.

    python benchmarks/stepnft_results.py --obs-mode state --seeds 1 2 3    # runs what is missing, one after the other
    python benchmarks/stepnft_results.py                                   # only the table and docs/images/stepnft_*.png

A finished run leaves benchmarks/results/stepnft-<task>-<mode>-<seed>.json with its command, versions, curve and intervals; a run
whose file is there is not repeated.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Args:
    env_id: str = "PickCube-v1"
    """task"""
    obs_mode: str = "state"
    """rgb or state"""
    seeds: list[int] = field(default_factory=list)
    """seeds to run where their result is missing"""
    extra: str = ""
    """further arguments for algos/stepnft_pi0.py, in one string, e.g. --extra="--max-minutes 18" """


def run(args: Args, seed: int) -> None:
    """One training run, in a process of its own; copies its result.json. A failed run is reported and leaves no file."""
    target = RESULTS / f"stepnft-{args.env_id}-{args.obs_mode}-{seed}.json"
    if target.exists():
        return
    command = ["algos/stepnft_pi0.py", "--env-id", args.env_id, "--obs-mode", args.obs_mode, "--seed", str(seed)]
    command += shlex.split(args.extra)
    print("python", *command, flush=True)
    before = set((ROOT / "runs").glob("*/result.json"))
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        print(f"seed {seed} failed", file=sys.stderr)
        return
    (new,) = set((ROOT / "runs").glob("*/result.json")) - before
    RESULTS.mkdir(exist_ok=True)
    target.write_text(new.read_text())


def rate(outcome: dict) -> str:
    low, high = outcome["interval"]
    return f"{100 * outcome['success']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def report() -> None:
    """Print a Markdown table of all results and draw their curves, a file per task and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(RESULTS.glob("stepnft-*.json")):
        result = json.loads(path.read_text())
        groups.setdefault((result["env_id"], result["obs_mode"]), []).append(result)
    print("| task | mode | seed | before, % | after, % | θ_old after, % | environment steps | training min |")
    print("|---|---|---|---|---|---|---|---|")
    for (env_id, mode), results in groups.items():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        for r in results:
            print(
                f"| {env_id} | {mode} | {r['seed']} | {rate(r['before'])} | {rate(r['after'])} | {rate(r['after_rollout_policy'])} "
                f"| {r['env_steps'] / 1000:.0f} k | {r['training_minutes']:.1f} |"
            )
            for axis, key, scale in zip(axes, ("env_steps", "minutes"), (1000, 1), strict=True):
                axis.plot([p[key] / scale for p in r["curve"]], [100 * p["success"] for p in r["curve"]], marker="o", markersize=3,
                          label=f"seed {r['seed']}")  # fmt: skip
        # No interval here: the seeds share their evaluation episodes.
        before, after, old = (
            [100 * r[when]["success"] for r in results] for when in ("before", "after", "after_rollout_policy")
        )
        gain = np.subtract(after, before)
        print(f"| {env_id} | {mode} | mean | {np.mean(before):.1f} | {np.mean(after):.1f}, {gain.min():+.1f} to {gain.max():+.1f} "
              f"| {np.mean(old):.1f} | | |")  # fmt: skip
        axes[0].set(xlabel="thousand environment steps", ylabel="held-out success, %", ylim=(0, 100))
        axes[1].set(xlabel="minutes of training")
        axes[1].legend()
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.suptitle(f"π-StepNFT, {env_id} ({mode})")
        figure.savefig(ROOT / "docs" / "images" / f"stepnft_{env_id}_{mode}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for seed in args.seeds:
        run(args, seed)
    report()
