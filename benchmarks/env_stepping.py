"""What stepping costs in this checkout and in another one: environment steps per second of processor time.

    git worktree add ../before 7bd17de && python benchmarks/env_stepping.py ../before

Each has its environments in one worker process, on one and the same core. They play the same episodes in turns, in windows of less
than a second, with physics alone between them: as many steps of PhysX and nothing else. The medians of the windows are compared.
Processor time is that of the worker and of its parent, the renderer's threads included; on a machine with other users it tells more
than the wall's.

Prints a Markdown table, says in how many windows all observations were equal to the last bit, and writes a JSON file.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CHILD = Path(sys.argv[2]) if sys.argv[1:2] == ["--child"] else None
sys.path.insert(0, str(CHILD or HERE))  # a file of a checkout runs that checkout's code

import numpy as np  # noqa: E402
import tyro  # noqa: E402


@dataclass
class Args:
    baseline: tyro.conf.Positional[Path]
    """the other checkout"""
    env_id: str = "PickCube-v1"
    """the task"""
    modes: list[str] = field(default_factory=lambda: ["state", "rgb"])
    """observation modes"""
    image_size: int = 96
    """side of the pictures in mode rgb, px"""
    num_envs: int = 4
    """environments in the process"""
    chunk: int = 8
    """actions per chunk; the environments are observed after each"""
    episode_chunks: int = 6
    """chunks per episode"""
    episodes: int = 2
    """episodes of each environment in a window"""
    windows: int = 40
    """windows of each contestant"""
    out: Path = Path(__file__).parent / "results" / "env_stepping.json"
    """where the JSON file goes"""


# ------------------------------------------------------------------------------------------------------- in a process of a checkout


class Stepping:
    """Environments of a checkout, of version 0.1 too, whose packages lay bare."""

    def __init__(self, args: Args, mode: str):
        if (CHILD / "pi_stepnft").is_dir():
            from pi_stepnft import envs
            from pi_stepnft.envs.maniskill import Camera
        else:
            import envs
            from envs.maniskill import Camera
        self.args = args
        self.venv = envs.make(args.env_id, args.num_envs, num_workers=1, obs_mode=mode, image_size=args.image_size, backend="cpu",
                              camera=Camera(), max_episode_steps=args.chunk * args.episode_chunks)
        self.pids = [os.getpid(), self.venv._workers[0].process.pid]

    def clocks(self) -> np.ndarray:
        """Seconds: of the processor and of the wall."""
        return np.array([sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids), time.perf_counter()])

    def window(self, number: int) -> dict:
        """Steps made; seconds of all resets and of all else; a hash of the observations."""
        args, seen, spent, steps = self.args, hashlib.sha256(), np.zeros((2, 2)), 0
        for episode in range(args.episodes):
            seeds = args.num_envs * (number * args.episodes + episode) + np.arange(args.num_envs)
            rng, start = np.random.default_rng(seeds[0]), self.clocks()
            obs = self.venv.reset(seed=seeds)[0]
            spent[0] += self.clocks() - start
            for _ in range(args.episode_chunks):
                # Small random actions, with which hardly any episode succeeds
                actions = np.clip(0.1 * rng.standard_normal((args.num_envs, args.chunk, self.venv.action_dim)), -1, 1)
                start = self.clocks()
                obs, *_, info = self.venv.step(actions.astype(np.float32))
                spent[1] += self.clocks() - start
                steps += int(info["steps"].sum())
                seen.update(obs["image"].tobytes() + obs["state"].tobytes())
        return dict(steps=steps, reset=spent[0].tolist(), step=spent[1].tolist(), seen=seen.hexdigest())


class Physics:
    """The same scene and nothing but PhysX."""

    def __init__(self, args: Args, mode: str):
        from pi_stepnft import envs

        self.args, self.base = args, envs.simulator(args.env_id).spec(args.env_id, obs_mode="state").create(0, 1).base

    def window(self, number: int) -> dict:
        base, rng = self.base, np.random.default_rng(number)
        joints = [joint._objs[0] for joint in base.agent.robot.active_joints]
        rest = base.agent.robot._objs[0].qpos
        steps = self.args.num_envs * self.args.episodes * self.args.episode_chunks * self.args.chunk
        start = time.process_time(), time.perf_counter()
        for _ in range(steps):
            for joint, q in zip(joints, rest + 0.02 * rng.standard_normal(len(joints))):  # a robot at rest would be put to sleep
                joint.set_drive_target(q)
            for _ in range(base._sim_steps_per_control):
                base.scene.step()
        return dict(steps=steps, reset=[0, 0], step=[time.process_time() - start[0], time.perf_counter() - start[1]], seen="")


def serve() -> None:
    """Answer each number on standard input by that window, in what was standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    kind, args, mode = json.loads(sys.stdin.readline())
    contestant = dict(stepping=Stepping, physics=Physics)[kind](Args(**args), mode)
    for line in sys.stdin:
        print(json.dumps(contestant.window(int(line))), file=answers, flush=True)
    os._exit(0)  # SAPIEN's destructors can hang


# ------------------------------------------------------------------------------------------------------------------ in this process


class Contestant:
    """A process that runs the code of a checkout."""

    def __init__(self, checkout: Path, kind: str, args: Args, mode: str):
        env = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
        env["PYTHONPATH"] = str(checkout)
        self.process = subprocess.Popen([sys.executable, __file__, "--child", str(checkout)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=env)
        print(json.dumps([kind, asdict(args) | dict(baseline="", out=""), mode]), file=self.process.stdin, flush=True)

    def window(self, number: int) -> dict:
        print(number, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            sys.exit("error: a contestant died; its last words stand above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def commit_of(checkout: Path) -> str:
    git = lambda *words: subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def compare(args: Args, mode: str) -> dict:
    """Steps per second of every window, by clock and by what is counted; and how many windows were equal."""
    contestants = dict(ours=Contestant(HERE, "stepping", args, mode), physics=Contestant(HERE, "physics", args, mode),
                       baseline=Contestant(args.baseline.resolve(), "stepping", args, mode))
    windows: dict[str, list] = {name: [] for name in contestants}
    for number in range(args.windows + 1):
        for name, contestant in contestants.items():
            windows[name].append(contestant.window(number))
    for contestant in contestants.values():
        contestant.close()
    windows = {name: all_of[1:] for name, all_of in windows.items()}  # the first fills caches
    seconds = dict(stepping=lambda w, i: w["step"][i], episodes=lambda w, i: w["step"][i] + w["reset"][i])
    rates = {f"{what}, {clock}": {name: [w["steps"] / of(w, i) for w in windows[name]] for name in windows}
             for what, of in seconds.items() for i, clock in enumerate(("processor", "wall"))}
    equal = sum(ours["seen"] == theirs["seen"] for ours, theirs in zip(windows["ours"], windows["baseline"]))
    return dict(mode=mode, equal_windows=equal, load=os.getloadavg()[1], rates=rates)


def main(args: Args) -> None:
    commits = dict(ours=commit_of(HERE), baseline=commit_of(args.baseline))
    settings = asdict(args) | dict(baseline=commits["baseline"], out=args.out.name)
    report = dict(args=settings, commits=commits, cores=os.cpu_count(), results=[])
    print(f"{args.env_id}, {args.num_envs} environments in one process, chunks of {args.chunk}: environment steps per second, "
          f"medians of {args.windows} windows; {commits['ours']} against {commits['baseline']}\n")
    print("| observations | counted | ours | baseline | ratio | physics alone | ours of that |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for mode in args.modes:
        found = compare(args, mode)
        found["median"] = {}
        for what, rates in found["rates"].items():
            m = {name: float(np.median(values)) for name, values in rates.items()}
            m |= dict(ratio=m["ours"] / m["baseline"], share=m["ours"] / m["physics"])
            found["median"][what] = m
            print(f"| {mode} | {what} | {m['ours']:.0f} | {m['baseline']:.0f} | {m['ratio']:.2f} × | {m['physics']:.0f} | "
                  f"{100 * m['share']:.0f} % |", flush=True)
        print(f"\n{mode}: observations equal in {found['equal_windows']} of {args.windows} windows; load {found['load']:.1f}\n",
              flush=True)
        report["results"].append(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    serve() if CHILD else main(tyro.cli(Args, description=__doc__))
