"""The tables of README.md and docs/, written from benchmarks/results/: python benchmarks/pages.py

A table stands between the marks <!-- results: NAME --> and <!-- end of results -->. TABLES says what it is made of: of trainings,
globs of their result files, one row each, seeds averaged. FIGURES says where the percentages in a page's sentences come from.
tests/test_pages.py holds pages and files together. Every single run, and the pictures: benchmarks/compare.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: {} -->", "<!-- end of results -->"
MARKED = re.compile(BEGIN.format("(.+?)") + r".*?" + END, re.DOTALL)


class PageError(Exception):
    """A table or figure without its file."""


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def load(folder: Path, pattern: str = "*.json") -> list[dict]:
    """The trainings of a folder, sorted, with their paths and labels; other benchmarks leave their files beside them."""
    results = []
    for path in sorted(folder.glob(pattern)):
        if "curve" in (r := read(path)):
            task = re.sub(r"[^\w.=-]+", "-", r["env_id"])  # as harness.slug has it
            results.append(r | dict(path=path, label=path.stem.removesuffix(f"-{task}-{r['obs_mode']}-{r['seed']}")))
    return sorted(results, key=lambda r: (r["label"], r["seed"]))


# --------------------------------------------------------------------------------------------------------------- cells and rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    head, *lines = ("| " + " | ".join(row) + " |" for row in (header, *rows))
    return "\n".join((head, "|" + "---|" * len(header), *lines))


def spread(values: list[float | None], form: str = ".1f", scale: float = 1) -> str:
    """mean (lowest–highest) of the values that are there, and how many these are if not all; – for none."""
    given = [value * scale for value in values if value is not None]
    if not given:
        return "–"
    text, low, high = (f"{value:{form}}" for value in (np.mean(given), min(given), max(given)))
    if low != high:
        text += f" ({low}–{high})"
    return text if len(given) == len(values) else f"{text}, {len(given)} of {len(values)} seeds"


def rate(outcome: dict | None) -> str:
    if outcome is None:
        return "–"
    low, high = outcome["interval"]
    return f"{100 * outcome['success']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def success(key: str) -> Callable[[list[dict]], str]:
    """Of a single run with its interval over episodes, of several the mean with the lowest and the highest."""

    def cell(runs: list[dict]) -> str:
        outcomes = [r.get(key) for r in runs]
        return rate(outcomes[0]) if len(runs) == 1 else spread([o and o["success"] for o in outcomes], scale=100)

    return cell


def out_of_distribution(runs: list[dict]) -> str:
    """before → after."""
    found = [r["ood"] for r in runs if "before" in r.get("ood", {})]
    if not found:
        return "–"
    after = rate(found[0]) if len(runs) == 1 else spread([ood["success"] for ood in found], scale=100)
    few = f", {len(found)} of {len(runs)} seeds" if len(found) < len(runs) else ""
    return f"{spread([ood['before']['success'] for ood in found], scale=100)} → {after}{few}"


def shipped(runs: list[dict]) -> str:
    """Of the policy that all of them started from."""
    return success("before")(runs[:1] if len({r["before"]["success"] for r in runs}) == 1 else runs)


def replay(run: dict) -> str:
    """Success of demonstrations repeated blindly in the task (benchmarks/replay_baseline.py), their mean, if that was measured."""
    path = run["path"].with_name(f"replay-{run['env_id'].replace('/', '-')}-{run['obs_mode']}.json")
    return f", replay {100 * np.mean([row['success'] for row in read(path)['rows']]):.1f}" if path.exists() else ""


def commit(run: dict) -> str:
    """Short, and whether the files were those of it; – where it was not recorded."""
    name, _, dirty = (run.get("commit") or "–").partition("-")
    return name[:7] + f"-{dirty}" * bool(dirty)


COLUMNS: dict[str, Callable[[list[dict]], str]] = {
    "seeds": lambda runs: str(len(runs)),
    "before, %": success("before"),
    "after, %": success("after"),
    "after θ_old, %": success("after_rollout_policy"),
    "out of distribution, %": out_of_distribution,
    "thousand steps": lambda runs: spread([r["env_steps"] for r in runs], ".0f", 1e-3),
    "minutes": lambda runs: spread([r["training_minutes"] for r in runs], ".0f"),
    "commit": lambda runs: ", ".join(dict.fromkeys(map(commit, runs))),
    "success, %": shipped,
}
OVERVIEW = ("seeds", "before, %", "after, %", "out of distribution, %")
HEADLINE = ("before, %", "after, %", "thousand steps", "minutes", "commit")


@dataclass(frozen=True)
class Runs:
    """Trainings: a row per glob. words: heads of the columns that say what was run; rows: these words, then the glob."""

    words: tuple[str, ...]
    rows: list[tuple[str, ...]]
    columns: tuple[str, ...] = HEADLINE

    def __call__(self, results: Path) -> str:
        rows = []
        for *words, pattern in self.rows:
            if not (runs := load(results, pattern)):
                raise PageError(f"no training in {results}/{pattern}")
            rows.append([*words, *(COLUMNS[column](runs) for column in self.columns)])
        return markdown([*self.words, *self.columns], rows)


def overview(results: Path) -> str:
    """A row per task, mode and label."""
    group = lambda r: (r["env_id"], r["obs_mode"], r["label"])
    runs = sorted(load(results), key=group)
    columns = [column for column in OVERVIEW if COLUMNS[column] is not out_of_distribution or any("ood" in run for run in runs)]
    rows = []
    for (env_id, mode, label), members in groupby(runs, group):
        some = list(members)
        rows.append([f"{env_id}, {mode}", label, *(COLUMNS[column](some) for column in columns)])
    return markdown(["task", "label", *columns], rows) if rows else "No result yet."


def overlap(results: Path) -> str:
    found = read(results / "overlap.json")
    rows = [[f"{r['policy_s']:.2f}" if r["policy_s"] else "tiny π0", f"{found['simulation_s']:.2f}",
             f"{r['without_s']:.2f}", f"{r['overlapped_s']:.2f}"] for r in found["rows"]]
    return markdown(["policy, s", "simulation, s", "without, s", "with `--overlap`, s"], rows)


def cost_model(results: Path) -> str:
    rows = []
    for name, run in read(results / "cost_model.json")["runs"].items():
        pairs = [*zip(run["predicted"], run["measured"]), (sum(run["predicted"]), sum(run["measured"]))]
        error = f"{run['error_percent']:+.0f} %".replace("-", "−")
        rows.append([name, f"{run['parameters'] / 1e6:.1f} M", *(f"{p:.2f}, {m:.2f}" for p, m in pairs), error])
    return markdown(["run", "parameters", "rollout, s", "update, s", "iteration, s", "error"], rows)


HERE = {("π0", "libero_object"): "libero/stepnft-libero_object-3-state-1.json",
        ("π0", "libero_spatial"): "libero/stepnft-libero_spatial-8-state-1.json"}
"""Row of the paper's first table → the training that stands in for it."""


def hours(row: dict) -> list[str]:
    return [f"{each:.0f}" if each > 20 else f"{each:.1f}" for each in row["hours"].values()]


def paper_libero(results: Path) -> str:
    """The paper's first table: its numbers, what stands in for them here, the command and what that takes."""
    paper, rows = read(results / "paper.json"), []
    for policy, published in paper["published"]["libero"].items():
        commands = {r["task"]: r for r in paper["rows"] if (r["setting"], r["policy"]) == ("libero", policy)}
        for suite, (before, after) in published.items():
            (run,) = load(results, HERE[policy, suite]) if (policy, suite) in HERE else (None,)
            here = f"{rate(run['before'])} → {rate(run['after'])}, task {run['env_id'][-1]}{replay(run)}" if run else "–"
            row = commands.get(suite)
            rows.append([f"{policy}, {suite.removeprefix('libero_')}", f"{before} → {after}", here,
                         *([f"`{row['command']}`", *hours(row)] if row else ["", "", ""])])
    return markdown(["policy, suite", "paper, %", "here, %", "command", "hours, 1 GPU", "8 GPUs"], rows)


def paper_maniskill(results: Path) -> str:
    """The second one, and below its rows what stands in for it: PickCube-v1 and its variants, a tiny π0 from pictures."""
    paper, compared = read(results / "paper.json"), read(results / COMPARED)["group_rows"]
    rows = []
    for row in paper["rows"]:
        if row["setting"] == "maniskill":
            cells = [f"{before} → {after}" for before, after in paper["published"]["maniskill"][row["policy"]].values()]
            rows.append([row["policy"], *cells, f"`{row['command']}`", *hours(row)])
    ours = {r["name"]: [f"{100 * r['policies'][label]['success']:.1f}" for label in ("SFT", "StepNFT")] for r in compared}
    names = "PickCube-v1", "vision", "semantic", "execution", "OOD mean"
    rows.append(["here, on PickCube-v1", *(" → ".join(ours[name]) for name in names), "", "", ""])
    families = ["in distribution", "vision", "semantic", "execution", "mean of the three"]
    return markdown(["%", *families, "command", "hours, 1 GPU", "8 GPUs"], rows)


# --------------------------------------------------------------------------------------------------------- what stands where

TABLES: dict[str, Callable[[Path], str]] = {
    "headline": Runs(("command",), [
        ("`make run`", "stepnft-PickCube-v1-rgb-*.json"),
        ('`make run ARGS="--max-minutes 0"`', "stepnft-120-PickCube-v1-rgb-*.json"),
        ('`make run ARGS="--obs-mode state"`', "stepnft-PickCube-v1-state-*.json"),
        ("`python algos/stepnft_pi05.py --env-id PickCube-v1`", "stepnft-pi05-PickCube-v1-rgb-*.json"),
    ], ("seeds", *HEADLINE)),
    "stepnft": Runs(("task", "policy"), [
        ("PickCube-v1, rgb", "π0", "stepnft-PickCube-v1-rgb-*.json"),
        ("PickCube-v1, rgb, all 120 iterations", "π0", "stepnft-120-PickCube-v1-rgb-*.json"),
        ("PickCube-v1, state", "π0", "stepnft-PickCube-v1-state-*.json"),
        ("PickCube-v1, state, 60 iterations", "π0", "stepnft-60-PickCube-v1-state-*.json"),
        ("PickCube-v1, rgb", "π0.5", "stepnft-pi05-PickCube-v1-rgb-*.json"),
        ("PickCube-v1, state, 40 iterations", "π0.5", "stepnft-pi05-40-PickCube-v1-state-*.json"),
    ], ("seeds", *HEADLINE)),
    "ppo": Runs(("task",), [
        ("PickCube-v1, state, 60 iterations", "ppo-60-PickCube-v1-state-*.json"),
        ("0.1.0: PickCube-v1, state", "0.1/ppo-PickCube-v1-state-*.json"),
        ("0.1.0: StackCube-v1, state, 80 iterations", "0.1/ppo-StackCube-v1-state-*.json"),
        ("0.1.0: PickCube-v1, rgb, all 120 iterations", "0.1/ppo-120-PickCube-v1-rgb-*.json"),
    ], ("seeds", *HEADLINE)),
    "grpo": Runs(("task",), [
        ("PickCube-v1, state, 60 iterations", "grpo-60-PickCube-v1-state-*.json"),
        ("0.1.0: PickCube-v1, state, 120 iterations", "0.1/grpo-PickCube-v1-state-*.json"),
    ], ("seeds", *HEADLINE)),
    "nft": Runs(("task",), [
        ("PickCube-v1, state, 60 iterations", "nft-60-PickCube-v1-state-*.json"),
        ("0.1.0, the paper's settings: PickCube-v1, state, 120 iterations", "0.1/nft-PickCube-v1-state-*.json"),
    ], ("seeds", *HEADLINE, "after θ_old, %")),
    "rft": Runs(("task",), [
        ("PickCube-v1, state, 60 iterations", "rft-60-PickCube-v1-state-*.json"),
        ("0.1.0: PickCube-v1, state, 120 iterations", "0.1/rft-PickCube-v1-state-*.json"),
        ("0.1.0: PickCube-v1, state, `--replay 1`, 120 iterations", "0.1/rft-replay-1-PickCube-v1-state-*.json"),
    ], ("seeds", *HEADLINE)),
    "critic": Runs(("task",), [("PickCube-v1, state, 60 iterations", "critic-60-PickCube-v1-state-*.json")], ("seeds", *HEADLINE)),
    "shipped": Runs(("policy",), [
        ("`pi0-tiny-pickcube-rgb`", "stepnft-PickCube-v1-rgb-*.json"),
        ("`pi0-tiny-pickcube-state`", "stepnft-PickCube-v1-state-*.json"),
        ("`pi0-tiny-stackcube-state`", "0.1/stepnft-groups-StackCube-v1-state-*.json"),
        ("`pi0-tiny-picknamedcube-state`", "stepnft-40-PickNamedCube-v1-state-*.json"),
        ("`pi05-tiny-pickcube-rgb`", "stepnft-pi05-PickCube-v1-rgb-*.json"),
        ("`pi05-tiny-pickcube-state`", "stepnft-pi05-40-PickCube-v1-state-*.json"),
    ], ("success, %",)),
    "ranks": Runs(("processes",), [("one", "ranks/PickCube-v1-state-1-*.json"), ("two ranks", "ranks/PickCube-v1-state-2-*.json")]),
    "overview": overview, "overlap": overlap, "cost model": cost_model,
    "paper, LIBERO": paper_libero, "paper, ManiSkill": paper_maniskill,
}

COMPARED = "evaluate/PickCube-v1-rgb.json"
INSIDE, OUTSIDE = (f"group_rows/{name}/policies/StepNFT/" for name in ("PickCube-v1", "OOD mean"))
FIGURES: dict[str, dict[str, tuple[str, str]]] = {
    "docs/compare.md": {
        "+4.0": (COMPARED, INSIDE + "difference"),
        "−5.5": (COMPARED, INSIDE + "difference_interval/0"),
        "+13.5": (COMPARED, INSIDE + "difference_interval/1"),
        "+2.6": (COMPARED, OUTSIDE + "difference"),
        "1.4": (COMPARED, OUTSIDE + "difference_interval/0"),
        "3.8": (COMPARED, OUTSIDE + "difference_interval/1"),
    },
}
"""Page → figure in a sentence, in % or points → its files, of which it is the mean, and where in them; rows go by their names."""
LEVELS = {"95": "of intervals", "80": "of success, where compare.first_at counts what it took to get there"}
"""Percentages that are no results."""


def look_up(results: Path, pattern: str, place: str) -> float:
    """What FIGURES points to, times 100."""
    found = []
    for path in sorted(results.glob(pattern)):
        value = read(path)
        for key in place.split("/"):
            if isinstance(value, list):
                value = value[int(key)] if key.isdigit() else next(row for row in value if row["name"] == key)
            else:
                value = value[key]
        found.append(value)
    if not found:
        raise PageError(f"no file {results}/{pattern}")
    return 100 * float(np.mean(found))


def fill(text: str, tables: Mapping[str, Callable[[Path], str]], results: Path) -> str:
    """A page with its tables written anew."""

    def table(found: re.Match) -> str:
        if (name := found[1]) not in tables:
            raise PageError(f"no table {name!r}; there are {', '.join(tables)}")
        return "\n\n".join((BEGIN.format(name), tables[name](results), END))

    return MARKED.sub(table, text)


def user_pages(root: Path = ROOT) -> list[Path]:
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]


def write(root: Path = ROOT) -> None:
    for page in user_pages(root):
        page.write_text(fill(page.read_text(), TABLES, root / "benchmarks" / "results"))


if __name__ == "__main__":
    write()
