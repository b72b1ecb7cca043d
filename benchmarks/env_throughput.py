"""Environment steps per second: our chunked environments, ManiSkill's own in gymnasium's AsyncVectorEnv, and bare physics.

    python benchmarks/env_throughput.py                      # the figures of the docs: PickCube-v1, state and rgb at 128 px
    python benchmarks/env_throughput.py --image-sizes 64 96 128 224

A policy sends chunks of actions and looks at the last observation only. All contestants run the same task, episodes and actions in
the same number of processes with the same number of threads each; resets count. They take turns within one run, and the medians of
their rounds are compared.

- ours: `envs.make`, with several environments in each process.
- ManiSkill: `CPUGymWrapper` environments, one per process by design, stepped once per action of a chunk.
- physics: nothing but PhysX's steps, in as many processes: what no environment can exceed.

Prints a Markdown table and writes all rounds to a JSON file.
"""

import json
import multiprocessing as mp
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import gymnasium as gym
import numpy as np
import tyro

from pi_stepnft import envs
from pi_stepnft.envs.maniskill import ManiSkillSpec


@dataclass
class Args:
    env_id: str = "PickCube-v1"
    """the task"""
    modes: list[str] = field(default_factory=lambda: ["state", "rgb"])
    """observation modes"""
    image_sizes: list[int] = field(default_factory=lambda: [128])
    """sides of the pictures in mode rgb, px"""
    chunk: int = 8
    """actions per chunk"""
    episode_chunks: int = 6
    """chunks per episode; then all environments are reset"""
    workers: int = envs.num_cores()
    """processes of each contestant"""
    envs_per_worker: int = 4
    """our environments in each process"""
    threads: int = 1
    """threads of OpenMP and of the software renderer in each process"""
    rounds: int = 5
    """rounds of each contestant"""
    seconds: float = 10.0
    """shortest length of a round; it ends with an episode"""
    out: Path = Path(__file__).parent / "results" / "env_throughput.json"
    """where the JSON file goes"""


def plain_env(spec: ManiSkillSpec) -> gym.Env:
    """ManiSkill's environment as its documentation makes it for CPU processes."""
    import mani_skill.envs  # noqa: F401 (registers the tasks)
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    env = gym.make(
        spec.env_id, obs_mode=spec.obs_mode, control_mode=spec.control_mode, reward_mode=spec.reward_mode,
        max_episode_steps=spec.max_episode_steps, sim_backend="physx_cpu", render_backend="cpu",
        sensor_configs=dict(width=spec.image_size, height=spec.image_size),
    )
    return CPUGymWrapper(env)


def actions_of(rng: np.random.Generator, num_envs: int, n: int, action_dim: int) -> np.ndarray:
    """Small random actions (B, n, A), with which hardly any episode succeeds."""
    return np.clip(0.1 * rng.standard_normal((num_envs, n, action_dim)), -1, 1).astype(np.float32)


def rate_of_ours(venv, args: Args) -> float:
    rng, steps, start = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        venv.reset(seed=steps)
        for _ in range(args.episode_chunks):
            info = venv.step(actions_of(rng, venv.num_envs, args.chunk, venv.action_dim))[4]
            steps += int(info["steps"].sum())  # fewer where a cube happens to lie at its goal
    return steps / (time.perf_counter() - start)


def rate_of_maniskill(venv: gym.vector.AsyncVectorEnv, args: Args) -> float:
    rng, steps, start = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        venv.reset(seed=steps)
        for _ in range(args.episode_chunks):
            chunk = actions_of(rng, venv.num_envs, args.chunk, venv.single_action_space.shape[0])
            for i in range(args.chunk):
                venv.step(chunk[:, i])
            steps += venv.num_envs * args.chunk
    return steps / (time.perf_counter() - start)


def build_physics(spec: ManiSkillSpec) -> None:
    from pi_stepnft.envs.maniskill.env import ManiSkillEnv

    global physics_env
    physics_env = ManiSkillEnv(spec)


def step_physics(seconds: float) -> float:
    base, rng = physics_env.base, np.random.default_rng(0)
    joints = [joint._objs[0] for joint in base.agent.robot.active_joints]
    rest, steps, start = base.agent.robot._objs[0].qpos, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for joint, q in zip(joints, rest + 0.02 * rng.standard_normal(len(joints))):  # a robot at rest would be put to sleep
            joint.set_drive_target(q)
        for _ in range(base._sim_steps_per_control):
            base.scene.step()
        steps += 1
    return steps / (time.perf_counter() - start)


def compare(spec: ManiSkillSpec, args: Args) -> dict[str, list[float]]:
    """Rates of every round of each contestant, in environment steps per second."""
    spawn = mp.get_context("spawn")
    ours = envs.make(
        spec.env_id, args.workers * args.envs_per_worker, num_workers=args.workers, chunk=args.chunk, backend="cpu",
        obs_mode=spec.obs_mode, image_size=spec.image_size, max_episode_steps=spec.max_episode_steps, camera=None,
    )
    theirs = gym.vector.AsyncVectorEnv(
        [partial(plain_env, spec)] * args.workers, context="spawn", autoreset_mode=gym.vector.AutoresetMode.DISABLED
    )
    with spawn.Pool(args.workers, build_physics, (ManiSkillSpec(spec.env_id, obs_mode="state"),)) as pool:
        contestants = {
            "ours": lambda a: rate_of_ours(ours, a),
            "maniskill": lambda a: rate_of_maniskill(theirs, a),
            "physics": lambda a: sum(pool.map(step_physics, [a.seconds] * a.workers, chunksize=1)),
        }
        warm = Args(**{**vars(args), "seconds": 0.1})
        for run in contestants.values():  # the first episode compiles shaders and fills caches
            run(warm)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name, run in contestants.items():
                rates[name].append(run(args))
    ours.close()
    theirs.close()
    return rates


def main(args: Args) -> None:
    os.environ.update(OMP_NUM_THREADS=str(args.threads), LP_NUM_THREADS=str(args.threads))  # read by the child processes
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    packages = {name: version(name) for name in ("mani-skill", "sapien", "gymnasium", "numpy", "torch")}
    report = dict(args=settings, cores=envs.num_cores(), python=platform.python_version(), packages=packages, results=[])
    print(f"{args.env_id}, {args.workers} processes on {envs.num_cores()} cores, chunks of {args.chunk}; environment steps/s, "
          f"median (lowest – highest) of {args.rounds} rounds\n")
    print("| observations | ours | ManiSkill, AsyncVectorEnv | ratio | physics alone |\n|---|---|---|---|---|", flush=True)
    for mode in args.modes:
        for size in args.image_sizes if mode == "rgb" else [0]:
            limit = args.chunk * args.episode_chunks
            spec = ManiSkillSpec(args.env_id, obs_mode=mode, image_size=size or 128, max_episode_steps=limit)
            rates = compare(spec, args)
            median = {name: float(np.median(rounds)) for name, rounds in rates.items()}
            cells = {name: f"{median[name]:.0f} ({min(r):.0f} – {max(r):.0f})" for name, r in rates.items()}
            ratio = median["ours"] / median["maniskill"]
            label = f"rgb, {size} px" if mode == "rgb" else mode
            print(f"| {label} | {cells['ours']} | {cells['maniskill']} | {ratio:.1f} × | {cells['physics']} |", flush=True)
            report["results"].append(dict(mode=mode, image_size=size, rates=rates, median=median, ratio=ratio))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except envs.EnvError as error:
        sys.exit(f"error: {error}")
