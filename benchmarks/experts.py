"""Success of the scripted experts without noise, over the same seeds for every task: python benchmarks/experts.py

Prints a Markdown table and writes benchmarks/results/experts.json.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from tqdm import tqdm

import envs
from envs.evaluation import wilson
from envs.experts import EXPERTS

OUT = Path(__file__).parent / "results" / "experts.json"


@dataclass
class Args:
    episodes: int = 100
    """episodes per task, with seeds seed, seed + 1, …"""
    seed: int = envs.EVAL_SEED
    """first seed"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    results = {}
    print("| task | successes | 95 % interval | median steps |\n|---|---|---|---|")
    for env_id in EXPERTS:
        venv = envs.make(env_id, os.cpu_count() or 1, obs_mode="state")
        jobs = [dict(seed=args.seed + i, noise=0.0) for i in range(args.episodes)]
        episodes = list(tqdm(venv.demonstrate(jobs), total=len(jobs), desc=env_id, leave=False))
        venv.close()
        steps = [len(episode["action"]) for episode in episodes if episode]
        low, high = (100 * bound for bound in wilson(len(steps), args.episodes))
        results[env_id] = dict(successes=len(steps), episodes=args.episodes, seed=args.seed, median_steps=float(np.median(steps)))
        print(f"| {env_id} | {len(steps)} of {args.episodes} | [{low:.0f}, {high:.0f}] % | {np.median(steps):.0f} |", flush=True)
    OUT.write_text(json.dumps(results, indent=2))
