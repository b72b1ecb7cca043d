"""`ChunkVecEnv`: a gymnasium VectorEnv over action chunks, on a pool of worker processes."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import gymnasium as gym
import numpy as np

from pi_stepnft.envs.base import EnvError, EnvSpec, num_cores

MAX_RESTARTS = 3
"""How many dead workers a pool replaces before it gives up."""


# ---------------------------------------------------------------------------------------------------------- the worker's side


def _worker(pipe: Connection, spec: EnvSpec, slots: range, num_envs: int, threads: int) -> None:
    """Build the environments of some slots, then serve commands until told to close. Arrays travel through shared memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the workers
    try:
        _serve(pipe, spec, slots, num_envs, threads)
    except EnvError as error:
        pipe.send(("error", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except BaseException as error:  # a bug: show where, and tell the parent in one line
        traceback.print_exc()
        pipe.send(("error", f"an environment worker failed: {type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)  # SAPIEN's destructors can hang at exit, and nothing is left to save


def _serve(pipe: Connection, spec: EnvSpec, slots: range, num_envs: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    envs = [spec.create(slot, num_envs) for slot in slots]
    facts = {name: getattr(envs[0], name) for name in ("action_dim", "state_dim", "cameras", "max_episode_steps")}
    pipe.send(("ok", (facts, [(env.task, env.instruction) for env in envs])))
    blocks: list[SharedMemory] = []
    arrays: dict[str, np.ndarray] = {}
    while True:
        command, payload = pipe.recv()
        result: Any = None
        if command == "attach":
            for name, (block, shape, dtype) in payload.items():
                blocks.append(SharedMemory(block))
                arrays[name] = np.ndarray(shape, dtype, blocks[-1].buf)
        elif command == "reset":
            first = {}  # equal seeds make a group, whose first picture is drawn once
            for i, slot, seed in payload:
                envs[i].reset(seed)
                if first.setdefault(seed, slot) == slot:
                    envs[i].observe(arrays["image"][slot], arrays["state"][slot])
                else:
                    for array in (arrays["image"], arrays["state"]):
                        array[slot] = array[first[seed]]
        elif command == "step":
            result = []
            for i, slot, length, observe_terminal in payload:
                reward, terminated, truncated, steps = envs[i].step(arrays["chunk"][slot, :length])
                if observe_terminal or not terminated:
                    envs[i].observe(arrays["image"][slot], arrays["state"][slot])
                result.append((slot, reward, terminated, truncated, envs[i].success, steps))
        elif command == "render":
            result = [(slot, envs[i].render()) for i, slot in payload]
        elif command == "demonstrate":
            from pi_stepnft.envs.demos import demonstrate

            result = demonstrate(envs[0], **payload)
        elif command == "close":
            return
        pipe.send(("ok", result))


# ---------------------------------------------------------------------------------------------------------- the parent's side


class _Worker:
    """A process with the environments of some slots, so spaced that neighbours in a group land on different workers."""

    def __init__(self, index: int, spec: EnvSpec, slots: range, num_envs: int, threads: int):
        self.index, self.spec, self.slots, self.num_envs, self.threads = index, spec, slots, num_envs, threads
        self.start()

    def start(self) -> None:
        context = mp.get_context("spawn")  # a forked child would inherit torch's and SAPIEN's threads half-alive
        self.pipe, child = context.Pipe()
        # lavapipe and OpenMP read their thread counts when the child loads them: hand them down, unless the user has set them.
        names = [name for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS") if name not in os.environ]
        os.environ.update({name: str(self.threads) for name in names})
        try:
            self.process = context.Process(
                target=_worker, args=(child, self.spec, self.slots, self.num_envs, self.threads), daemon=True,
                name=f"env-{self.index}",
            )  # fmt: skip
            self.process.start()
        finally:
            for name in names:
                del os.environ[name]
        child.close()

    def send(self, command: str, payload: Any = None) -> None:
        try:
            self.pipe.send((command, payload))
        except (BrokenPipeError, ConnectionResetError):
            pass  # receive() finds out

    def receive(self) -> Any:
        """The answer to the last command. Raises EnvError for the worker's own errors, EOFError when it has died."""
        wait([self.pipe, self.process.sentinel])
        if not self.pipe.poll():
            raise EOFError
        try:
            status, result = self.pipe.recv()
        except OSError as error:  # died in the middle of its answer
            raise EOFError from error
        if status == "error":
            raise EnvError(result)
        return result


class ChunkEnv(gym.vector.VectorEnv):
    """Several environments stepped by action chunks: what every back end has in common.

    - `reset(seed=…, options=…)`: `seed` an int (environment i gets seed + i), an array of one seed per environment, or None (drawn
      from the vector's own generator). The same seed gives the same initial state, so equal seeds make a group.
      `options={"reset_mask": (B,) bool}` resets only some.
    - `step(chunk (B, n, A) in [-1, 1])` executes up to n actions in each environment that is still running. An environment stops at
      success, failure or its limit; from then on stepping it does nothing until it is reset (gymnasium's AutoresetMode.DISABLED).
    - Observation: `{"image": uint8 (B, cameras, H, W, 3), "state": float32 (B, S)}` after the last executed action.
    - `info`: "success" (B,) bool, whether the episode has succeeded; "steps" (B,) int, actions executed in this chunk; "lost" (B,)
      bool, whether the episode was cut off because its worker process died (the worker is replaced; the episode counts as
      truncated and should be dropped).

    Errors: EnvError, in one line, for all that is wrong with the task, its arguments, or the Vulkan driver.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED, "render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, spec: EnvSpec, num_envs: int, seed: int):
        self.spec, self.num_envs = spec, num_envs
        self._rng = np.random.default_rng(seed)
        self._running = np.zeros(num_envs, bool)
        self._success = np.zeros(num_envs, bool)

    def __repr__(self) -> str:  # gymnasium's expects a spec of its own kind
        return f"{type(self).__name__}({self.spec.env_id!r}, num_envs={self.num_envs})"

    def _describe(
        self, chunk: int, tasks: list[tuple[str, str]], *, action_dim: int, state_dim: int, cameras: tuple, max_episode_steps: int
    ) -> None:
        """Set the spaces and the attributes that learners read. tasks: id and instruction of each environment's."""
        if not 1 <= chunk <= max_episode_steps:
            raise EnvError(f"a chunk of {chunk} actions does not fit an episode of {max_episode_steps} steps")
        self.tasks, self.instructions = map(list, zip(*tasks))
        self.instruction = self.instructions[0]
        self.max_episode_steps, self.action_dim = max_episode_steps, action_dim
        size = self.spec.image_size if cameras else 0
        self.single_action_space = gym.spaces.Box(-1, 1, (chunk, action_dim), np.float32)
        self.single_observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (len(cameras), size, size, 3), np.uint8),
            state=gym.spaces.Box(-np.inf, np.inf, (state_dim,), np.float32),
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)

    def _reset_arguments(self, seed: int | Iterable[int] | None, options: dict | None) -> tuple[np.ndarray, np.ndarray]:
        """One seed per environment (B,) int, and which are to be reset (B,) bool."""
        if seed is None:
            seeds = self._rng.integers(2**31, size=self.num_envs)
        else:
            seeds = seed + np.arange(self.num_envs) if np.ndim(seed) == 0 else np.asarray(seed)
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)), bool)
        for name, array in (("seed", seeds), ("reset_mask", mask)):
            if array.shape != (self.num_envs,):
                raise EnvError(f"reset takes one {name} per environment ({self.num_envs}), got an array of shape {array.shape}")
        if len(set(zip(seeds[mask].tolist(), itertools.compress(self.tasks, mask)))) > len(set(seeds[mask].tolist())):
            raise EnvError(
                f"environments of one group (equal seeds) have different tasks: the number of environments per task "
                f"({self.num_envs} for {len(set(self.tasks))} tasks) must be a multiple of the group size"
            )
        return seeds, mask

    def _step_argument(self, chunk: np.ndarray) -> np.ndarray:
        """The chunk as float32 (B, n, A), no longer than an episode, after it has been found sound."""
        chunk = np.asarray(chunk, np.float32)
        if chunk.ndim != 3 or chunk.shape[0] != self.num_envs or chunk.shape[2] != self.action_dim:
            raise EnvError(f"step takes a chunk of shape ({self.num_envs}, n, {self.action_dim}), got {chunk.shape}")
        chunk = chunk[:, : self.max_episode_steps]
        if not np.isfinite(chunk[self._running]).all():
            raise EnvError("step got actions that are not finite numbers: the policy has diverged")
        return chunk


class ChunkVecEnv(ChunkEnv):
    """`ChunkEnv` on a pool of CPU processes, each holding some of the environments."""

    def __init__(self, spec: EnvSpec, num_envs: int, num_workers: int, *, chunk: int, seed: int, observe_terminal: bool):
        super().__init__(spec, num_envs, seed)
        self.observe_terminal = observe_terminal
        self._lost = np.zeros(num_envs, bool)  # died since the last step that could tell
        self._blocks: list[SharedMemory] = []
        self._restarts = 0
        num_workers = min(num_workers, num_envs)
        threads = max(1, num_cores() // num_workers)
        self._workers = [_Worker(w, spec, range(w, num_envs, num_workers), num_envs, threads) for w in range(num_workers)]
        self._where = {slot: (worker, i) for worker in self._workers for i, slot in enumerate(worker.slots)}
        try:
            tasks = [("", "")] * num_envs
            for worker in self._workers:
                facts, tasks[worker.index :: num_workers] = self._receive_or_fail(worker)
            self._describe(chunk, tasks, **facts)
        except BaseException:
            self.close()
            raise
        self._arrays, self._attach = {}, {}
        for name, shape, dtype in [
            ("image", self.observation_space["image"].shape, np.uint8),
            ("state", self.observation_space["state"].shape, np.float32),
            ("chunk", (num_envs, self.max_episode_steps, self.action_dim), np.float32),
        ]:
            block = SharedMemory(create=True, size=max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            self._blocks.append(block)
            self._arrays[name] = np.ndarray(shape, dtype, block.buf)
            self._attach[name] = (block.name, shape, dtype)
        for worker in self._workers:
            worker.send("attach", self._attach)
            self._receive_or_fail(worker)

    # gymnasium's interface

    def reset(self, *, seed: int | Iterable[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        seeds, mask = self._reset_arguments(seed, options)
        jobs = {slot: (int(seeds[slot]),) for slot in np.flatnonzero(mask)}
        dead = self._run("reset", jobs)[1] & mask
        if dead.any():  # its replacement starts from the same seeds; a second death in a row is an error
            if self._run("reset", {slot: jobs[slot] for slot in np.flatnonzero(dead)})[1].any():
                raise EnvError("an environment worker died twice while resetting")
        self._running[mask], self._success[mask], self._lost[mask] = True, False, False
        zeros = np.zeros(self.num_envs, int)
        return self._observation(), {"success": self._success.copy(), "steps": zeros, "lost": zeros.astype(bool)}

    def step(self, chunk: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        chunk = self._step_argument(chunk)
        n = chunk.shape[1]
        self._arrays["chunk"][:, :n] = chunk
        jobs = {slot: (n, self.observe_terminal) for slot in np.flatnonzero(self._running & ~self._lost)}
        outcomes = self._run("step", jobs)[0]
        lost, self._lost = self._lost, np.zeros(self.num_envs, bool)
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = ~self._running & self._success, lost.copy()
        steps = np.zeros(self.num_envs, int)
        for slot, *outcome in outcomes:
            reward[slot], terminated[slot], truncated[slot], self._success[slot], steps[slot] = outcome
        self._running &= ~(terminated | truncated)
        return self._observation(), reward, terminated, truncated, dict(success=self._success.copy(), steps=steps, lost=lost)

    def render(self, slots: Iterable[int] | None = None) -> list[np.ndarray]:
        """Pictures for people (H, W, 3) uint8 of the given environments (default: all), from the task's render camera."""
        slots = list(range(self.num_envs) if slots is None else slots)
        frames = dict(self._run("render", {slot: () for slot in slots})[0])
        blank = np.zeros((self.spec.video_size, self.spec.video_size, 3), np.uint8)
        return [frames.get(slot, blank) for slot in slots]

    def demonstrate(self, jobs: Iterable[dict]) -> Iterator[Any]:
        """Run `envs.demos.demonstrate(env, **job)` for every job, one at a time on each worker; yields results in their order.

        This ends all episodes of the pool: reset before the next step.
        """
        jobs = list(jobs)
        self._running[:] = False
        for start in range(0, len(jobs), len(self._workers)):
            batch = list(zip(self._workers, jobs[start : start + len(self._workers)], strict=False))
            for worker, job in batch:
                worker.send("demonstrate", job)
            for worker, _ in batch:
                yield self._receive_or_fail(worker)

    def close_extras(self, **kwargs: Any) -> None:
        for worker in self._workers:
            worker.send("close")
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
        for block in self._blocks:
            block.close()
            block.unlink()
        self._blocks = []

    # the pool

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: self._arrays[name].copy() for name in ("image", "state")}

    def _receive_or_fail(self, worker: _Worker) -> Any:
        try:
            return worker.receive()
        except EOFError:
            raise EnvError(
                f"environment worker {worker.index} died (exit code {worker.process.exitcode}): {self.spec.death}"
            ) from None

    def _run(self, command: str, jobs: dict[int, tuple]) -> tuple[list, np.ndarray]:
        """Send each slot's job to its worker. Returns all results and the mask of slots whose worker died (and was replaced)."""
        busy: dict[int, list] = {}
        for slot, job in jobs.items():
            worker, i = self._where[slot]
            busy.setdefault(worker.index, []).append((i, int(slot), *job))
        for index, payload in busy.items():
            self._workers[index].send(command, payload)
        results, dead = [], np.zeros(self.num_envs, bool)
        for index in busy:
            worker = self._workers[index]
            try:
                results += worker.receive() or []
            except EOFError:
                self._replace(worker)
                dead[list(worker.slots)] = True
        self._lost |= dead & self._running
        return results, dead

    def _replace(self, worker: _Worker) -> None:
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise EnvError(f"environment workers died {self._restarts} times: {self.spec.death}")
        warnings.warn(f"environment worker {worker.index} died and is replaced; its episodes are dropped", stacklevel=2)
        worker.start()
        self._receive_or_fail(worker)
        worker.send("attach", self._attach)
        self._receive_or_fail(worker)
