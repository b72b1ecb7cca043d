"""What --overlap saves: rollouts of PickCube-v1 with and without it, in turns.

    python benchmarks/overlap.py            # benchmarks/results/overlap.json

- A policy that sleeps, as long for a chunk as a GPU of its own would compute: half, once and twice as long as the simulators take.
  Without the option a rollout takes the sum of both, with it it should take the larger of the two.
- The bundled tiny policy, which computes on the simulators' cores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness.rollout import Rollout, Turn


@dataclass
class Args:
    obs_mode: str = "state"
    """observations"""
    num_envs: int = 64
    """environments side by side"""
    rounds: int = 5
    """rollouts of each kind"""
    out: Path = Path(__file__).parent / "results" / "overlap.json"
    """where the JSON file goes"""


def main(args: Args) -> None:
    torch.set_num_threads(envs.num_cores())
    policy = policies.load(f"pi0-tiny-pickcube-{args.obs_mode}")
    c, execute = policy.config, policy.meta["execute"]
    venv = envs.make("PickCube-v1", args.num_envs, obs_mode=args.obs_mode, image_size=c.image_size, chunk=execute,
                     observe_terminal=False)
    rng, shape = np.random.default_rng(0), (args.num_envs, execute, venv.action_dim)
    still = torch.from_numpy(np.clip(0.1 * rng.standard_normal(shape), -1, 1))  # with which hardly any episode ends

    def seconds(act: Callable[[Turn], torch.Tensor], overlap: bool) -> float:
        rollout = Rollout(venv, np.arange(2 * args.num_envs), execute=execute, max_steps=32, shape=(c.horizon, c.action_dim),
                          device=torch.device("cpu"), key=(0, 0), overlap=overlap, observe_cut=False)
        began = time.perf_counter()
        with torch.inference_mode():
            for turn in rollout:
                turn.act(act(turn))
        return time.perf_counter() - began

    def sleep(per_chunk: float) -> Callable[[Turn], torch.Tensor]:
        def act(turn: Turn) -> torch.Tensor:
            time.sleep(per_chunk * len(turn.episode))
            return still[: len(turn.episode)]

        return act

    def tiny(turn: Turn) -> torch.Tensor:
        return torch.from_numpy(policy.act(turn.obs, turn.instructions, noise=turn.noise(1)[:, 0])[:, :execute])

    chunks = 2 * args.num_envs * -(-32 // execute)
    alone = float(np.median([seconds(sleep(0), overlap=False) for _ in range(args.rounds + 1)][1:]))
    record = dict(commit=harness.commit(), cores=envs.num_cores(), obs_mode=args.obs_mode, num_envs=args.num_envs,
                  simulation_s=alone, rows=[])
    print(f"the simulators alone: {alone:.2f} s\n\n| policy | sum, s | without, s | larger, s | with --overlap, s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for share in (0.5, 1.0, 2.0, None):
        act = tiny if share is None else sleep(share * alone / chunks)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.rounds):
            for overlap, each in times.items():
                each.append(seconds(act, overlap))
        without, overlapped = (float(np.median(each)) for each in times.values())
        row = dict(policy_s=share and share * alone, without_s=without, overlapped_s=overlapped, times=list(times.values()))
        record["rows"].append(row)
        expected = ("–", "–") if share is None else (f"{alone * (1 + share):.2f}", f"{alone * max(1, share):.2f}")
        label = "tiny π0 on the same cores" if share is None else f"sleeps {share * alone:.2f} s"
        cells = label, expected[0], f"{without:.2f}", expected[1], f"{overlapped:.2f}", f"{without / overlapped:.2f}"
        print(f"| {' | '.join(cells)} |", flush=True)
    venv.close()
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
