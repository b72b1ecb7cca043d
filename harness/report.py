"""What an evaluation found, as Markdown and as one HTML file that needs nothing else: tables, charts, videos. Knows no policy.

`results`, as `algos/evaluate.py` writes it to results.json: env_id, obs_mode, episodes, eval_seed, num_envs; checkpoints, a list of
dicts with a label each, the first being the baseline, and the group that a training belongs to; rows of
`harness.statistics.summarise`; group_rows of `harness.statistics.over_seeds` where a group has several; command, versions and date.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.envs.libero.env import is_libero
from pi_stepnft.harness.statistics import wilson

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Of the checkpoints, in order (Okabe and Ito's, which colour-blind readers can tell apart)."""
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
    return "In distribution" if row["family"] == "id" else environment_name(row["name"])


def family_name(family: str) -> str:
    """A suite of LIBERO keeps its own."""
    return FAMILIES[family].capitalize() if family in FAMILIES else family


def environment_name(env_id: str) -> str:
    """"PickCube-v1/vision-table_color-1" → "table color, mild"; a task's own id stays, as does LIBERO's "libero_object/3"."""
    if "/" not in env_id or is_libero(env_id):
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
    if families and is_libero(results["env_id"]):
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
                   *(" ".join(difference(row, label)).strip() for label in others)] for row in rows]  # fmt: skip
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

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6670; --line: #dfe3e7; --page: #fff; --card: #f6f7f9;
  COLOURS }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #333a41; --page: #15181b; --card: #1d2125;
  --c0: #3d9bd8; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 58rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p { margin: .5rem 0; max-width: 44rem }
.soft, figcaption, small, summary { color: var(--soft) }
small, figcaption, .soft { font-size: .875rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
table + table, .scroll + .scroll { margin-top: 1.25rem }
th, td { padding: .4rem 0 .4rem .6rem; text-align: left; border-bottom: 1px solid var(--line); font-weight: 400 }
th:first-child { padding: .4rem .5rem .4rem 0; min-width: 8.5rem }
thead th { color: var(--soft); font-size: .875rem; padding-left: 1.75rem }
td { color: var(--soft); font-size: .875rem }
td.number { color: var(--ink); font-size: 1rem; font-weight: 600; text-align: right; padding-left: 1.75rem }
tr.ood > * { border-top: 2px solid var(--line) }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1.5rem 0 .75rem; font-size: .875rem }
.bars { padding-right: 9.5rem }
.curves { padding: .5rem 1rem 2.75rem 2.25rem }
svg { display: block; overflow: visible; font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums }
svg text { fill: var(--ink) }
svg .soft { fill: var(--soft); font-size: 12px }
.grid { stroke: var(--line) }
.whisker { stroke: var(--ink); stroke-width: 1.5 }
figure { margin: 0 0 1.75rem }
video { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #141414 }
figcaption { margin-top: .4rem }
pre { overflow-x: auto; padding: .8rem 1rem; border-radius: 6px; background: var(--card); font-size: .8125rem; line-height: 1.5 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0; font-size: .875rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer; font-size: .875rem; padding: .25rem 0 }
@media (max-width: 36rem) { body { padding: 1.25rem 1rem 3rem } .bars { padding-right: 8.75rem }
  th, td.number { font-size: .875rem } th:first-child { min-width: 0 } td { font-size: .75rem; padding-left: .35rem }
  thead th, td.number { padding-left: .7rem } }
""".replace("COLOURS", " ".join(f"--c{i}: {colour};" for i, colour in enumerate(COLOURS)))


def tag(name: str, *content: str, **attributes) -> str:
    """An element; content is HTML already. Underscores stand for hyphens, one at the end is for Python's keywords."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{given}>{''.join(content)}</{name}>"


def colour(index: int) -> str:
    return f"var(--c{index % len(COLOURS)})"


def swatch(index: int) -> str:
    return tag("span", class_="swatch", style=f"background:{colour(index)}")


def soft(text: str) -> str:
    return tag("p", escape(text), class_="soft")


def legend(labels: Labels, shown: Collection[str] | None = None) -> str:
    """Which colour is whose, where there are several: of all, or of those in the chart."""
    entries = [tag("span", swatch(i), escape(label)) for label, i in labels.items() if label in (shown or labels)]
    return tag("div", *entries, class_="legend") if len(labels) > 1 else ""


def definitions(entries: dict) -> str:
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    return tag("dl", *(tag("dt", escape(key.replace("_", " "))) + tag("dd", escape(text(value))) for key, value in entries.items()))


def tables(rows: list[dict], labels: Labels, differences: bool = True) -> str:
    """Success of every policy, and below it the differences to the first."""
    first, *others = labels

    def table(title: str, entries, policies: list[str]) -> str:
        columns = len(entries(rows[0], policies[0]))
        head = [tag("th", swatch(labels[policy]), escape(policy), colspan=columns) for policy in policies]
        body = []
        for row in rows:
            line = tag("th", escape(row_name(row)), scope="row")
            for number, *others in (entries(row, policy) for policy in policies):
                line += tag("td", number, class_="number") + "".join(tag("td", escape(other)) for other in others)
            body.append(tag("tr", line, class_=row["kind"]))
        head = tag("thead", tag("tr", tag("th", escape(title)), *head))
        return tag("div", tag("table", head, tag("tbody", *body)), class_="scroll")

    out = table("Success, %", success, list(labels))
    return out + (table(f"Against {first}, points", difference, others) if others and differences else "")


def bars(rows: list[dict], labels: Labels) -> str:
    """A bar per policy and row, with its interval. Horizontal places are percentages, so that the chart fits any width."""
    thick, gap, title = 13, 6, 22
    group = title + len(labels) * (thick + gap) + 8
    height = len(rows) * group
    parts = []
    for x in (0, 25, 50, 75, 100):
        parts += [tag("line", class_="grid", x1=f"{x}%", x2=f"{x}%", y1=4, y2=height),
                  tag("text", str(x), class_="soft", x=f"{x}%", y=height + 16, text_anchor="middle")]  # fmt: skip
    for r, row in enumerate(rows):
        parts.append(tag("text", escape(row_name(row)), x=0, dx=4, y=r * group + 16))
        for i, label in enumerate(labels):
            y = r * group + title + i * (thick + gap)
            middle = y + thick / 2
            place = lambda value: f"{100 * value:.2f}%"
            policy, numbers = row["policies"][label], " ".join(success(row, label))
            rate, interval = place(policy["success"]), policy["interval"]
            fill = colour(labels[label])
            parts.append(tag("rect", tag("title", escape(label)), x=0, y=y, width=rate, height=thick, rx=2, fill=fill))
            if interval:
                low, high = map(place, interval)
                ends = (tag("line", class_="whisker", x1=x, x2=x, y1=middle - 3.5, y2=middle + 3.5) for x in (low, high))
                parts += [tag("line", class_="whisker", x1=low, x2=high, y1=middle, y2=middle), *ends]
            parts.append(tag("text", numbers, x="100%", dx=138, y=middle + 4, text_anchor="end"))
    chart = tag("svg", *parts, class_="chart", role="img", aria_label="success in %", width="100%", height=height + 24)
    return tag("div", chart, class_="bars")


def learning_curves(curves: dict[str, list[dict]], labels: Labels) -> str:
    """Success over environment steps with Wilson intervals, of the policies that have a curve."""
    end = max(point["env_steps"] for curve in curves.values() for point in curve) or 1
    tick = next(step for step in (m * 10**e for e in range(12) for m in (1, 2, 5)) if end / step <= 4)
    parts, shapes, marks = [], [], []
    for y in (0, 25, 50, 75, 100):
        parts += [tag("line", class_="grid", x1=0, x2="100%", y1=f"{100 - y}%", y2=f"{100 - y}%"),
                  tag("text", str(y), class_="soft", x=0, dx=-8, y=f"{100 - y}%", dy=4, text_anchor="end")]  # fmt: skip
    for value in range(0, int(end) + 1, tick):
        parts.append(tag("text", f"{value:,}", class_="soft", x=f"{100 * value / end}%", y="100%", dy=18, text_anchor="middle"))
    for label, curve in curves.items():
        paint = colour(labels[label])
        xs = [100 * point["env_steps"] / end for point in curve]
        ends = [wilson(point["success"] * point["episodes"], point["episodes"]) for point in curve]
        middle, low, high = ([(x, 100 - 100 * y) for x, y in zip(xs, ys)] for ys in ([p["success"] for p in curve], *zip(*ends)))
        line, band = (" ".join(f"{x:.2f},{y:.2f}" for x, y in points) for points in (middle, low + high[::-1]))
        shapes.append(tag("polygon", points=band, fill=paint, opacity=0.18))
        shapes.append(tag("polyline", points=line, fill="none", stroke=paint, stroke_width=2, vector_effect="non-scaling-stroke"))
        marks += [tag("circle", cx=f"{x:.2f}%", cy=f"{y:.2f}%", r=3, fill=paint) for x, y in middle]
    stretched = tag("svg", *shapes, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    parts += [stretched, *marks, tag("text", "environment steps", class_="soft", x="100%", y="100%", dy=36, text_anchor="end")]
    chart = tag("svg", *parts, class_="chart", role="img", aria_label="success over environment steps", width="100%", height=260)
    return tag("div", chart, class_="curves")


def videos(films: Sequence[Film]) -> str:
    """As many of the films as there is room for, in their order."""
    room, parts, outside = VIDEO_BUDGET, [], []
    for film in films:
        data = film.path.read_bytes()
        if len(data) > room:
            outside.append(film.path.name)
            continue
        room -= len(data)
        source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        video = f'<video controls muted loop playsinline preload="metadata" src="{source}"></video>'
        parts.append(tag("h3", escape(film.title)) + tag("figure", video, tag("figcaption", escape(film.caption))))
    if outside:
        parts.append(soft(f"Left out for the size of this page, in the folder videos beside it: {', '.join(outside)}."))
    return "".join(parts)


def summary(results: dict) -> str:
    """The finding in a sentence or two."""
    labels, rows = [checkpoint["label"] for checkpoint in results["checkpoints"]], headline(results["rows"])
    if "group_rows" in results:
        labels, rows = list(groups(results)), headline(results["group_rows"])
    sentences = []
    for row in [row for row in rows if row["family"] == "id" or row["kind"] == "ood"] or rows[:1]:
        found = []
        for label in labels:
            text = f"{escape(label)} {tag('b', success(row, label)[0], '&nbsp;%')}"
            if label != labels[0]:
                points, _, p = difference(row, label)
                text += f" ({', '.join(filter(None, (points, escape(p))))})".replace(" ", "&nbsp;")
            found.append(text)
        where = row_name(row) if row["name"] != "OOD mean" else "Out of distribution, mean over families"
        sentences.append(tag("p", f"{where}: {', '.join(found)}."))
    return "".join(sentences)


def html(results: dict, curves: dict[str, list[dict]], films: Sequence[Film]) -> str:
    """The report. curves: learning curves ("env_steps", "success", "episodes") of the checkpoints that have one, by label."""
    algorithms = {group: i for i, group in enumerate(groups(results))}
    labels = {label: algorithms[group] for group, members in groups(results).items() for label in members}
    environments = sum(row["kind"] == "environment" for row in results["rows"])
    count = lambda n, word: f"{n} {word}{'s' * (n != 1)}"
    facts = [count(len(labels), "checkpoint"), count(environments, "environment"), count(results["episodes"], "episode") + " each"]
    title = f"{results['env_id']} ({results['obs_mode']})"
    first, *more = explanation(results)
    whole = lambda rows, labels, differences: tables(rows, labels, differences) + legend(labels) + bars(rows, labels)
    paired = has_baseline(results)
    parts = [tag("h1", escape(title)), soft(" · ".join([*facts, results["date"]])), summary(results), tag("h2", "Success")]
    if seeds := results.get("group_rows"):
        parts += [whole(headline(seeds), algorithms, True),
                  tag("details", tag("summary", "Each checkpoint"), whole(headline(results["rows"]), labels, paired))]  # fmt: skip
    else:
        parts.append(whole(headline(results["rows"]), labels, paired))
    parts.append(soft(first))
    if more:
        parts.append(tag("details", tag("summary", "How the numbers are made"), *map(soft, more)))
    if curves:
        parts += [tag("h2", "Learning curves"), legend(labels, curves), learning_curves(curves, labels),
                  soft("As the runs evaluated themselves in distribution while training, with 95 % Wilson intervals.")]  # fmt: skip
    drawn, names = (seeds, algorithms) if seeds else (results["rows"], labels)
    if families := variants(drawn):
        parts += [tag("h2", "Each task" if is_libero(results["env_id"]) else "Out of distribution, each variant"), legend(names)]
        for (family, shown), rows in zip(families.items(), variants(results["rows"]).values()):
            parts += [tag("h3", escape(family_name(family))), bars(shown, names),
                      tag("details", tag("summary", "As a table"), tables(rows, labels, paired))]  # fmt: skip
    if films:
        parts += [tag("h2", "Videos"), videos(films)]
    parts += [tag("h2", "How this was made"), tag("pre", escape(results["command"]))]
    for checkpoint in results["checkpoints"]:
        entries = {key: value for key, value in checkpoint.items() if key not in ("label", "group")}
        parts += [tag("h3", swatch(labels[checkpoint["label"]]), escape(checkpoint["label"])), definitions(entries)]
    parts += [tag("h3", "Versions"), definitions(results["versions"])]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        + tag("title", escape(title), ": evaluation")
        + tag("style", STYLE)
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n'


def rgb(index: int) -> tuple[int, int, int]:
    """A checkpoint's colour for films."""
    return tuple(np.frombuffer(bytes.fromhex(COLOURS[index % len(COLOURS)][1:]), np.uint8).tolist())
