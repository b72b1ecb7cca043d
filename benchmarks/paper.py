"""The paper's two tables: the command behind each row, and what it takes on GPUs, on paper; writes results/paper.json.

    python benchmarks/paper.py

PUBLISHED are the authors' numbers, copied from arXiv 2603.02083, version 2, tables 1 and 2; none is ours. Hours are those of all
iterations by cost_paper.py, without evaluations, with environments as fast as in results/cost_model.json. pages.py makes tables of
this for docs/paper.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import cost_paper

from pi_stepnft import harness
from pi_stepnft.algos import stepnft_pi0, stepnft_pi05

PROGRAMS = {"π0": stepnft_pi0, "π0.5": stepnft_pi05}
SUITES = "libero_spatial", "libero_object", "libero_goal", "libero_10", "mean"
FAMILIES = "in distribution", "vision", "semantic", "execution", "mean"
PUBLISHED = {
    "libero": {
        "π0": dict(zip(SUITES, [(65.3, 93.5), (64.4, 98.0), (49.8, 83.7), (51.2, 86.7), (57.6, 90.5)])),
        "π0.5": dict(zip(SUITES, [(84.6, 97.8), (95.4, 100.0), (84.6, 98.2), (43.9, 79.8), (77.1, 94.0)])),
    },
    "maniskill": {
        "π0": dict(zip(FAMILIES, [(38.4, 79.2), (32.6, 69.1), (8.4, 49.1), (13.2, 33.1), (18.1, 50.4)])),
        "π0.5": dict(zip(FAMILIES, [(40.1, 85.4), (40.2, 76.9), (16.6, 56.6), (22.4, 45.1), (26.4, 59.5)])),
    },
}
"""Setting → policy → suite of LIBERO, or family of variants → % of success, few-shot SFT and π-StepNFT; mean: of the suites, or of
the three families out of distribution."""
OPTIONS = {
    ("π0", "libero_goal"): " --rollout-steps 320 --update-epochs 4 --num-minibatches 16",
    ("π0", "libero_10"): " --rollout-steps 480 --update-epochs 4 --execute 10",
    ("π0.5", "libero_goal"): " --rollout-steps 320 --num-minibatches 16",
    ("π0.5", "libero_10"): " --rollout-steps 480 --execute 10",
}
"""What the authors set otherwise than --paper does."""
TASKS = dict(libero=SUITES[:-1], maniskill=["PutOnPlateInScene25Main-v3"])


def row(setting: str, policy: str, task: str, environment: dict[str, float]) -> dict:
    program, options = PROGRAMS[policy], OPTIONS.get((policy, task), "")
    name = task if setting == "libero" else setting
    command = (f"python algos/{Path(program.__file__).name} ${setting.upper()} --env-id {task} "
               f"--checkpoint checkpoints/{program.POLICY}-{name}{options}")
    changes = {name.replace("-", "_"): int(value) for name, value in re.findall(r"--(\S+) (\d+)", options)}
    costs = {hardware: cost_paper.on_paper(setting, hardware, "expert", environment, program, **changes)
             for hardware in ("1 GPU", "8 GPUs")}
    hours = {hardware: cost["iteration_s"] * program.PAPER[setting]["iterations"] / 3600 for hardware, cost in costs.items()}
    return dict(setting=setting, policy=policy, task=task, command=command, hours=hours, costs=costs)


if __name__ == "__main__":
    environments = cost_paper.read("cost_model")["environments"]
    rows = [row(setting, policy, task, environments[setting])
            for setting, tasks in TASKS.items() for policy in PROGRAMS for task in tasks]
    record = dict(commit=harness.commit(), source="arXiv 2603.02083v2, tables 1 and 2", published=PUBLISHED, rows=rows)
    (Path(__file__).parent / "results" / "paper.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for r in rows:
        print(r["command"], {hardware: round(hours, 1) for hardware, hours in r["hours"].items()})
