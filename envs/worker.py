"""A worker process of the pool: what starts it, and what it does. It imports the simulator, never the user's program."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pi_stepnft.envs import child
from pi_stepnft.envs.base import EnvError, Environment, Spec

Layout = dict[str, tuple[int, tuple[int, ...], str]]
"""Of the memory that parent and workers share: offset in bytes, shape and dtype of each array, by name."""


def layout(**arrays: tuple[tuple[int, ...], type]) -> tuple[Layout, int]:
    """Where arrays of these shapes and dtypes lie in memory, one behind the other, and how many bytes they take."""
    places, end = {}, 0
    for name, (shape, dtype) in arrays.items():
        places[name] = end, shape, np.dtype(dtype).str
        end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
    return places, max(1, end)


def reserve(memory: int, size: int) -> None:
    """Make the memory file so large, in bytes. Raises OSError where there is not so much: a worker would die of it later."""
    with open("/proc/meminfo") as file:
        free = next((1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")), size)
    if size > free:
        raise OSError(errno.ENOMEM, f"{free / 1e6:.0f} MB are free")
    os.ftruncate(memory, size)
    os.posix_fallocate(memory, 0, size)


def attach(memory: int, places: Layout, size: int) -> dict[str, np.ndarray]:
    """The arrays in the memory file `memory` (a descriptor), which last as long as somebody holds one of them."""
    block = mmap.mmap(memory, size)
    return {name: np.ndarray(shape, dtype, block, offset) for name, (offset, shape, dtype) in places.items()}


# ---------------------------------------------------------------------------------------------------------- the parent's side

KILLED = {
    signal.SIGKILL: "the system does that when memory runs out; take fewer environments, or smaller images",
    signal.SIGBUS: "there is no room for its memory; take fewer environments, or smaller images",
}
"""What stands behind signals that come from outside; of others, such as SIGSEGV, the simulator knows the likely cause."""


class Died(Exception):
    """A worker is gone; the message says how and why, as the end of a sentence."""


class Worker:
    """A process with the environments of some slots, so spaced that neighbours in a group land on different workers."""

    def __init__(self, index: int, spec: Spec, slots: range, among: tuple[int, int], threads: int, memory: int):
        """among: as of `envs.make`; memory: descriptor of the file that all workers of the pool and the parent map."""
        self.index, self.spec, self.slots, self.among, self.threads, self.memory = index, spec, slots, among, threads, memory
        self.start()

    def start(self) -> None:
        """A new process, in the place of one that has died if there was one; its first answer is `(facts, tasks)`."""
        self.pipe, end = Pipe()
        # lavapipe and OpenMP read their thread counts when they are loaded: hand them down, unless the user has set them.
        # lavapipe's are helpers. With none it draws where it is called, which is cheaper than to wait for a single one.
        threads = dict(OMP_NUM_THREADS=self.threads, LP_NUM_THREADS=self.threads if self.threads > 1 else 0)
        env = {name: str(number) for name, number in threads.items() if name not in os.environ}
        self.process = child.start(__name__, end.fileno(), self.memory, env=env)
        end.close()
        try:
            self.send("create", (self.spec, self.slots, self.among, self.threads))
        except BaseException:  # what cannot be pickled
            self.stop(0)
            raise

    def send(self, command: str, payload: Any = None) -> None:
        try:
            self.pipe.send((command, payload))
        except OSError:
            pass  # receive() finds out

    def receive(self, timeout: float | None = None) -> Any:
        """The answer to the last command. Raises EnvError for the worker's own errors, and Died when there is none to come.

        timeout: seconds of silence after which it is ended.
        """
        try:
            waited = 0.0
            while not self.pipe.poll(timeout and min(1.0, timeout)):  # second by second: this program may be paused
                waited += 1
                if waited >= timeout:
                    self.process.kill()
                    raise Died(f"was silent for {timeout:g} s: it hangs, or the machine is too busy for this --step-timeout")
            status, result = self.pipe.recv()
        except (EOFError, OSError):  # OSError: in the middle of its answer
            self.stop()
            raise Died(self._obituary()) from None
        if status == "error":
            raise EnvError(result)
        return result

    def _obituary(self) -> str:
        """How it died, and what may help."""
        code = self.process.returncode
        if code >= 0:
            return f"left with exit code {code}: its last words stand above"
        number = signal.Signals(-code)
        return f"died of {number.name}: {KILLED.get(number, self.spec.death)}"

    def stop(self, patience: float = 5.0) -> None:
        """End the process, after so many seconds by force."""
        self.send("close")
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.pipe.close()


# ---------------------------------------------------------------------------------------------------------- the worker's side


class ParentGone(Exception):
    pass


class _Line:
    """The pipe to the parent."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def receive(self) -> tuple[str, Any]:
        try:
            data = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise ParentGone from error
        return _unpickle(data)

    def send(self, status: str, result: Any) -> None:
        try:
            self.pipe.send((status, result))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ParentGone from error


def _unpickle(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except (AttributeError, ImportError) as error:
        raise EnvError(
            f"a worker process cannot import what it is to run ({error}): define it in a module, not in the program itself, and "
            "put the module's folder on PYTHONPATH"
        ) from None


def main(pipe: int, memory: int) -> None:
    """Serve commands from the pipe until told to close. Arrays travel through the memory file. Both are descriptors."""
    for descriptor in (pipe, memory):
        os.set_inheritable(descriptor, False)
    line = _Line(Connection(pipe))
    try:
        try:
            _serve(line, memory)
        except EnvError as error:
            line.send("error", str(error))
        except ParentGone:
            raise
        except BaseException as error:  # a bug: show where, and tell the parent in one line
            traceback.print_exc()
            reason = (str(error).splitlines() or [""])[0]
            line.send("error", f"an environment worker failed: {type(error).__name__}: {reason}")
    except ParentGone:
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # SAPIEN's destructors can hang at exit, and nothing is left to save


def _serve(line: _Line, memory: int) -> None:
    _, (spec, slots, (first, total), threads) = line.receive()
    commands = Commands([spec.create(first + slot, total) for slot in slots], memory)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    line.send("ok", commands.described())
    while True:
        command, payload = line.receive()
        if command == "close":
            return
        line.send("ok", getattr(commands, command)(payload))


class Commands:
    """What the pool can ask a worker to do. Jobs begin with (number of the environment in this worker, its slot in the pool, …)."""

    def __init__(self, envs: list[Environment], memory: int):
        self.envs, self.memory, self.arrays = envs, memory, {}

    def described(self) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """What all of them have in common, and the task and the instruction of each."""
        facts = {name: getattr(self.envs[0], name) for name in ("action_space", "state_dim", "cameras", "max_episode_steps")}
        return facts, [(env.task, env.instruction) for env in self.envs]

    def attach(self, payload: tuple[Layout, int]) -> None:
        self.arrays = attach(self.memory, *payload)

    def reset(self, jobs: list[tuple]) -> list[tuple]:
        first, image, state = {}, self.arrays["image"], self.arrays["state"]
        for i, slot, seed in jobs:  # equal seeds of a task make a group, whose first picture is drawn once
            self.envs[i].reset(seed)
            drawn = first.setdefault((self.envs[i].task, seed), slot)
            if drawn == slot:
                self.envs[i].observe(image[slot], state[slot])
            else:
                image[slot], state[slot] = image[drawn], state[drawn]
        return [(slot, self.envs[i].instruction) for i, slot, _ in jobs]

    def step(self, jobs: list[tuple]) -> list[tuple]:
        results = []
        for i, slot, length, observe_terminal in jobs:
            env = self.envs[i]
            reward, terminated, truncated, steps = env.step(self.arrays["chunk"][slot, :length])
            if observe_terminal or not terminated:
                env.observe(self.arrays["image"][slot], self.arrays["state"][slot])
            results.append((slot, reward, terminated, truncated, env.success, steps))
        return results

    def render(self, jobs: list[tuple]) -> list[tuple]:
        return [(slot, self.envs[i].render()) for i, slot in jobs]

    def call(self, payload: tuple[Callable, dict]) -> Any:
        function, kwargs = payload
        return function(self.envs[0], **kwargs)


class Inline:
    """In the place of a `Worker`: the same environments and commands in this very process."""

    def __init__(self, index: int, spec: Spec, slots: range, among: tuple[int, int], threads: int, memory: int):
        self.index, self.slots, self.process = index, slots, None
        with _own_random_numbers():
            self.commands = Commands([spec.create(among[0] + slot, among[1]) for slot in slots], memory)
        self.answers = deque([self.commands.described()])

    def send(self, command: str, payload: Any = None) -> None:
        if command != "close":
            with _own_random_numbers():
                self.answers.append(getattr(self.commands, command)(payload))

    def receive(self, timeout: float | None = None) -> Any:
        return self.answers.popleft()

    def stop(self, patience: float = 0.0) -> None:
        for env in self.commands.envs:
            env.close()


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Simulators seed NumPy's global generator, which in this process is also the user's: a learner that shuffles by it would draw
    the same numbers after every reset."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
