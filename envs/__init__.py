"""Simulators as gymnasium vector environments over action chunks: `envs.make(env_id, num_envs, …)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi_stepnft.envs.base import EVAL_SEED, TRAIN_SEEDS, TUNING_SEED, EnvError, Environment, Simulator, Spec, num_cores
from pi_stepnft.envs.simulators import SIMULATORS, simulator

__all__ = [
    "EVAL_SEED", "SIMULATORS", "TRAIN_SEEDS", "TUNING_SEED", "EnvError", "Environment", "Simulator", "Spec", "check", "make",
    "num_cores", "simulator",
]


def check(env_id: str) -> None:
    """Raise EnvError, in one line, for a task that does not exist, needs a download, or lacks its driver; creates nothing."""
    simulator(env_id).check(env_id)


def make(
    env_id: str,
    num_envs: int,
    *,
    obs_mode: str = "rgb",
    seed: int = 0,
    chunk: int = 8,
    num_workers: int | None = None,
    backend: str = "auto",
    observe_terminal: bool = True,
    step_timeout: float = 300.0,
    among: tuple[int, int] | None = None,
    **spec: Any,
):
    """A `gymnasium.vector.VectorEnv` over action chunks (see `envs.vector.ChunkEnv` for shapes and semantics).

    env_id: any ManiSkill task that needs no download, or whose assets are there; or a variant of one; or a suite of LIBERO or one
        of its tasks; or "my_module:MyTask-v1", for which the module is imported here and in every worker.
    num_envs: how many environments run side by side.
    obs_mode: "rgb" (camera images; the state holds proprioception and task extras such as the goal position) or "state"
        (no images; the state also holds object poses; of LIBERO one task).
    seed: of the generator that draws episode seeds when `reset` is given none.
    chunk: actions per step in the action space; `step` takes any number up to the episode limit.
    num_workers: processes on the CPU back end (default: one per core that `num_cores` counts, at most num_envs); 0: none, the
        environments live in this process.
    backend: "cpu" (a pool of processes), "cuda" (one batched simulation on the GPU), or "auto": cuda where that works.
    observe_terminal: observe (and render) the state after success too; learners without a critic can save that.
    step_timeout: seconds for which a worker process may be silent before it is replaced, its episodes lost.
    among: (first, total): these are environments first, first + 1, … of so many, which several processes hold together; of a suite
        it says which tasks they have.
    spec: the simulator's own options, fields of its `Spec`: image_size, max_episode_steps, instruction, …; of ManiSkill
        control_mode, robot, cameras, … (`envs.maniskill.ManiSkillSpec`), of LIBERO language, … (`envs.libero.LiberoSpec`).

    Raises EnvError with one line for everything that is wrong with these, the task, or the graphics driver.
    """
    if not all(isinstance(number, int | np.integer) and number >= 1 for number in (num_envs, chunk)):
        raise EnvError(f"num_envs and chunk must be whole numbers of at least 1, got {num_envs!r} and {chunk!r}")
    if num_workers is not None and num_workers < 0:
        raise EnvError(f"num_workers must not be negative, got {num_workers}")
    if obs_mode not in ("rgb", "state"):
        raise EnvError(f"obs_mode must be 'rgb' or 'state', got {obs_mode!r}")
    if backend not in ("auto", "cpu", "cuda"):
        raise EnvError(f"backend must be 'auto', 'cpu' or 'cuda', got {backend!r}")
    if seed < 0:
        raise EnvError(f"seed must not be negative, got {seed}")
    chosen = simulator(env_id)
    built = chosen.spec(env_id, obs_mode=obs_mode, **spec)
    chosen.check(env_id)
    if backend == "cuda" or (backend == "auto" and chosen.on_gpu()):
        return chosen.batched(built, num_envs, chunk=chunk, seed=seed)
    from pi_stepnft.envs.pool import ChunkVecEnv

    return ChunkVecEnv(built, num_envs, num_cores() if num_workers is None else num_workers, chunk=chunk, seed=seed,
                       observe_terminal=observe_terminal, step_timeout=step_timeout, among=among or (0, num_envs))
