"""What do the loaders make of damaged files? python benchmarks/fuzz.py --minutes 10

Tiny folders of every layout (policies, demonstrations, a run) are spoiled at random, by bytes and by what the format's own library
can write, and each is loaded in a process of its own. It may load, or be refused in one line. It must not raise anything else, die,
take longer than LIMIT, or more memory than twice the files and ROOM, or open what lies elsewhere. Writes results/fuzz.json, and a
folder in runs/fuzz for each case that fails, which `--only kind:number` repeats.
"""

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))  # which write every layout

import test_checkpoints
import test_datasets as D
import test_layouts as T
import torch
import tyro
from damage import spoil

from pi_stepnft import envs, harness, policies
from pi_stepnft.algos import stepnft_pi0
from pi_stepnft.envs import child, datasets

LIMIT, ROOM = 120, 100e6
"""s of a case (a reader of demonstrations ends itself after 20 of computing for nothing); bytes of memory beside twice the files"""
ROOT = Path(__file__).resolve().parents[1]
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
CASE, OUTSIDE, SCRATCH = WORK / "case", WORK / "outside", WORK / "scratch"  # names of one length, or damage would not repeat
WRITABLE = [str(SCRATCH), "/dev/null", "/proc/self"]
READABLE = [*WRITABLE, "/proc/stat", str(CASE), str(ROOT), sys.prefix, sys.base_prefix, *filter(None, sys.path)]


@dataclass
class Args:
    minutes: float = 10.0
    """for which cases are tried"""
    seed: int = 1
    """of the damage"""
    only: tuple[str, ...] = ()
    """names in KINDS, or one case as kind:number; default: every kind in turn"""
    output: str = str(ROOT / "benchmarks" / "results" / "fuzz.json")
    """file for the result"""


def make_run(folder: Path) -> None:
    training = test_checkpoints.Training(folder)
    for _ in range(2):
        training.step().save()
    (folder / "args.json").write_text(json.dumps(asdict(stepnft_pi0.Args())))


def resume_run(folder: Path) -> None:
    harness.args.check(harness.args.resumed(stepnft_pi0.Args(resume=str(folder))))
    test_checkpoints.Training(folder).resume()


LEROBOT, OPENPI = partial(policies.load, **T.UNSEEN), partial(policies.load, **T.UNSEEN, **T.REST)
DEMOS = {
    "own": lambda f, episodes: D.write_own(f / "t.h5", episodes),
    "libero": lambda f, episodes: D.write_libero(f / "t.hdf5", episodes, D.TEXTS[0]),
    "maniskill": lambda f, episodes: D.write_maniskill(f / "t.h5", episodes, "rgb"),
    **{f"lerobot-{version}-{pictures}": partial(D.write_lerobot, version=version, pictures=pictures)
       for version in ("v2.1", "v3.0") for pictures in ("image", "video")},
}
KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "own-pi0": (lambda f: policies.save(T.make_policy(), f), policies.load),
    "own-pi05": (lambda f: policies.save(T.make_policy("pi05"), f), policies.load),
    "exported": (lambda f: policies.export(T.make_policy("pi05"), f, "lab/x"), policies.load),
    "openpi": (lambda f: T.write_openpi(f, T.make_policy()), OPENPI),
    "openpi-shards": (lambda f: T.write_shards(T.write_openpi(f, T.make_policy())), OPENPI),
    "rlinf": (lambda f: T.write_tokenizer(T.write_openpi(f, T.make_policy("pi05"), asset="lab/x", tokenizer=False)), OPENPI),
    "lerobot-pi0": (lambda f: T.write_pipelines(T.write_lerobot(f, T.make_policy())), LEROBOT),
    "lerobot-pi05": (lambda f: T.write_pipelines(T.write_lerobot(f, T.make_policy("pi05"))), LEROBOT),
    "lerobot-before-0.4": (lambda f: T.write_lerobot(f, T.make_policy(), steps=False), LEROBOT),
    **{f"demos-{name}": (lambda f, write=write: write(f, D.make_episodes()), datasets.read) for name, write in DEMOS.items()},
    "run": (make_run, resume_run),
}
"""What makes a folder, and what loads it."""


def memory(process: str, name: str) -> int:
    """Bytes."""
    return 1024 * int(Path(f"/proc/{process}/status").read_text().partition(f"{name}:")[2].split()[0])


def decoders_memory(session: int) -> int:
    """The most bytes that an ffmpeg of a session has had: a program begins with memory of its own, of which wait4 does not tell."""
    found = [0]
    for place in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError, IndexError):  # it may end any time
            if place.read_text().startswith("ffmpeg") and os.getsid(int(place.parent.name)) == session:
                found.append(memory(place.parent.name, "VmHWM"))
    return max(found)


def in_a_fork(work: Callable[[Callable[[str], Any]], None]) -> tuple[list[str], float, float]:
    """The lines that `work` tells in a process of its own, with a last one where it died; s of computing; bytes of memory beside
    this process's, the most that it, or something that it started, had."""
    told, tell = os.pipe()
    if not (pid := os.fork()):
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of its memory is what it has
        os.write(tell, b"%d\n" % memory("self", "VmRSS"))
        work(lambda line: os.write(tell, line.encode(errors="replace") + b"\n"))
        os._exit(0)
    os.close(tell)
    text, programs, end = b"", 0, time.monotonic() + LIMIT
    while time.monotonic() < end:
        if not select.select([told], [], [], 0.03)[0]:
            programs = max(programs, decoders_memory(pid))
        elif not (part := os.read(told, 1 << 16)):
            break
        else:
            text += part
    os.killpg(pid, signal.SIGKILL)  # it and what it started; it is there until it is waited for
    os.close(told)
    _, status, usage = os.wait4(pid, 0)
    start, *lines = text.decode(errors="replace").splitlines()
    lines += ["hung" if time.monotonic() >= end else f"died: status {os.waitstatus_to_exitcode(status)}"] * bool(status)
    return lines, usage.ru_utime + usage.ru_stime, max(programs, 1024 * usage.ru_maxrss - int(start))


def fork_reader(module: str, *descriptors: int) -> multiprocessing.Process:
    """In place of `child.start`: the reader of demonstrations is a fork as well, which starts at once and is watched too."""
    process = multiprocessing.get_context("fork").Process(target=importlib.import_module(module).main, args=descriptors)
    process.wait = lambda: process.join() or process.exitcode
    process.start()
    return process


def watch(tell: Callable[[str], Any]) -> None:
    """From now on this process, and forks of it, tell what they open, list or change elsewhere, and what they connect to."""

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(("socket.connect", "socket.getaddrinfo")):
            tell(event)
        elif event in ("open", "subprocess.Popen") or event.startswith("os.") and not event.endswith("env"):
            if not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
                return
            reads = event in ("os.listdir", "os.scandir", "subprocess.Popen") or event == "open" and not arguments[2] & os.O_ACCMODE
            place = os.path.abspath(os.fsdecode(arguments[0]))
            if not any(f"{place}/".startswith(f"{root}/") for root in (READABLE if reads else WRITABLE)):
                tell(f"{event} {place}")

    sys.addaudithook(hook)


def load(kind: str, tell: Callable[[str], Any]) -> None:
    watch(tell)
    try:
        KINDS[kind][1](CASE)
        tell("loaded")
    except (envs.EnvError, policies.CheckpointError, harness.RunError) as error:
        text = str(error)
        died = "; the reader died" * ("reading it crashed" in text) or "; the reader went in circles" * ("came to no end" in text)
        tell(f"{type(error).__name__}{died}: {text}")
    except BaseException as error:
        where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[::-1][:5])
        tell(f"raised {error!r:.300} in {where}")


def opened(notify: int) -> bool:
    """Whether the file that inotify watches has been opened since this was last asked, be it by a library."""
    return bool(select.select([notify], [], [], 0)[0] and os.read(notify, 1 << 16))


def case(kind: str, number: int, seed: int, notify: int) -> tuple[str, str | None, float, float]:
    """What became of a case, in a word; what is wrong with that; s of computing; bytes of memory over twice the files."""
    shutil.rmtree(CASE, ignore_errors=True)
    shutil.copytree(WORK / kind, CASE, symlinks=True)
    if number:
        in_a_fork(lambda tell: spoil(CASE, random.Random(f"{seed} {kind} {number}"), str(OUTSIDE)))
    size = sum(path.lstat().st_size for path in CASE.rglob("*") if path.is_file())
    opened(notify)
    lines, seconds, beside = in_a_fork(partial(load, kind))
    lines += [f"opened {OUTSIDE}"] * opened(notify)
    if len(lines) != 1 or not re.match("loaded|(Env|Checkpoint|Run)Error", lines[0]):
        return "other", "; ".join(lines)[:2000], seconds, beside - 2 * size
    wrong = f"{beside / 1e6:.0f} MB of memory for {size / 1e6:.2f} MB of files" if beside > 2 * size + ROOM else None
    return lines[0].partition(":")[0], wrong, seconds, beside - 2 * size


def main(args: Args) -> None:
    chosen = dict(name.partition(":")[::2] for name in args.only or KINDS)
    torch.set_num_threads(1)  # a fork has no others
    tempfile.tempdir = str(SCRATCH)
    OUTSIDE.write_bytes(bytes(1000))
    notify = ctypes.CDLL(None).inotify_init()
    ctypes.CDLL(None).inotify_add_watch(notify, bytes(OUTSIDE), 0x20)  # IN_OPEN
    child.start = fork_reader
    envs.simulator("PickCube-v1").instruction("PickCube-v1")  # what they import is imported once, not in each process
    policies.load("pi0-tiny-pickcube-rgb")
    for folder in (SCRATCH, *map(WORK.joinpath, chosen)):
        folder.mkdir(exist_ok=True)
    for kind in chosen:
        in_a_fork(lambda tell, kind=kind: KINDS[kind][0](WORK / kind))
    found = {kind: dict(cases=0, outcomes=Counter(), worst_s=0.0, worst_mb=0.0, failures=[]) for kind in chosen}
    kept = Path("runs/fuzz", time.strftime("%Y%m%d-%H%M%S"))
    kept.mkdir(parents=True)
    begin, turn = time.monotonic(), 0
    while time.monotonic() - begin < 60 * args.minutes and (not turn or not all(chosen.values())):
        for kind, only in chosen.items():
            number = int(only or turn)
            what, wrong, seconds, memory = case(kind, number, args.seed, notify)
            if not number and (what, wrong) != ("loaded", None):
                sys.exit(f"{kind}: what is not damaged: {what}, {wrong}")
            row = found[kind]
            row["outcomes"][what] += 1
            row.update(cases=row["cases"] + 1, worst_s=max(row["worst_s"], seconds), worst_mb=max(row["worst_mb"], memory / 1e6))
            if only or wrong:
                print(f"{kind}:{number}: {what}, {wrong}, {seconds:.1f} s, {memory / 1e6:.0f} MB", flush=True)
                row["failures"] += [f"{kind}:{number}: {wrong}"] * bool(wrong)
                subprocess.run(["cp", "-a", CASE, kept / f"{kind}-{number}"], check=True)  # shutil copies no pipes
        turn += 1
    result = dict(commit=harness.commit(), seed=args.seed, seconds=round(time.monotonic() - begin), kinds=found)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(row["failures"] for row in found.values()))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    finally:
        shutil.rmtree(WORK)
