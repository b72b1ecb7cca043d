"""The replay baseline: how often one demonstration's actions, executed blindly, solve a task from other initial states.

    python benchmarks/replay_baseline.py demos/libero_object-3.h5 --env-id libero_object/3

Report it beside a policy's success (algos/evaluate.py, the same episodes): only what goes beyond it shows that the policy looks.
Takes every format of envs/datasets.py. Each of the first --demonstrations of the file is replayed on all episodes; prints success
with 95 % Wilson intervals and, with --out, writes a JSON file.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import tyro

from pi_stepnft import envs
from pi_stepnft.envs import datasets
from pi_stepnft.harness.evaluation import evaluate_replay
from pi_stepnft.harness.statistics import wilson


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]
    """demonstrations of the task: a file or folder"""
    env_id: str
    """a single task, such as libero_object/3"""
    obs_mode: Literal["rgb", "state"] = "rgb"
    """as in the file"""
    demonstrations: int = 4
    """how many of them are replayed, the first ones"""
    episodes: int = 50
    """episodes of each"""
    eval_seed: int = envs.EVAL_SEED
    """first seed"""
    num_envs: int = 4
    """environments side by side"""
    out: Path | None = None
    """where a JSON file goes; default: nowhere"""


if __name__ == "__main__":
    try:
        args = tyro.cli(Args, description=__doc__)
        if min(args.demonstrations, args.episodes, args.num_envs) < 1:
            raise envs.EnvError("--demonstrations, --episodes and --num-envs must be at least 1")
        data = datasets.read(args.dataset, obs_mode=args.obs_mode, image_size=8)
        demonstrations = np.split(data.action, data.start[1:])[: args.demonstrations]
        venv = envs.make(args.env_id, min(args.num_envs, args.episodes), obs_mode=args.obs_mode, image_size=8,
                         observe_terminal=False)
        if len(set(venv.tasks)) > 1:
            raise envs.EnvError(f"{args.env_id} has several tasks: name one, as in {args.env_id}/0")
        if data.action.shape[1] != venv.action_dim:
            raise envs.EnvError(f"{args.dataset} has actions of {data.action.shape[1]} numbers, {args.env_id} of {venv.action_dim}")
        print(f"{args.env_id}: {venv.instruction}\n\n| demonstration | steps | success | 95 % interval |\n|---|---|---|---|")
        rows = []
        for i, actions in enumerate(demonstrations):
            result = evaluate_replay(venv, actions, args.episodes, seed=args.eval_seed, progress=f"demonstration {i}")
            rows.append(dict(demonstration=i, steps=len(actions), success=result.success.tolist()))
            low, high = (100 * bound for bound in result.interval)
            print(f"| {i} | {len(actions)} | {result.success.sum()} of {args.episodes} | [{low:.0f}, {high:.0f}] % |", flush=True)
        total, episodes = sum(sum(row["success"]) for row in rows), args.episodes * len(rows)
        low, high = (100 * bound for bound in wilson(total, episodes))
        print(f"| all | | {total} of {episodes} | [{low:.0f}, {high:.0f}] % |")
        venv.close()
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(dict(args={**asdict(args), "out": args.out.name}, rows=rows), indent=1) + "\n")
    except envs.EnvError as error:
        sys.exit(f"error: {error}")
