"""Does a policy read? Its success by sentence, as told and with the sentences exchanged, in PickNamedCube-v1 or libero_object:

    python benchmarks/language.py pi0-tiny-picknamedcube-state runs/stepnft-…/policy
    python benchmarks/language.py runs/suite runs/stepnft-…/policy --episodes 500 --num-envs 10     # of libero_object, mixed

A sentence's row holds the episodes that were told it; exchanged, those in which another thing counts. Prints a Markdown table and
writes benchmarks/results/language.json, in which other policies' rows stay.
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
import torch
import tyro

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness.evaluation import by_ode, evaluate
from pi_stepnft.harness.statistics import wilson

OUT = Path(__file__).parent / "results" / "language.json"


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """folders or bundled names"""
    episodes: int = 512
    """per policy, with seeds seed, seed + 1, …; as many again with the sentences exchanged"""
    seed: int = envs.EVAL_SEED
    """first seed"""
    num_envs: int = 64
    """environments side by side"""
    num_threads: int = 1
    """torch threads"""


def by_sentence(policy: policies.Pi0, exchanged: bool, args: Args) -> dict[str, dict]:
    """Outcomes for each sentence, and for "all"."""
    env_id, options = policy.meta["env_id"], harness.env_options(policy.meta.get("env_options", []))
    option = dict(exchanged=exchanged)
    options |= option if env_id.startswith("libero") else dict(kwargs=options.get("kwargs", {}) | option)
    venv = envs.make(env_id, args.num_envs, obs_mode=policy.meta["obs_mode"], **options)
    told, ode = {}, by_ode(policy, policy.meta["num_steps"])

    def act(obs, instructions, turns):
        told.update(zip(turns[:, 0].tolist(), instructions))
        return ode(obs, instructions, turns)

    result = evaluate(venv, act, args.episodes, execute=policy.meta["execute"], seed=args.seed, progress="evaluation")
    venv.close()
    sentence = np.array([told[seed] for seed in result.seeds.tolist()])
    rows = {text: result.success[sentence == text] for text in sorted(set(told.values()))} | {"all": result.success}
    summary = lambda won: dict(success=float(won.mean()), interval=wilson(won.sum(), len(won)), episodes=len(won))
    return {text: summary(won) for text, won in rows.items()}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.num_threads)
    for name in args.checkpoints:
        policy = policies.load(name).eval()
        made = dict(seed=args.seed, commit=harness.commit())
        made |= {way: by_sentence(policy, way == "exchanged", args) for way in ("as told", "exchanged")}
        results = json.loads(OUT.read_text()) if OUT.exists() else {}
        OUT.write_text(json.dumps(results | {name: made}, indent=1) + "\n")
    print("| policy | sentences | told | success, % | episodes |\n|---|---|---|---|---|")
    for name, made in json.loads(OUT.read_text()).items():
        for way in ("as told", "exchanged"):
            for text, row in made[way].items():
                low, high = (f"{100 * bound:.1f}" for bound in row["interval"])
                print(f"| {name} | {way} | {text} | {100 * row['success']:.1f} [{low}, {high}] | {row['episodes']} |")
