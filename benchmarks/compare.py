"""Algorithms side by side: runs what is missing, then writes tables, pictures and commands into docs/.

    python benchmarks/compare.py --algos stepnft ppo stepnft-pi05 --tasks PickCube-v1 --obs-mode state --seeds 1 2 3
    python benchmarks/compare.py --algos stepnft ppo grpo nft rft critic --iterations 60 --seeds 1 2 3
    python benchmarks/compare.py --ablations loss-wmse target-x0 --seeds 1 2 3     # or all of them: --ablations
    python benchmarks/compare.py --tuning --algos ppo grpo --seeds 1              # the TRIALS of each, on tuning episodes
    python benchmarks/compare.py --algos stepnft ppo --ood 100                     # and each policy out of distribution
    python benchmarks/compare.py                                                   # only the report, from what is there

A run is a process of its own and leaves benchmarks/results/<label>-<task>-<mode>-<seed>.json (those of --tuning and --ablations in
folders of that name), with its command, versions, arguments and curve. A run whose file is there is not repeated, an interrupted
one is gone on with, and a failed one does not stop the others. Their output is in runs/compare/. --dry-run says what would be done.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import cycle, groupby, repeat, zip_longest
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import pages
from pages import load, markdown, rate, read, spread
from tqdm import tqdm

from pi_stepnft import envs, harness

ROOT = Path(__file__).resolve().parents[1]

ABLATIONS = {
    f"stepnft-{name}": extra
    for name, extra in {
        "default": "",
        # the ablations of the paper, each a change to the defaults of the file
        "target-mean": "--target mean",
        "target-x0": "--target x0",
        "target-x0-ema-start-0.9": "--target x0 --ema-start 0.9",
        "loss-wmse": "--loss wmse",
        "loss-positive": "--loss positive",
        "loss-negative": "--loss negative",
        "noise-0.05": "--noise-level 0.05",
        "noise-0.1": "--noise-level 0.1",
        "noise-0.2": "--noise-level 0.2",
        "noise-0.3": "--noise-level 0.3",
        "noise-0.5": "--noise-level 0.5",
        "beta-0.1": "--beta 0.1",
        "beta-0.5": "--beta 0.5",
        "beta-2": "--beta 2",
        "beta-5": "--beta 5",
        "ema-start-0.9": "--ema-start 0.9",
        "transitions-random": "--transitions random",
        **{f"transitions-{step}": f"--transitions {step}" for step in range(4)},
        # what the paper does not vary
        "labels-binary": "--labels binary",
        "labels-group": "--labels group --group-size 16",
        "max-drift-0.1": "--max-drift 0.1",
        "max-drift-2": "--max-drift 2",
        "ema-end-0.9": "--ema-end 0.9",
        "ema-horizon-1000": "--ema-end 0.995 --ema-horizon 1000",
    }.items()
}
"""Label → the change to StepNFT's plain command. All are one third as long as its runs (SHORT), while success climbs."""
SHORT = "--iterations 40 --max-minutes 0 --eval-every 0"

TRIALS = {
    "stepnft": ["", "--learning-rate 3e-5", "--update-epochs 4 --learning-rate 3e-5", "--noise-level 0.4"],
    "ppo": ["", "--learning-rate 1e-5 --noise-level 0.5", "--noise-level 0.5", "--noise-level 0.5 --no-bootstrap"],
    "grpo": ["", "--learning-rate 1e-4 --noise-level 0.5", "--noise-level 0.5", "--learning-rate 1e-4"],
    "nft": [f"--noise-level 0 --group-size 16 --labels {extra}" for extra in (
        "group --learning-rate 3e-5 --weighting none", "group --weighting none", "binary --weighting none",
        "group --weighting none --beta 0.1", "group --learning-rate 3e-5 --weighting none --ema-start 0.9 --ema-end 0.9",
        "group --learning-rate 3e-5 --weighting none --draws 16", "group --learning-rate 1e-5 --weighting none",
        "group --learning-rate 3e-5", "group --learning-rate 3e-5 --times solver")],
    "rft": [*(f"{extra} --replay 1" for extra in (
        "--learning-rate 1e-4", "--learning-rate 1e-4 --noise-level 0.3", "--noise-level 0.3",
        "--learning-rate 1e-4 --noise-level 0.3 --contrast --group-size 4", "", "--learning-rate 1e-5 --draws 16",
        "--noise-level 0.7", "--contrast --group-size 4")), ""],
    "critic": ["", "--distance 0.06", "--distance 0.015", "--n-step 8"],
}
"""Algorithm → what --tuning tries, as changes to its plain command, TUNING long: four trials each, and five more for those that no
trial of the first four had improved. The results of 0.1.0 were named by changes to the defaults of then."""
TUNING = f"--iterations 40 --max-minutes 0 --eval-seed {envs.TUNING_SEED}"

OTHERS = {"nft-paper": ("nft", "--labels group --group-size 16 --noise-level 0 --learning-rate 3e-5")}
"""What --algos takes beside the names of files: an algorithm under settings that are not its defaults."""

EQUAL = ("checkpoint", "iterations", "max_minutes", "num_envs", "rollout_epochs", "rollout_steps", "execute", "eval_every",
         "eval_episodes", "final_eval_episodes", "eval_seed")
"""Arguments that have to be the same for a comparison on equal terms; the report names those that are not."""

CHECKPOINT = "checkpoints/last/training.json"
"""Of a run's folder: how far it has come."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, told apart by everyone
STYLES = [dict(color=colour, linestyle=line) for line in ("-", "--") for colour in COLOURS]  # of lines, until they repeat
PAGE = "docs/notebook/comparison.md"


@dataclass
class Args:
    algos: list[str] = field(default_factory=list)
    """algorithms to run, for π0 by their names, stepnft ppo …, for π0.5 as stepnft-pi05 ppo-pi05 …; nft-paper:
    DiffusionNFT by the paper's labels, without noise"""
    tasks: list[str] = field(default_factory=lambda: ["PickCube-v1"])
    """tasks to run them on"""
    obs_mode: Literal["rgb", "state"] = "state"
    """as of the algorithms"""
    seeds: list[harness.Seed] = field(default_factory=lambda: [1])
    """seeds; everything is run with the first one, then with the next"""
    ablations: list[str] | None = None
    """run these of StepNFT's ABLATIONS (listed in this file), which are shorter than its runs; without a name: all of them"""
    tuning: bool = False
    """run the TRIALS (listed in this file) of each algorithm, which are short and on the tuning episodes"""
    iterations: harness.CountOrZero = 0
    """run so many iterations, however long they take, of what is then called stepnft-60, ppo-60 …; 0: the plain commands"""
    extra: str = ""
    """further arguments for every run, in one string, e.g. --extra="--max-minutes 10" """
    ood: harness.CountOrZero = 0
    """evaluate what was trained, and what it started from, in so many episodes of each out-of-distribution variant; 0: not.
    Runs that are there get theirs if their folder is"""
    dry_run: bool = False
    """print which runs are there, interrupted or missing, and their commands; run nothing"""


class RunError(Exception):
    """A run that left no result."""


# ---------------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Job:
    label: str
    algorithm: str  # as in --algos
    env_id: str
    obs_mode: str
    seed: int
    extra: str = ""
    folder: str = ""  # under benchmarks/results

    @property
    def name(self) -> str:
        return f"{self.label}-{harness.slug(self.env_id)}-{self.obs_mode}-{self.seed}"

    @property
    def arguments(self) -> list[str]:
        where = f"--env-id {self.env_id} --obs-mode {self.obs_mode} --seed {self.seed}"
        return shlex.split(f"{program(self.algorithm)} {where} {self.extra}")

    @property
    def command(self) -> str:
        return "python " + shlex.join(self.arguments)

    @property
    def target(self) -> Path:
        return ROOT / "benchmarks" / "results" / self.folder / f"{self.name}.json"

    @property
    def state(self) -> Path:
        """Where the run's folder is noted; its output is beside it."""
        return ROOT / "runs" / "compare" / f"{self.name}.json"


def short(name: str) -> str:
    """An algorithm's label, with which its run folders' names begin; also of what its file was once called: ppo_pi05 → ppo-pi05."""
    return name.removesuffix("_pi0").replace("_", "-")


def program(algorithm: str) -> str:
    """The beginning of its command: ppo-pi05 → algos/ppo.py --policy pi05; StepNFT has a file for each policy."""
    name, policy = algorithm.removesuffix("-pi05"), "pi05" if algorithm.endswith("-pi05") else "pi0"
    if (ROOT / "algos" / f"{name}_{policy}.py").is_file():
        return f"algos/{name}_{policy}.py"
    return f"algos/{name}.py" + (" --policy pi05" if policy == "pi05" else "")


def slug(text: str) -> str:
    """Words of a command as part of a file's name: "ppo --noise-level 1.0" → "ppo-noise-level-1.0"."""
    return re.sub(r"[^a-z0-9.]+", "-", text)


def plan(args: Args) -> list[Job]:
    """All jobs in their order: evidence grows evenly if the queue is cut short. Exits with one line for unknown names."""
    ablations = list(ABLATIONS) if args.ablations == [] else [f"stepnft-{n.removeprefix('stepnft-')}" for n in args.ablations or ()]
    if args.tuning and ablations:
        sys.exit("error: --tuning tries each of --algos, --ablations is another call")
    if args.tuning and args.ood:
        sys.exit("error: --ood evaluates on the reported episodes, on which --tuning chooses nothing")
    for label in ablations:
        if label not in ABLATIONS:
            sys.exit(f"error: no ablation {label}; there are {', '.join(ABLATIONS)}")
    algos = [short(name) for name in args.algos]
    for name in algos:
        if not (ROOT / (file := program(OTHERS.get(name, (name, ""))[0]).split()[0])).is_file():
            sys.exit(f"error: no {file}")
        if args.tuning and name.removesuffix("-pi05") not in TRIALS:
            sys.exit(f"error: no TRIALS for {name}; there are some for {', '.join(TRIALS)}")
    if args.tuning:
        entries = {
            slug(f"{algorithm} {extra.strip() or 'default'}"): (algorithm, f"{extra} {TUNING}", "tuning")
            for trials in zip_longest(*(zip(repeat(a), TRIALS[a.removesuffix("-pi05")]) for a in algos))
            for algorithm, extra in filter(None, trials)
        }
    else:
        length, number = (f"--iterations {args.iterations} --max-minutes 0", f"-{args.iterations}") if args.iterations else ("", "")
        entries = {}
        for name in algos:
            algorithm, settings = OTHERS.get(name, (name, ""))
            entries[name + number] = algorithm, f"{settings} {length}", ""
        entries |= {label: ("stepnft", f"{ABLATIONS[label]} {SHORT}", "ablations") for label in ablations}
    return [
        Job(label, algorithm, env_id, args.obs_mode, seed, f"{extra} {args.extra}", folder)
        for seed in args.seeds
        for env_id in args.tasks
        for label, (algorithm, extra, folder) in entries.items()
    ]


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2))
    os.replace(path.with_suffix(".tmp"), path)


def interrupted(job: Job) -> dict | None:
    """The state of a job that began by the same command and left a checkpoint: its run folder and first arguments."""
    if not job.state.exists():
        return None
    state = read(job.state)
    folder = ROOT / state["run"]
    if state["command"] != job.command or not (folder / CHECKPOINT).exists() or folder not in begun(job):
        return None
    return {"args": read(folder / "args.json")} | state  # resuming writes its own time limit to args.json


def resume_arguments(job: Job, state: dict) -> list[str]:
    """Arguments that go on with a run, for the rest of its iterations and minutes."""
    args, trained_s = state["args"], read(ROOT / state["run"] / CHECKPOINT)["progress"]["trained_s"]
    limit = args["max_minutes"]
    minutes = f"{max(0.01, limit - trained_s / 60):.2f}" if limit else "0"
    return [program(job.algorithm).split()[0], "--resume", state["run"], "--iterations", str(args["iterations"]),
            "--max-minutes", minutes, "--num-threads", str(args["num_threads"])]


def status(job: Job) -> str:
    if job.target.exists():
        command = read(job.target)["command"]
        return "done" if command == job.command else f"done, by another command ({command})"
    state = interrupted(job)
    return f"interrupted ({state['run']})" if state else "missing"


def run(job: Job) -> None:
    """Run or go on with one job and store its result. Raises RunError, with the end of its output, if there is none."""
    job.state.parent.mkdir(parents=True, exist_ok=True)
    with open(job.state.with_suffix(".log"), "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run holds it too, and would if this program were killed
        except BlockingIOError:
            raise RunError("another process is at it") from None
        if job.target.exists():  # by another process, since this one began
            return
        began, state = log.tell(), interrupted(job)
        if state:
            write(job.state, state)
        if not state or not (ROOT / state["run"] / "result.json").exists():
            arguments = resume_arguments(job, state) if state else job.arguments
            state, code = follow(job, arguments, state, log)
            if code or not state:
                output = Path(log.name).read_bytes()[began:].decode(errors="replace")
                tail = [line for line in re.split(r"[\r\n]+", output) if line.strip()][-15:]
                hint = f"; to begin anew, delete {job.state.relative_to(ROOT)}" if interrupted(job) else ""
                raise RunError("\n    ".join([f"exit status {code}{hint}; the end of {log.name}:", *tail]))
    result = read(ROOT / state["run"] / "result.json")
    if "--resume" in result["command"]:
        result = result | {"command": job.command, "resumed_by": result["command"], "args": state["args"]}
    if result["command"] != job.command:
        raise RunError(f"{state['run']} is the folder of another command: {result['command']}")
    write(job.target, result | {"run": state["run"]})
    job.state.unlink()


def begun(job: Job) -> set[Path]:
    """Folders of runs that began by the job's command, as their checkpoints tell: others may run beside it, and begin alike."""

    def commands(config: Path) -> list[str]:
        return [made.get("command") for made in read(config)["meta"].values() if isinstance(made, dict)]

    configs = (ROOT / "runs").glob("*/checkpoints/last/policy/config.json")
    return {config.parents[3] for config in configs if job.command in commands(config)}


def follow(job: Job, arguments: list[str], state: dict | None, log) -> tuple[dict | None, int]:
    """Start a process and wait for it; note its run folder as soon as there is one. Returns the state and the exit status."""
    earlier = begun(job)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log, env=environment,
                               start_new_session=True)  # Ctrl-C comes to it from here alone, once
    try:
        code = None
        while code is None:
            code = process.poll()
            if not state and (new := begun(job) - earlier):
                state = {"command": job.command, "run": str(min(new).relative_to(ROOT))}
                write(job.state, state)
            time.sleep(0.2)
        return state, code
    finally:
        if process.poll() is None:  # interrupted
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def evaluate_ood(job: Job, episodes: int) -> None:
    """Add a run's success in the out-of-distribution variants to its result, by algos/evaluate.py, with that of its start.

    Raises RunError where the run's folder is gone, or the evaluation fails.
    """
    result = read(job.target)
    policy = ROOT / result.get("run", "unknown") / "policy"
    if not policy.is_dir():
        raise RunError("its folder under runs/ is gone, and with it the policy to evaluate")
    output = ROOT / "runs" / "compare" / f"ood-{harness.slug(job.env_id)}-{job.obs_mode}"  # the start is evaluated once for all
    command = [sys.executable, "algos/evaluate.py", result["checkpoint"], str(policy), "--labels", "before", "after",
               "--suites", "ood", "--episodes", str(episodes), "--no-video", "--output", str(output)]
    with open(job.state.with_suffix(".log"), "ab") as log, open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process has its own policy evaluated there
        if code := subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode:
            raise RunError(f"evaluate.py ended with exit status {code}; its output is in {log.name}")
        found = read(output / "results.json")["rows"]
    rows = {row["name"]: row["policies"] for row in found if row["kind"] != "environment"}
    total = rows.pop("OOD mean")
    write(job.target, result | {"ood": total["after"] | dict(episodes_per_variant=episodes, before=total["before"], families=rows)})


def has_ood(job: Job) -> bool:
    return "ood" in read(job.target)


def run_all(jobs: list[Job], ood: int = 0) -> dict[str, str]:
    """Run every job without a result, one after the other, and evaluate them out of distribution in `ood` episodes per variant
    (0: not). Returns what went wrong, by the job's name."""
    for job in jobs:
        if status(job).startswith("done, "):
            tqdm.write(f"{job.name}: {status(job)}")
    failed, missing = {}, [job for job in jobs if not job.target.exists() or ood and not has_ood(job)]
    bar = tqdm(missing, desc="runs", smoothing=0, disable=not missing)
    for job in bar:
        bar.set_postfix_str(job.name)
        try:
            tqdm.write(f"{job.name}: {status(job)}, {job.command}")
            if not job.target.exists():
                run(job)
            if ood and not has_ood(job):
                evaluate_ood(job, ood)
        except Exception as error:  # whatever it is, the others go on
            failed[job.name] = str(error) if isinstance(error, RunError) else repr(error)
            tqdm.write(f"{job.name} failed: {failed[job.name]}")
    return failed


# -------------------------------------------------------------------------------------------------------------- the report


def by_label(results: list[dict]) -> dict[str, list[dict]]:
    return {label: list(runs) for label, runs in groupby(results, lambda r: r["label"])}


def first_at(curve: list[dict], key: str, success: float = 0.8) -> float | None:
    """`key` of the first evaluation with at least this success."""
    return next((point[key] for point in curve if point["success"] >= success), None)


def summary_row(label: str, runs: list[dict]) -> list[str]:
    def every(key: str) -> list:
        return [r.get(key) for r in runs]

    def success(key: str) -> str:
        return spread([outcome and outcome["success"] for outcome in every(key)], scale=100)

    def reached(key: str, **form) -> str:
        return spread([first_at(r["curve"], key) for r in runs], **form)

    memory = [value for value in every("peak_memory_gb") if value is not None]
    return [
        label, ", ".join(map(str, every("seed"))), success("before"), success("after"), success("ood"),
        reached("env_steps", form=".0f", scale=1e-3), reached("minutes"), f"{max(memory):.2f}" if memory else "–",
        *(spread(sorted(set(every(key)) - {None}), ",.0f") for key in ("parameters_trained", "forward_passes")),
    ]


def summary(results: list[dict]) -> str:
    """A row per label: mean and range over its seeds."""
    return markdown(
        ["", "seeds", "before, %", "after, %", "OOD after, %", "thousand steps to 80 %", "minutes to 80 %", "peak memory, GB",
         "parameters trained", "forward passes"],
        [summary_row(label, runs) for label, runs in by_label(results).items()],
    )


def each_run(results: list[dict]) -> str:
    """A row per run."""
    return markdown(
        ["", "seed", "before, %", "after, %", "rollout policy after, %", "thousand steps", "minutes"],
        [[r["label"], str(r["seed"]), rate(r["before"]), rate(r["after"]), rate(r.get("after_rollout_policy")),
          f"{r['env_steps'] / 1000:.0f}", f"{r['training_minutes']:.1f}"] for r in results],
    )


def each_variant(results: list[dict]) -> str:
    """A row per ablation: its seeds' outcomes, and their mean."""
    return markdown(
        ["", "seeds", "before, %", "after, %, seed by seed", "mean, %"],
        [[label, ", ".join(str(r["seed"]) for r in runs), rate(runs[0]["before"]), "; ".join(rate(r["after"]) for r in runs),
          f"{100 * np.mean([r['after']['success'] for r in runs]):.1f}"] for label, runs in by_label(results).items()],
    )


def out_of_distribution(results: list[dict]) -> str:
    """A row per run with such an evaluation: each family's mean and the mean of these, before and after; "" without any."""
    given = [r for r in results if "families" in r.get("ood", {})]
    if not given:
        return ""
    families = list(dict.fromkeys(name for r in given for name in r["ood"]["families"]))
    arrow = lambda before, after: f"{100 * before['success']:.1f} → {rate(after)}"
    rows = []
    for r in given:
        total, by_family = r["ood"], r["ood"]["families"]
        cells = [arrow(found["before"], found["after"]) if (found := by_family.get(name)) else "–" for name in families]
        rows.append([r["label"], str(r["seed"]), *cells, arrow(total["before"], total), str(total["episodes_per_variant"])])
    return markdown(["", "seed", *(f"{name}, %" for name in families), "mean of families, %", "episodes per variant"], rows)


def unequal(results: list[dict]) -> list[str]:
    """What differs between the runs in the arguments of EQUAL: the exceptions, and the value that most have."""
    differences = []
    for key in EQUAL:
        users: dict[str, list[str]] = {}
        for r in results:
            args = r["args"] | {"checkpoint": r["checkpoint"]}  # also where none was given
            users.setdefault(str(args.get(key, "not recorded")), []).append(f"{r['label']} {r['seed']}")
        usual = max(users, key=lambda value: len(users[value]), default=None)
        differences += [f"`{key}` is {v} for {', '.join(users[v])}, else {usual}" for v in users if v != usual]
    return differences


def mean_curve(curves: list[list[dict]], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, low and high of success in % over `key`, up to where the shortest curve ends.

    Curves are interpolated between their evaluations. The interval is over seeds: from three on the 95 % t-interval of the mean,
    below three from the smallest to the largest value.
    """
    from scipy.stats import t

    end = min(curve[-1][key] for curve in curves)
    x = np.array(sorted({point[key] for curve in curves for point in curve if point[key] <= end}))
    y = 100 * np.array([np.interp(x, [p[key] for p in curve], [p["success"] for p in curve]) for curve in curves])  # (seeds, x)
    n, mean = len(y), y.mean(0)
    if n < 3:
        return x, mean, y.min(0), y.max(0)
    half = t.ppf(0.975, n - 1) * y.std(0, ddof=1) / n**0.5
    return x, mean, np.clip(mean - half, 0, 100), np.clip(mean + half, 0, 100)


def draw(path: Path, title: str, lines: dict[str, tuple[dict, list[dict]]]) -> None:
    """Success over environment steps and over minutes: a style and the runs to average for each line, by its name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    labels = "thousand environment steps", "minutes of training"
    for axis, key, scale, label in zip(axes, ("env_steps", "minutes"), (1000, 1), labels):
        for name, (style, runs) in lines.items():
            x, mean, low, high = mean_curve([r["curve"] for r in runs], key)
            marker = "o" if len(runs) == 1 else None  # evaluations; a mean's are interpolated
            axis.plot(x / scale, mean, label=name, marker=marker, markersize=3, **style)
            axis.fill_between(x / scale, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel=label, ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out success, %")
    axes[1].legend(fontsize=9)
    if any(len(runs) > 1 for _, runs in lines.values()):
        title += "\nmean over seeds; band: 95 % t-interval of the mean (of two: their range)"
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ablations(path: Path, title: str, variants: dict[str, list[dict]]) -> None:
    """Success after training with its Wilson interval: a row per variant, a point per seed; a line where the first seed started."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.24 * len(variants)), layout="constrained")
    for row, (label, runs) in enumerate(variants.items()):
        colour = COLOURS[1] if label == "stepnft-default" else COLOURS[0]
        for run, offset in zip(runs, np.linspace(-0.25, 0.25, len(runs) + 2)[1:]):
            success, low, high = 100 * np.array([run["after"]["success"], *run["after"]["interval"]])
            axis.errorbar(success, row + offset, xerr=[[success - low], [high - success]], fmt="o", markersize=4, color=colour)
    before = next(iter(variants.values()))[0]["before"]["success"]
    axis.axvline(100 * before, color="grey", linestyle=":", label="before")
    axis.set_yticks(range(len(variants)), [label.removeprefix("stepnft-") for label in variants], fontsize=8)
    axis.set(xlabel="held-out success, %, with 95 % Wilson interval", xlim=(0, 100))
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report() -> None:
    """Draw docs/images/comparison_<task>_<mode>.png and ablations_<task>_<mode>.png, and write what stands between the marks in
    PAGE, and all that pages.py writes."""
    images = ROOT / "docs" / "images"
    results, ablations, trials = (load(ROOT / "benchmarks" / "results" / folder) for folder in ("", "ablations", "tuning"))
    place = lambda r: (r["env_id"], r["obs_mode"])
    styles = dict(zip(dict.fromkeys(r["label"] for r in results), cycle(STYLES)))
    parts = []
    for env_id, mode in sorted({place(r) for r in results + ablations + trials}):
        here, ablated, tried = ([r for r in found if place(r) == (env_id, mode)] for found in (results, ablations, trials))
        task, file = f"{env_id} ({mode})", f"{harness.slug(env_id)}_{mode}.png"
        parts.append(f"### {task}")
        if here:
            lines = {f"{label}, n = {len(runs)}": (styles[label], runs) for label, runs in by_label(here).items()}
            draw(images / f"comparison_{file}", task, lines)
            parts += [summary(here), f"![{task}](../images/comparison_{file})",
                      "Each run, with 95 % Wilson intervals over its episodes:", each_run(here)]
            if table := out_of_distribution(here):
                parts += ["Out of distribution, before → after:", table]
        if ablated:
            draw_ablations(images / f"ablations_{file}", f"ablations of StepNFT, {task}", by_label(ablated))
            picture = f"![ablations, {task}](../images/ablations_{file})"
            parts += [f"Ablations, {task}:", each_variant(ablated), picture]
        if tried:
            parts += [f"Tuning trials, {task}, on the tuning episodes:", summary(tried)]
        parts += [f"Not the same in all runs: {'; '.join(d)}." for runs in (here, ablated, tried) if (d := unequal(runs))]
        everything = here + ablated + tried
        for note in dict.fromkeys(r["note"] for r in everything if "note" in r):  # added to the files of these runs by hand
            parts.append(", ".join(f"{r['label']} {r['seed']}" for r in everything if r.get("note") == note) + f": {note}.")
        parts += ["Commands:", "\n".join(["```", *(r["command"] for r in everything), "```"])]
    text = "\n\n".join(parts or ["No result yet."])
    page = ROOT / PAGE
    page.write_text(pages.fill(page.read_text(), {"every run": lambda _: text}, ROOT))
    pages.write(ROOT)
    print(f"{len(results)} results, {len(ablations)} ablations and {len(trials)} trials in {PAGE}; means in the pages for users")


if __name__ == "__main__":
    args = harness.parse(Args, __doc__)
    jobs = plan(args)
    if args.dry_run:
        for job in jobs:
            print(f"{job.name}: {status(job)}\n    {job.command}")
        sys.exit()
    for name in (signal.SIGINT, signal.SIGTERM):  # also where a shell in the background has them ignored
        signal.signal(name, signal.default_int_handler)
    try:
        failed = run_all(jobs, args.ood)
    except KeyboardInterrupt:
        report()
        sys.exit("interrupted; the same command goes on from the last checkpoint")
    report()
    if failed:
        sys.exit("\n".join(["failed:", *(f"  {name}: {error.splitlines()[0]}" for name, error in failed.items())]))
