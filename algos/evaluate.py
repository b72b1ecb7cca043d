# Docs: docs/evaluate.md. How good are these checkpoints, and where: python algos/evaluate.py pi0-tiny-pickcube-rgb runs/…/policy
"""Success of one or several checkpoints in and out of distribution, on the same seeds, with tables, videos and one HTML report."""

from __future__ import annotations

import atexit
import csv
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from tqdm import tqdm

from pi_stepnft import envs, harness, policies
from pi_stepnft.harness import (
    Batch,
    Count,
    CountOrZero,
    RunError,
    Seconds,
    Seed,
    SizeOrZero,
    Text,
    charts,
    checkpoints,
    films,
    report,
)
from pi_stepnft.harness.args import typed
from pi_stepnft.harness.evaluation import Evaluation, by_ode, evaluate
from pi_stepnft.harness.statistics import over_seeds, summarise


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """policies to evaluate, π0 or π0.5: folders or bundled names, before all options; the others are compared with the first"""
    suites: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--suite"])] = ("id", "ood")
    """id: the task itself; ood: all its variants, or only those of a family (vision, semantic, execution) or of a name such as
    vision-table_color-1. LIBERO: suites such as libero_object; id: the checkpoints' own, ood: LIBERO-PRO's versions of it, plus or
    plus_camera, …: LIBERO-plus's"""
    labels: tuple[str, ...] = ()
    """what the checkpoints are called in the report, one name each; default: by their folders. Checkpoints of the same name are
    several trainings of an algorithm: the report shows their mean too, in whose interval training is a part of the chance"""
    env_id: Text | None = None
    """ManiSkill task, LIBERO suite or one of its tasks; default: the one that the checkpoints were trained on"""
    obs_mode: Literal["rgb", "state"] | None = None
    """default: the checkpoints'"""
    env_options: tuple[str, ...] | None = None
    """options of the environments as name=value (docs/environments.md); default: those that the checkpoints were trained with"""
    episodes: Count = 100
    """episodes per checkpoint and environment, with seeds --eval-seed, --eval-seed + 1, …; of a LIBERO suite the episodes of all
    tasks together: 500 are 50 of each, the field's protocol"""
    eval_seed: Seed = envs.EVAL_SEED
    """first seed; choose settings on others (envs.TUNING_SEED) than those you report on"""
    num_envs: Batch = 64
    """environments side by side; as in training for the same outcomes, as rounding depends on it"""
    execute: SizeOrZero = 0
    """actions executed of each predicted chunk; 0: as in each checkpoint"""
    num_steps: SizeOrZero = 0
    """solver steps; 0: as in each checkpoint"""
    output: Text | None = None
    """folder of the results; default: runs/eval-<task>-<mode>-<digest of the checkpoints>. What it holds already is not repeated"""

    # videos
    video: bool = True
    """write videos and show them in the report"""
    video_episodes: CountOrZero = 4
    """episodes in each environment's video, the first ones, with a row for each checkpoint; 0: no such videos"""
    render_best_of: CountOrZero = 4
    """in the first environment, for each checkpoint: a video of so many of its shortest successes above as many of its failures;
    0: no such videos"""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the computation, with the published float32 parts"""
    num_threads: SizeOrZero = 0
    """torch threads; 0: one per core"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policies compute; auto: cuda where there is one"""
    step_timeout: Seconds = 300.0
    """seconds for which a simulator's process may be silent before it is taken for hung and replaced"""


@dataclass
class Contestant:
    """A checkpoint under evaluation."""

    label: str
    group: str
    """the label that it shares with other trainings of its algorithm"""
    name: str
    """as given"""
    folder: Path
    policy: policies.Pi0
    digest: str
    execute: int
    num_steps: int


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def default_labels(names: tuple[str, ...]) -> list[str]:
    """A run's name for the policy in its folder, the folder's own name otherwise; whole paths where these are not unique."""
    paths = [Path(name) for name in names]
    short = {"policy": "{}", "rollout_policy": "{} (θ_old)"}
    labels = [short[path.name].format(path.parent.name) if path.name in short and path.parent.name else path.name for path in paths]
    return labels if len(set(labels)) == len(labels) else list(names)


def numbered(names: Sequence[str]) -> list[str]:
    """Repeated names with a number each: A, B, B → A, B 1, B 2."""
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights and of all that describes them."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".model"):
            total.update(path.relative_to(folder).as_posix().encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


def learning_curve(folder: Path) -> list[dict] | None:
    """The curve of the training run that this is the policy of, also of one that has not ended."""
    for name, keys in (("result.json", ["curve"]), ("training.json", ["progress", "curve"])):
        if (file := folder.resolve().parent / name).is_file():
            found = policies.read_json(file)
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            typed(list[checkpoints.Point], json.dumps(found or []), f"{file}: point ".__add__, depth=2)
            return found or None
    return None


def agree(what: str, values: dict[str, Any], hint: str = "") -> Any:
    """The value that all checkpoints share. Raises RunError where they do not."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{label}: {value}" for label, value in values.items())
        raise RunError(f"the checkpoints differ in their {what} ({listed}): evaluate them one by one{hint}")
    return next(iter(values.values()))


# --------------------------------------------------------------------------------------------------------------- one environment


def play(venv, contestant: Contestant, episodes: int, seed: int, bar: tqdm) -> dict[str, np.ndarray]:
    """Success, steps and actions of the episodes, as a training run evaluates."""
    bar.set_postfix_str(f"{contestant.label}, {venv.spec.env_id}")
    act = by_ode(contestant.policy, contestant.num_steps)
    result = evaluate(venv, act, episodes, execute=contestant.execute, seed=seed, progress=bar)
    return dict(success=result.success, steps=result.steps, actions=result.actions)


def choose_films(
    env_id: str, family: str, results: dict[str, Evaluation], episodes: int, best_of: int
) -> list[tuple[str, str, list[tuple[str, str, list[int]]]]]:
    """The films of an environment: title, caption, and rows of a title, a checkpoint's label and the numbers of its episodes."""
    where = "In distribution" if family == "id" else f"{family.capitalize()}: {report.environment_name(env_id, family)}"
    chosen = []
    if episodes:
        number = "episode" if episodes == 1 else f"{episodes} episodes"
        caption = f"The first {number}, as they came" + ("; the same for every checkpoint." if len(results) > 1 else ".")
        chosen.append((where, caption, [(label, label, list(range(episodes))) for label in results]))
    for label, result in results.items() if best_of else ():
        won, lost = np.flatnonzero(result.success), np.flatnonzero(~result.success)
        shortest = won[np.argsort(result.steps[won], kind="stable")]
        rows = [(f"{label}: {title}", label, found[:best_of].tolist())
                for title, found in (("shortest successes", shortest), ("first failures", lost)) if len(found)]
        caption = f"Chosen, not typical: the shortest of {len(won)} successes and the first of {len(lost)} failures."
        chosen.append((f"{where}: successes and failures of {label}", caption, rows))
    return chosen


# ----------------------------------------------------------------------------------------------------------------- the program


def check(args: Args) -> None:
    """Raise RunError, in one line, for arguments that cannot work."""
    if not args.checkpoints:
        raise RunError(f"no checkpoint given: name folders, or some of {', '.join(policies.bundled())}, before all options")
    if args.labels and (len(args.labels) != len(args.checkpoints) or len(set(numbered(args.labels))) < len(args.labels)):
        raise RunError(f"--labels takes one for each of the {len(args.checkpoints)} checkpoints, none like 'A 1' beside 'A'")
    if not args.suites:
        raise RunError("--suites needs at least one of id and ood")


def main(args: Args) -> None:
    check(args)
    torch.set_num_threads(args.num_threads or envs.num_cores())
    device = harness.choose_device(args.device)

    # Checkpoints
    contestants = []
    groups = list(args.labels) or default_labels(args.checkpoints)
    names = tqdm(args.checkpoints, desc="loading checkpoints", disable=None, leave=False)
    for label, group, name in zip(numbered(groups), groups, names):
        folder = policies.checkpoint.find(name)
        policy = policies.load(name, device, getattr(torch, args.dtype)).eval()
        execute = args.execute or policy.meta.get("execute", policy.config.horizon)
        if execute > policy.config.horizon:
            raise RunError(f"--execute {execute} is longer than the {policy.config.horizon} actions that {name} predicts")
        num_steps = args.num_steps or policy.meta.get("num_steps", policy.config.num_steps)
        contestants.append(Contestant(label, group, name, folder, policy, digest(folder), execute, num_steps))
    if len({c.digest for c in contestants}) < len(contestants):
        raise RunError("two of the checkpoints are the same: give each once")
    modes = {c.label: c.policy.meta.get("obs_mode", "rgb" if c.policy.config.num_cameras else "state") for c in contestants}
    obs_mode = agree("obs mode", modes)
    if args.obs_mode not in (None, obs_mode):
        raise RunError(f"{contestants[0].name} acts in {obs_mode} mode, not {args.obs_mode}: leave out --obs-mode")
    env_id = args.env_id or agree("task", {c.label: c.policy.meta.get("env_id") for c in contestants}, ", or add --env-id")
    if env_id is None:
        raise RunError(f"{contestants[0].name} does not say what task it was trained on: add --env-id")
    trained = {c.label: tuple(sorted(c.policy.meta.get("env_options", ()))) for c in contestants}
    given = agree("environment's options", trained, ", or add --env-options") if args.env_options is None else args.env_options
    image_size = agree("image size", {c.label: c.policy.config.image_size * (obs_mode == "rgb") for c in contestants})
    fixed = dict(obs_mode=obs_mode, image_size=image_size or 96, video_size=224, chunk=1, observe_terminal=False,
                 step_timeout=args.step_timeout)  # as in training
    if args.env_options is None:  # what was trained with, and is not this program's to choose
        given = tuple(option for option in given if option.partition("=")[0] not in fixed)
    options = harness.env_options(given, fixed | dict(env_id=env_id, num_envs=args.num_envs))
    simulator = envs.simulator(env_id)
    if env_id != simulator.task_of(env_id):
        raise RunError(f"--env-id {env_id} is a variant: name its task there, and the variant in --suites")
    envs.check(env_id)
    for c in contestants:
        harness.check_task(c.policy, env_id, obs_mode, given, c.name)
    environments, episodes = simulator.select(env_id, args.suites, obs_mode), args.episodes
    own = {name: value for name, value in options.items() if name not in inspect.signature(envs.make).parameters}
    for name in environments:  # what cannot be had in one of them is told before the first is played
        simulator.spec(name, obs_mode=obs_mode, **own)
    if simulator.pooled:
        sizes = Counter(environments.values())
        if len(set(sizes.values())) > 1:
            raise RunError(f"--suites: give suites of different size one by one (tasks: {dict(sizes)})")
        size = next(iter(sizes.values()))
        if episodes % size:
            raise RunError(f"--episodes {episodes} must be a multiple of the {size} tasks of {next(iter(sizes))}")
        episodes //= size
    unique = hashlib.sha256("".join(c.digest for c in contestants).encode()).hexdigest()[:8]
    output = Path(args.output or f"runs/eval-{harness.slug(env_id)}-{obs_mode}-{unique}")
    num_envs = min(args.num_envs, episodes)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", *simulator.packages)}
    versions |= dict(device=device.type, simulator="cuda" if simulator.on_gpu() else "cpu", dtype=args.dtype)
    curves = {c.label: curve for c in contestants if (curve := learning_curve(c.folder))}

    def open_environments(name: str):
        """As many environments as there are episodes at once; the policies have to fit them."""
        venv = envs.make(name, num_envs, **fixed, **options)
        atexit.register(venv.close)  # workers and shared memory go with the program, however it ends
        for c in contestants:
            harness.check_fit(c.policy, venv, c.name)
        (output / "episodes").mkdir(parents=True, exist_ok=True)
        return venv

    def stored(c: Contestant, name: str) -> tuple[Path, str]:
        """Where the episodes of a checkpoint in an environment are kept, and all that they depend on."""
        settings = dict(
            sha256=c.digest, env_id=name, obs_mode=obs_mode, episodes=episodes, eval_seed=args.eval_seed,
            num_envs=num_envs, execute=c.execute, num_steps=c.num_steps, versions=versions, noise="by episode",
        ) | (dict(env_options=options) if options else {})
        return output / "episodes" / f"{harness.slug(name)}-{c.digest[:12]}.npz", json.dumps(settings)

    def recall(c: Contestant, name: str) -> dict[str, np.ndarray] | None:
        """These episodes, if they are there and were made in the same way."""
        path, settings = stored(c, name)
        if path.is_file():
            with np.load(path) as data:
                if str(data["settings"]) == settings:
                    return dict(data)
        return None

    colours = {c.label: list(dict.fromkeys(groups)).index(c.group) for c in contestants}
    outcomes: dict[str, dict[str, Evaluation]] = {c.label: {} for c in contestants}
    shown: list[report.Film] = []

    def write_results() -> None:
        """All files but the episodes and films, of the environments that all checkpoints have been in."""
        with open(output / "outcomes.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["checkpoint", "environment", "family", "seed", "success", "steps"])
            for label, evaluations in outcomes.items():
                for name, result in evaluations.items():
                    for seed, success, steps in zip(result.seeds, result.success, result.steps):
                        rows.writerow([label, name, environments[name], seed, int(success), steps])
        described = [
            dict(label=c.label, group=c.group, checkpoint=c.name, type=c.policy.config.type, execute=c.execute,
                 num_steps=c.num_steps, parameters=sum(p.numel() for p in c.policy.parameters()), sha256=c.digest)
            for c in contestants
        ]
        ended = {label: {name: result.success for name, result in found.items()} for label, found in outcomes.items()}
        rows = summarise(ended, environments, () if simulator.paired else environments.values())
        results = dict(
            command=harness.command_line(), commit=harness.commit(), date=time.strftime("%Y-%m-%d"), env_id=env_id,
            obs_mode=obs_mode, env_options=given, episodes=episodes, eval_seed=args.eval_seed, num_envs=num_envs, rows=rows,
            checkpoints=described, versions=dict(python=sys.version.split()[0], **versions),
        )
        if len(set(groups)) < len(groups):
            results["group_rows"] = over_seeds(rows, ended, report.groups(results))
        (output / "results.json").write_text(json.dumps(results, indent=2))
        (output / "table.md").write_text(report.markdown(results))
        (output / "report.html").write_text(report.html(results, curves, shown))

    missing = sum(recall(c, name) is None for c in contestants for name in environments)
    bar = tqdm(total=missing * episodes, unit="episode", desc="evaluation", smoothing=0, delay=1, disable=not missing)
    for number, (name, family) in enumerate(environments.items()):
        venv, played, results = None, {}, {}
        for c in contestants:
            data = recall(c, name)
            if data is None:
                venv = venv or open_environments(name)
                path, settings = stored(c, name)
                data = play(venv, c, episodes, args.eval_seed, bar) | dict(settings=settings)
                np.savez_compressed(temporary := path.with_suffix(f".{os.getpid()}.tmp.npz"), **data)
                temporary.replace(path)  # what is there is whole, whoever else evaluates the same
            played[c.label] = data
            results[c.label] = Evaluation(data["success"], data["steps"], args.eval_seed + np.arange(episodes))
        for label, result in results.items():
            outcomes[label][name] = result

        best_of = args.render_best_of if number == 0 else 0
        shots = choose_films(name, family, results, min(args.video_episodes, episodes), best_of) if args.video else []
        for title, caption, rows in shots:
            made_of = [(text, str(played[label]["settings"]), numbers) for text, label, numbers in rows]
            unique = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
            film = report.Film(output / "videos" / f"{harness.slug(name)}-{unique}.mp4", title, caption)
            if not film.path.is_file():
                venv = venv or open_environments(name)
                replayed = []
                for text, label, numbers in rows:
                    result, actions = results[label], played[label]["actions"]
                    told = [actions[i, : result.steps[i]] for i in numbers]
                    again = (venv, result.seeds[numbers], told, result.success[numbers])
                    tiles = films.replay(*again, progress=f"video of {name}")
                    replayed.append((text, charts.rgb(colours[label]), tiles))
                films.write(film.path, venv.instruction, replayed)
            shown.append(film)
        if venv:
            venv.close()
        write_results()
    bar.close()
    print(report.markdown(json.loads((output / "results.json").read_text())).split("```")[0].strip())
    print(f"\nreport.html, table.md, results.json and outcomes.csv in {output}")


if __name__ == "__main__":
    with harness.one_line_errors("the same command goes on, and what is complete is in the output folder"):
        main(harness.parse(Args, __doc__))
