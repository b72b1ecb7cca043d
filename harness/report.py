"""What an evaluation found, as Markdown and as one HTML file that needs nothing else: tables, charts, videos. Knows no policy.

`results`, as `algos/evaluate.py` writes it to results.json: env_id, obs_mode, env_options, episodes, eval_seed, num_envs;
checkpoints, a list of dicts with a label each, the first being the baseline, and the group that a training belongs to; rows of
`harness.statistics.summarise`; group_rows of `harness.statistics.over_seeds` where a group has several; command, versions and date.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.harness import charts

FAMILIES = dict(id="in distribution", vision="vision", semantic="semantic", execution="execution", ood="OOD mean")
Labels = dict[str, int]
"""Policies in their order, and the number of the colour of each: seeds of an algorithm share theirs."""
STRENGTHS = {"1": "mild", "2": "strong"}
VIDEO_BUDGET = 11_000_000
"""Bytes of video that a report holds; base64 makes them a third more. Further films are named only."""


@dataclass
class Film:
    """A video file and what the report says about it."""

    path: Path
    title: str
    caption: str


# ------------------------------------------------------------------------------------------------------------ words and numbers


def row_name(row: dict) -> str:
    """What a row is called in tables and charts: a variant goes by its change and strength."""
    if row["kind"] != "environment":
        return family_name(row["family"]) if row["kind"] == "family" else row["name"]
    return "In distribution" if row["family"] == "id" else environment_name(row["name"], row["family"])


def family_name(family: str) -> str:
    """A suite of tasks keeps its own."""
    return FAMILIES[family].capitalize() if family in FAMILIES else family


def environment_name(env_id: str, family: str) -> str:
    """"PickCube-v1/vision-table_color-1" → "table color, mild"; a task's own id stays, as does a suite's."""
    if "/" not in env_id or family not in FAMILIES:
        return env_id
    name, _, strength = env_id.split("/", 1)[1].split("-", 1)[-1].rpartition("-")
    return f"{name.replace('_', ' ')}, {STRENGTHS.get(strength, strength)}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def p_value(p: float | None) -> str:
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.9995 else "p = 1"


def headline(rows: list[dict]) -> list[dict]:
    """In distribution, each family's mean, and the mean over families; whatever there is, where that is none of them."""
    return [row for row in rows if row["kind"] != "environment" or row["family"] == "id"] or rows


def variants(rows: list[dict]) -> dict[str, list[dict]]:
    """The out-of-distribution environments by family."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["kind"] == "environment" and row["family"] != "id":
            found.setdefault(row["family"], []).append(row)
    return found


def between(interval: tuple[float, float] | None, form) -> str:
    return f"[{form(interval[0])}, {form(interval[1])}]" if interval else ""


def groups(results: dict) -> dict[str, list[str]]:
    """The checkpoints' labels by group: the trainings of an algorithm, or a checkpoint by itself."""
    found: dict[str, list[str]] = {}
    for checkpoint in results["checkpoints"]:
        found.setdefault(checkpoint.get("group", checkpoint["label"]), []).append(checkpoint["label"])
    return found


def has_baseline(results: dict) -> bool:
    """Whether differences to the first checkpoint tell something: not if it is one of an algorithm's trainings."""
    return len(next(iter(groups(results).values()))) == 1


def is_suites(results: dict) -> bool:
    """Whether the families are suites of tasks, whose episodes all count alike, and not variants of one task."""
    return any(row["kind"] == "family" and row["weights"] is None for row in results["rows"])


def success(row: dict, label: str) -> tuple[str, str]:
    """A policy's success and its interval."""
    policy = row["policies"][label]
    return percent(policy["success"]), between(policy["interval"], percent)


def difference(row: dict, label: str) -> tuple[str, str, str]:
    """Its difference to the first policy, the interval, and the p-value."""
    policy = row["policies"][label]
    return signed(policy["difference"]), between(policy["difference_interval"], signed), p_value(policy["p"])


def explanation(results: dict) -> list[str]:
    """How the numbers are made, in sentences."""
    seed, episodes, labels = results["eval_seed"], results["episodes"], [c["label"] for c in results["checkpoints"]]
    families = [row for row in results["rows"] if row["kind"] == "family"]
    several = {group: members for group, members in groups(results).items() if len(members) > 1}
    out = [
        f"Success once within the episode's limit, in %, over {episodes} episodes per environment "
        f"(seeds {seed} to {seed + episodes - 1}, the same for every checkpoint), with 95 % Wilson intervals"
        f"{' of each checkpoint' * bool(several)}."
    ]
    if options := results.get("env_options"):
        out.append(f"Options of the environments: {', '.join(options)}.")
    if several:
        listed = ", ".join(f"{group} ({len(members)})" for group, members in several.items())
        out[0] += (
            f" Means over trainings, {listed}, and differences to {next(iter(groups(results)))} have 95 % t-intervals and tests "
            "for other trainings and other episodes: both variances add up, with Welch and Satterthwaite's degrees of freedom."
        )
    if len(labels) > 1 and has_baseline(results):
        out.append(
            f"Differences are to {labels[0]}, in percentage points, paired by seed, with 95 % intervals (Agresti and Min). p is "
            "that of the exact McNemar test, and for means over environments of the exact sign-flip test over seeds, which is the "
            "same test where there is one environment. No correction is made for the number of rows."
        )
    if is_suites(results):
        fixed = results["eval_seed"] >= EVAL_SEED
        out.append(
            f"Each task starts from {'its fixed initial states in their order' if fixed else 'states drawn from its own regions'}. "
            "A suite's episodes all count alike, in its interval and its test; the mean of suites weighs the suites equally."
        )
    elif families:
        out.append(
            "A family's mean weighs its environments equally, the OOD mean its families. Episodes of one seed resemble each other "
            "across environments: intervals of means count them as the number of independent episodes with the same spread."
        )
    return out


# -------------------------------------------------------------------------------------------------------------------- Markdown


def markdown(results: dict) -> str:
    """The tables of a report, for a README or an issue."""
    labels = [checkpoint["label"] for checkpoint in results["checkpoints"]]

    def table(rows: list[dict], labels: list[str], others: list[str]) -> str:
        header = ["", *labels, *(f"{label} − {labels[0]}" for label in others)]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        lines += [[row_name(row), *(" ".join(success(row, label)).strip() for label in labels),
                   *(" ".join(difference(row, label)).strip() for label in others)] for row in rows]
        return "\n".join("| " + " | ".join(entry.replace("|", "\\|") for entry in line) + " |" for line in lines)

    parts = [f"## {results['env_id']} ({results['obs_mode']})"]
    if "group_rows" in results:
        names = list(groups(results))
        parts += [table(headline(results["group_rows"]), names, names[1:]), "### Each checkpoint"]
    others = labels[1:] if has_baseline(results) else []
    parts.append(table(headline(results["rows"]), labels, others))
    for family, rows in variants(results["rows"]).items():
        parts += [f"### {family_name(family)}", table(rows, labels, others)]
    return "\n\n".join([*parts, "\n".join(explanation(results)), f"```\n{results['command']}\n```"]) + "\n"


# ------------------------------------------------------------------------------------------------------------------------ HTML


def chart(rows: list[dict], labels: Labels) -> Markup:
    """A bar per policy and row, with its interval."""

    def bar(row: dict, label: str) -> charts.Bar:
        policy = row["policies"][label]
        return charts.Bar(label, labels[label], policy["success"], policy["interval"], " ".join(success(row, label)))

    return Markup(charts.bars([(row_name(row), [bar(row, label) for label in labels]) for row in rows]))


def html(results: dict, curves: dict[str, list[dict]], films: Sequence[Film]) -> str:
    """The report. curves: learning curves ("env_steps", "success", "episodes") of the checkpoints that have one, by label."""
    algorithms = {group: i for i, group in enumerate(groups(results))}
    labels = {label: algorithms[group] for group, members in groups(results).items() for label in members}
    seeds, room, shown, outside = results.get("group_rows"), VIDEO_BUDGET, [], []
    for film in films:  # as many as there is room for, in their order
        data = film.path.read_bytes()
        if len(data) > room:
            outside.append(film.path.name)
        else:
            room -= len(data)
            shown.append((film, base64.b64encode(data).decode()))
    return TEMPLATES.get_template("report.html.j2").render(
        results=results, labels=labels, algorithms=algorithms, seeds=seeds, films=shown, outside=outside, curves=curves,
        drawn=(seeds, algorithms) if seeds else (results["rows"], labels), paired=has_baseline(results), suites=is_suites(results),
        curve_chart=Markup(charts.curves([(label, labels[label], curve) for label, curve in curves.items()])) if curves else "",
        explanation=explanation(results),
    )


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)
TEMPLATES.globals |= dict(
    chart=chart, difference=difference, family_name=family_name, headline=headline, row_name=row_name, success=success,
    variants=variants, colours=charts.COLOURS, theme=charts.THEME, dark=charts.DARK,
)
