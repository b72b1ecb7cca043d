"""What an iteration takes: pieces measured on this machine, whole iterations predicted from them, and 3 B on GPUs on paper.

    python benchmarks/cost_model.py            # benchmarks/results/cost_model.json
    python benchmarks/cost_model.py --quick    # a few minutes on two slow cores, little averaging
    python benchmarks/cost_model.py --table    # that file's tables of GPUs; of this machine: benchmarks/pages.py

An iteration is a rollout and an update. With E episodes, played in `calls` turns of side-by-side environments, S environment steps,
M chunks, of which a share carries signal, K solver steps, and T trained parameters:

    rollout = (E · reset + S · step) / cores + prefix(calls, M) + passes · pass(calls, M)
    update  = epochs · (update(minibatches, signal · M) + minibatches · T · optimizer) + T · moving average

where f(n, M) = n · fixed + M · per chunk is a line through measured batch sizes, and passes is K, or K + 1 where a predictor
judges the chunks. Each piece is measured alone, all of them in turns. How many steps an iteration took, and how many chunks carried
signal, is read from its log; the seconds are predicted. Left out are the labels, the predictor and drawing noise.

What a 3 B policy would take on GPUs, with environments as fast as here, is computed by cost_paper.py.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import cost_paper
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_stepnft import envs, harness, policies

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIDDLE = dict(
    image_size=112, patch_size=14, num_cameras=1, vision_width=512, vision_depth=12, vision_mlp=2048, vision_heads=8, vlm_width=640,
    vlm_depth=8, vlm_mlp=2560, expert_width=384, expert_mlp=1536, heads=8, kv_heads=1, head_dim=64, vocab_size=8192, horizon=8,
)
"""The 107 M of policy_speed.py, with one camera and a short horizon."""
K = 4
"""solver steps"""


@dataclass
class Args:
    quick: bool = False
    """fewer rounds and shorter runs"""
    table: bool = False
    """measure nothing: print the result file as Markdown"""
    rounds: int = 5
    """measurements of each piece, after one that does not count; their median is taken"""
    iterations: int = 5
    """of the real runs of the tiny policy, the first of which is not counted; 107 M: three"""
    out: Path = RESULTS / "cost_model.json"
    """result file"""


# ------------------------------------------------------------------------------------------------------------------- pieces


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def play(venv, turns: int, seed: int, act: Callable[[dict], np.ndarray]) -> tuple[dict[str, float], dict]:
    """Core-seconds of a reset and of a step while episodes are played, without what the policy takes; and the last observation."""
    workers, steps, took = min(envs.num_cores(), venv.num_envs), 0, 0.0
    began = time.perf_counter()
    obs, _ = venv.reset(seed=list(range(seed, seed + venv.num_envs)))
    reset = time.perf_counter() - began
    for _ in range(turns):
        actions, began = act(obs), time.perf_counter()
        obs, _, _, _, info = venv.step(actions)
        took += time.perf_counter() - began
        steps += int(info["steps"].sum())
    return dict(reset=reset * workers / venv.num_envs, step=took * workers / steps), obs


class Pieces:
    """A policy and its environments, and the seconds of what a training does with them."""

    def __init__(self, policy: policies.Pi0, batches: list[int], steps: int, **options):
        """batches: sizes to measure; steps: of an episode; options: of `envs.make`."""
        self.policy, self.batches, self.steps, self.execute = policy.freeze_vlm(), batches, steps, policy.meta["execute"]
        self.parameters = policy.expert_parameters()
        self.T = sum(p.numel() for p in self.parameters)
        self.old = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.0)
        self.venv = envs.make("PickCube-v1", chunk=self.execute, image_size=policy.config.image_size, observe_terminal=False,
                              **options)

    def round(self, seed: int) -> dict[str, float]:
        """Every piece once; optimizer and average for each trained parameter."""
        act = lambda obs: self.policy.act(obs, self.venv.instructions, K)[:, : self.execute]
        found, obs = play(self.venv, self.steps // self.execute, seed, act)
        for size in self.batches:
            found |= self.batch({name: np.resize(value, (size, *value.shape[1:])) for name, value in obs.items()}, size)
        step = lambda: (torch.nn.utils.clip_grad_norm_(self.parameters, 1.0), self.optimizer.step())
        found["optimizer"] = seconds(step) / self.T
        with torch.no_grad():
            found["average"] = seconds(lambda: [old.lerp_(new, 0.5) for old, new in zip(self.old, self.parameters)]) / self.T
        return found

    def batch(self, obs: dict[str, np.ndarray], size: int) -> dict[str, float]:
        """Encoding so many observations, a pass of the expert for a chunk of each, and the update's of K transitions each."""
        policy, c, told = self.policy.eval(), self.policy.config, self.venv.instructions[:1] * size
        x, t, rows = torch.randn(size, K, c.horizon, c.action_dim), torch.rand(size, K), torch.randperm(size)
        with torch.no_grad():
            *inputs, state = policy.processor(obs, told)
            prefix = policy.encode_prefix(*inputs)
            encode = seconds(lambda: policy.encode_prefix(*policy.processor(obs, told)[:-1]))
            passes = seconds(lambda: [policy.velocity(prefix, state, x[:, i], t[:, i]) for i in range(K)])
        policy.train().zero_grad()
        update = seconds(lambda: policy.velocity(prefix[rows], state[rows], x[rows], t).square().mean().backward())
        return {f"prefix {size}": encode, f"pass {size}": passes / K, f"update {size}": update}


def line(found: dict[str, float], piece: str) -> tuple[float, float]:
    """(fixed, per chunk) seconds, by least squares of the relative error."""
    sizes, took = zip(*((int(name.split()[1]), s) for name, s in found.items() if name.startswith(f"{piece} ")))
    slope, fixed = np.polyfit(sizes, took, 1, w=1 / np.array(took))
    return max(0.0, float(fixed)), float(slope)


def measure(setups: dict[str, Pieces], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of all pieces of all setups, and of stepping with pictures of 224 px in chunks of 5, for the 3 B policy."""
    large = envs.make("PickCube-v1", 4 * envs.num_cores(), obs_mode="rgb", image_size=224, chunk=5, observe_terminal=False)
    still = np.clip(0.1 * np.random.default_rng(0).standard_normal((large.num_envs, 5, large.action_dim)), -1, 1).astype(np.float32)
    found = defaultdict(lambda: defaultdict(list))
    for i in range(rounds + 1):
        once = {name: setup.round(1000 * i) for name, setup in setups.items()}
        once["rgb 224 px"] = play(large, 12, 1000 * i, lambda _: still)[0]
        for name, pieces in once.items() if i else ():
            for piece, value in pieces.items():
                found[name][piece].append(value)
    for venv in (large, *(setup.venv for setup in setups.values())):
        venv.close()
    return {name: {piece: float(np.median(values)) for piece, values in pieces.items()} for name, pieces in found.items()}


# ----------------------------------------------------------------------------------------------------------------- real runs


def train(options: str) -> tuple[dict, list[dict[str, float]]]:
    """The arguments of a real run, and what it logged of each iteration but the first."""
    always = "--max-minutes 0 --eval-every 0 --final-eval-episodes 2 --no-video --save-every 1000"
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(ROOT / "algos" / "stepnft_pi0.py"), *options.split(), *always.split()]
        done = subprocess.run(program, cwd=folder, text=True, capture_output=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        (run,) = Path(folder, "runs").iterdir()
        log, args = EventAccumulator(str(run)).Reload(), json.loads((run / "args.json").read_text())
    names = "env_steps", "rollout_success", "signal", "rollout_s", "update_s"
    rows = [dict(zip(names, values)) for values in zip(*([e.value for e in log.Scalars(f"charts/{name}")] for name in names))]
    steps = [row["env_steps"] for row in rows]
    return args, [row | dict(env_steps=row["env_steps"] - before) for row, before in zip(rows[1:], steps)]


def predict(found: dict[str, float], setup: Pieces, args: dict, row: dict[str, float]) -> tuple[float, float]:
    """Seconds of rollout and update of an iteration; the formula above."""
    E, T, n = args["num_envs"] * args["rollout_epochs"], setup.T, setup.execute
    calls = args["rollout_epochs"] * math.ceil(args["rollout_steps"] / n)
    M = (row["env_steps"] + row["rollout_success"] * E * (n - 1) / 2) / n  # a success comes in the middle of its chunk
    both = lambda piece, times, chunks: np.dot(line(found, piece), (times, chunks))
    passes = args["num_steps"] + (args["labels"] == "predicted")
    rollout = (E * found["reset"] + row["env_steps"] * found["step"]) / envs.num_cores()
    rollout += both("prefix", calls, M) + passes * both("pass", calls, M)
    minibatches = args["num_minibatches"] * (row["signal"] > 0)
    update = both("update", minibatches, row["signal"] * M) + minibatches * T * found["optimizer"]
    return rollout, args["update_epochs"] * update + T * found["average"]


def compare(found: dict, setup: Pieces, options: str) -> dict:
    """Mean seconds of an iteration, predicted and measured, by phase."""
    args, rows = train(options)
    predicted = np.mean([predict(found, setup, args, row) for row in rows], 0).tolist()
    measured = np.mean([(row["rollout_s"], row["update_s"]) for row in rows], 0).tolist()
    error = 100 * (sum(predicted) / sum(measured) - 1)
    result = dict(parameters=sum(p.numel() for p in setup.policy.parameters()), options=options.split(" --checkpoint")[0],
                  predicted=predicted, measured=measured, error_percent=error, iterations=rows)
    print(f"predicted {sum(predicted):.2f} s, measured {sum(measured):.2f} s, {error:+.0f} %: {result['options']}", flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------- main


def table(heads: str, rows) -> None:
    """Print Markdown; `heads` are separated by semicolons."""
    heads = heads.split("; ")
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def tables(record: dict) -> None:
    """What is computed of GPUs, as Markdown."""
    where = dict(device="{:.0f}, on it", cpu="{:.0f}, in host memory", off="encoded again")
    names = "; ".join(f"{name}, s" for name in record["paper"][0]["phases"])
    table(f"settings, trained; hardware; {names}; iteration, s; with `--overlap`; GB on a GPU; prefixes, GB; longest; what helps", (
        (f"{r['setting']}, {r['train']}", r["hardware"], *(f"{s:.1f}" for s in r["phases"].values()), f"{r['iteration_s']:.0f}",
         f"{r['overlapped_s']:.0f}" if r["overlapped_s"] else "–", f"{r['held_bytes'] / 1e9:.0f}",
         where[r["prefix_cache"]].format(r["prefix_bytes"] / 1e9), r["longest"], r["helps"])
        for r in record["paper"]
    ))
    table("3 B on a GPU; computed, ms; measured, ms", (
        (name, *(f"{1e3 * s:.0f}" for s in pair)) for name, pair in record["checks"].items()
    ))


def main(args: Args) -> None:
    if args.table:
        return tables(json.loads(args.out.read_text()))
    rounds, iterations = (1, 3) if args.quick else (args.rounds, args.iterations)
    torch.set_num_threads(envs.num_cores())
    torch.manual_seed(0)
    tiny = {mode: policies.load(f"pi0-tiny-pickcube-{mode}") for mode in ("state", "rgb")}
    of_task = tiny["rgb"]
    sizes = MIDDLE | {name: getattr(of_task.config, name) for name in ("state_dim", "action_dim", "max_token_len")}
    middle = policies.Pi0(policies.Pi0Config(**sizes))
    stats = of_task.processor.state_stats, of_task.processor.action_stats
    middle.processor = policies.Processor(middle.config, policies.Tokenizer(), *stats)
    middle.meta = dict(env_id="PickCube-v1", obs_mode="rgb", execute=8, num_steps=4)
    with tempfile.TemporaryDirectory() as folder:
        policies.save(middle, folder)
        setups = {f"tiny, {mode}": Pieces(policy, [8, 32, 128], 32, obs_mode=mode, num_envs=16) for mode, policy in tiny.items()}
        setups["107 M, rgb"] = Pieces(middle, [2, 4, 8], 16, obs_mode="rgb", num_envs=4)
        load = [os.getloadavg()[0]]  # before, after the pieces, after the runs
        found = measure(setups, rounds)
        load.append(os.getloadavg()[0])
        more = f"--iterations {iterations}" + " --num-envs 32 --rollout-epochs 2" * args.quick
        options = {f"tiny, {mode}": f"--obs-mode {mode} {more}" for mode in tiny}
        options["107 M, rgb"] = (  # binary labels: where nothing succeeds, others have nothing to teach
            "--iterations 3 --num-envs 4 --rollout-epochs 2 --rollout-steps 16 --num-minibatches 2 --labels binary --group-size 1 "
            f"--env-options max_episode_steps=16 --checkpoint {folder}")
        runs = {name: compare(found[name], setups[name], text) for name, text in options.items()}
    machine = dict(cores=envs.num_cores(), processor=platform.machine(), python=platform.python_version(), torch=torch.__version__)
    record = dict(
        commit=harness.commit(), machine=machine, quick=args.quick, rounds=rounds, load=[*load, os.getloadavg()[0]],
        pieces=found, lines={name: {piece: line(each, piece) for piece in ("prefix", "pass", "update")}
                             for name, each in found.items() if name in setups},
        runs=runs, **cost_paper.everything(found["rgb 224 px"]),
    )
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    tables(record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
