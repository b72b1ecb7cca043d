"""`ChunkVecEnv`: the vector environment on a pool of worker processes."""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pi_stepnft.envs.base import EnvError, Spec, num_cores
from pi_stepnft.envs.vector import ChunkEnv
from pi_stepnft.envs.worker import Died, Inline, Worker, attach, layout, reserve

MAX_RESTARTS = 30
"""How many dead workers a pool replaces within an hour before it gives up: what goes wrong again and again is no accident."""
START_TIMEOUT = 1800.0
"""s that a worker may take to build its environments."""
RESETS = 3
"""How often an episode is begun, whose worker dies of that each time."""


class ChunkVecEnv(ChunkEnv):
    """`ChunkEnv` on a pool of CPU processes, each holding some of the environments."""

    overlaps = True

    def __init__(self, spec: Spec, num_envs: int, num_workers: int, *, chunk: int, seed: int, observe_terminal: bool,
                 step_timeout: float, among: tuple[int, int]):
        """num_workers: 0 for none: the environments live in this process. step_timeout: seconds of silence after which a worker is
        taken for dead. among: as of `envs.make`."""
        super().__init__(spec, num_envs, seed)
        self.observe_terminal, self.step_timeout = observe_terminal, step_timeout
        self._lost = np.zeros(num_envs, bool)  # died since the last step that could tell
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)  # when, of a clock in seconds
        kind, num_workers = (Worker, min(num_workers, num_envs)) if num_workers else (Inline, 1)
        threads = max(1, num_cores() // num_workers)
        self._memory = os.memfd_create("pi-stepnft")  # nameless: it goes with the processes, however they end
        self._workers: list[Worker | Inline] = []
        try:
            for w in range(num_workers):
                self._workers.append(kind(w, spec, range(w, num_envs, num_workers), among, threads, self._memory))
            self._where = {slot: (worker, i) for worker in self._workers for i, slot in enumerate(worker.slots)}
            tasks = [("", "")] * num_envs
            for worker in self._workers:
                facts, tasks[worker.index :: num_workers] = self._receive_or_fail(worker, START_TIMEOUT)
            self._describe(chunk, tasks, **facts)
            self._layout = layout(
                image=(self.observation_space["image"].shape, np.uint8),
                state=(self.observation_space["state"].shape, np.float32),
                chunk=((num_envs, self.max_episode_steps, self.action_dim), np.float32),
            )
            try:
                reserve(self._memory, self._layout[1])
            except OSError as error:
                raise EnvError(
                    f"no memory for the observations of {num_envs} environments, {self._layout[1] / 1e6:.0f} MB "
                    f"({error.strerror}): take fewer, or smaller images"
                ) from None
            self._arrays = attach(self._memory, *self._layout)
            for worker in self._workers:
                worker.send("attach", self._layout)
                self._receive_or_fail(worker, START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    # gymnasium's interface

    def reset(self, *, seed: int | Iterable[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.reset_async(seed=seed, options=options)
        return self.reset_wait()

    def reset_async(self, *, seed: int | Iterable[int] | None = None, options: dict | None = None) -> None:
        seeds, mask = self._reset_arguments(seed, options)
        jobs = {slot: (int(seeds[slot]),) for slot in np.flatnonzero(mask)}
        self._asked.append((mask, jobs, self._send("reset", jobs)))

    def reset_wait(self) -> tuple[dict, dict]:
        mask, jobs, sent = self._asked.popleft()
        told, dead = self._receive(sent)
        begun = 1
        while jobs := {slot: job for slot, job in jobs.items() if dead[slot]}:  # they are for the replacement of their worker
            if begun == RESETS:
                raise EnvError(f"seed {next(iter(jobs.values()))[0]}: resetting to it ended {RESETS} workers")
            more, dead = self._receive(self._send("reset", jobs))
            told, begun = told + more, begun + 1
        for slot, instruction in told:
            self.instructions[slot] = instruction
        self._running[mask], self._success[mask], self._lost[mask] = True, False, False
        zeros = np.zeros(self.num_envs, int)
        return self._observation(), {"success": self._success.copy(), "steps": zeros, "lost": zeros.astype(bool)}

    def step(self, chunk: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.step_async(chunk, np.ones(self.num_envs, bool))
        return self.step_wait()

    def step_async(self, chunk: np.ndarray, mask: np.ndarray) -> None:
        chunk, broken = self._step_argument(chunk)
        self._lost |= broken & mask
        n = chunk.shape[1]
        self._arrays["chunk"][mask, :n] = chunk[mask]
        jobs = {slot: (n, self.observe_terminal) for slot in np.flatnonzero(mask & self._running & ~self._lost)}
        self._asked.append((mask, jobs, self._send("step", jobs)))

    def step_wait(self) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        mask, _, sent = self._asked.popleft()
        outcomes, _ = self._receive(sent)
        lost = self._lost & mask
        self._lost &= ~mask
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = ~self._running & self._success, lost.copy()
        steps = np.zeros(self.num_envs, int)
        for slot, *outcome in outcomes:
            reward[slot], terminated[slot], truncated[slot], self._success[slot], steps[slot] = outcome
        self._running &= ~(terminated | truncated)
        return self._observation(), reward, terminated, truncated, dict(success=self._success.copy(), steps=steps, lost=lost)

    def render(self, slots: Iterable[int] | None = None) -> list[np.ndarray]:
        """Pictures for people (H, W, 3) uint8 of the given environments (default: all), from the task's render camera."""
        self._check_open()
        slots = list(range(self.num_envs) if slots is None else slots)
        frames = dict(self._receive(self._send("render", {slot: () for slot in slots}))[0])
        blank = np.zeros((self.spec.video_size, self.spec.video_size, 3), np.uint8)
        return [frames.get(slot, blank) for slot in slots]

    def call(self, function: Callable, jobs: Iterable[dict]) -> Iterator[Any]:
        """Run `function(environment, **job)` for every job, one at a time on each worker; yields results in their order.

        function: of a module, such as `envs.demos.demonstrate`. This ends all episodes of the pool: reset before the next step.
        """
        self._check_open()
        jobs = list(jobs)
        self._running[:] = False
        for start in range(0, len(jobs), len(self._workers)):
            batch = list(zip(self._workers, jobs[start : start + len(self._workers)], strict=False))
            for worker, job in batch:
                worker.send("call", (function, job))
            for worker, _ in batch:
                yield self._receive_or_fail(worker)

    def close_extras(self, **kwargs: Any) -> None:
        for worker in self._workers:
            worker.send("close")
        for worker in self._workers:
            worker.stop()
        self._workers, self._arrays = [], {}
        if self._memory is not None:
            os.close(self._memory)
        self._memory = None

    # the pool

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: self._arrays[name].copy() for name in ("image", "state")}

    def _receive_or_fail(self, worker: Worker, timeout: float | None = None) -> Any:
        try:
            return worker.receive(timeout)
        except Died as death:
            raise EnvError(f"environment worker {worker.index} {death}") from None

    def _send(self, command: str, jobs: dict[int, tuple]) -> dict[Worker, subprocess.Popen]:
        """Send each slot's job to its worker. Returns the workers that have one, and their processes, as they are now."""
        payloads: dict[Worker, list] = {}
        for slot, job in jobs.items():
            worker, i = self._where[slot]
            payloads.setdefault(worker, []).append((i, int(slot), *job))
        for worker, payload in payloads.items():
            worker.send(command, payload)
        return {worker: worker.process for worker in payloads}

    def _receive(self, sent: dict[Worker, subprocess.Popen]) -> tuple[list, np.ndarray]:
        """All results of what was sent, and the mask (B,) of slots whose worker died (and was replaced)."""
        results, dead = [], np.zeros(self.num_envs, bool)
        for worker, process in sent.items():
            try:
                if worker.process is process:
                    results += worker.receive(self.step_timeout) or []
                else:  # it died of what it was asked before this
                    dead[list(worker.slots)] = True
            except Died as death:
                self._replace(worker, death)
                dead[list(worker.slots)] = True
        self._lost |= dead & self._running
        return results, dead

    def _replace(self, worker: Worker, death: Died) -> None:
        """A new process in place of one that has died; of a further one, where that dies as it starts."""
        now = time.monotonic()
        if len(self._restarts) == MAX_RESTARTS and now - self._restarts[0] < 3600:
            raise EnvError(f"environment workers died {MAX_RESTARTS + 1} times within an hour; the last one {death}")
        self._restarts.append(now)
        warnings.warn(f"environment worker {worker.index} {death}. It is replaced; its episodes are dropped", stacklevel=2)
        worker.stop(0)
        worker.start()
        try:
            worker.receive(START_TIMEOUT)
            worker.send("attach", self._layout)
            worker.receive(START_TIMEOUT)
        except Died as again:
            self._replace(worker, again)
