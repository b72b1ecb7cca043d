"""Success of the scripted experts, over the same seeds for every task.

    python benchmarks/experts.py                                    # ManiSkill
    python benchmarks/experts.py --suites libero_object libero_spatial --episodes 20

Prints a Markdown table and writes benchmarks/results/experts.json, or libero_experts.json with --suites. LIBERO's seeds from
envs.EVAL_SEED on are the fixed initial states of a task.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import tyro
from tqdm import tqdm

from pi_stepnft import envs
from pi_stepnft.envs import demos
from pi_stepnft.envs.libero import tasks as libero
from pi_stepnft.envs.maniskill import experts
from pi_stepnft.harness.statistics import wilson

OUT = Path(__file__).parent / "results"


@dataclass
class Args:
    episodes: int = 100
    """episodes per task, with seeds seed, seed + 1, …"""
    seed: int = envs.EVAL_SEED
    """first seed"""
    noise: float = 0.0
    """on the executed translation, as --demo-noise of algos/sft.py"""
    suites: tuple[str, ...] = ()
    """LIBERO suites whose tasks are run, or single tasks; none: ManiSkill's tasks"""
    num_workers: int = envs.num_cores()
    """processes"""
    out: Path | None = None
    """where the JSON file goes; default: benchmarks/results"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    tasks = [f"{suite}/{number}" for name in args.suites for suite, number, _ in libero.task_names(name)] or experts.available()
    options = dict(image_size=8) if args.suites else dict(obs_mode="state")
    out = args.out or OUT / ("libero_experts.json" if args.suites else "experts.json")
    results = {}
    print("| task | instruction | successes | 95 % interval | steps, median (most) |\n|---|---|---|---|---|")
    for env_id in tasks:
        venv = envs.make(env_id, args.num_workers, num_workers=args.num_workers, **options)
        jobs = [dict(seed=args.seed + i, noise=args.noise, observe=False) for i in range(args.episodes)]
        episodes = list(tqdm(venv.call(demos.demonstrate, jobs), total=len(jobs), desc=env_id, leave=False))
        venv.close()
        steps = [len(episode["action"]) for episode in episodes if episode]
        failed = [job["seed"] for job, episode in zip(jobs, episodes) if not episode]
        low, high = (100 * bound for bound in wilson(len(steps), args.episodes))
        shown = f"{np.median(steps):.0f} ({max(steps)})" if steps else "–"
        results[env_id] = dict(
            instruction=venv.instruction, successes=len(steps), episodes=args.episodes, seed=args.seed, failed_seeds=failed,
            median_steps=float(np.median(steps)) if steps else None, most_steps=max(steps, default=None),
        )
        cells = env_id, venv.instruction, f"{len(steps)} of {args.episodes}", f"[{low:.0f}, {high:.0f}] %", shown
        print(f"| {' | '.join(cells)} |", flush=True)
        out.write_text(json.dumps(results, indent=2) + "\n")
