"""The model card of a checkpoint: what it is, how well it does, and how it was made, as far as `policy.meta` tells.

Only README.md is written, and one that somebody else wrote is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from pi_stepnft import __version__

if TYPE_CHECKING:
    from pi_stepnft.policies.pi0 import Pi0

NAME, LIBRARY = "README.md", "pi-stepnft"
TEMPLATE = Path(__file__).parent / "assets" / "card.md.j2"
KINDS = dict(pi0="π0", pi05="π0.5")
RESULT = ("success", "interval", "episodes")
"""what a training's entry in a policy's meta says of how well it did"""


def writer(policy: Pi0, folder: Path) -> dict[str, Callable[[Path], object]]:
    """For `checkpoint.write_files`: the card, unless the folder has a README.md that is none of ours."""
    if os.path.lexists(folder / NAME) and not is_ours(folder / NAME):
        return {}
    text = card(policy)
    return {NAME: lambda path: path.write_text(text, encoding="utf-8")}


def is_ours(file: Path) -> bool:
    """Whether a README.md is a card that was written here; what cannot be read is none."""
    try:
        return f"\nlibrary_name: {LIBRARY}\n" in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def card(policy: Pi0) -> str:
    """The text of a policy's card: metadata of the hub in YAML, then Markdown.

    The success that it tells is that of the last training in `policy.meta`: one before it tells of other weights.
    """
    meta, kind = policy.meta, KINDS[policy.config.type]
    trainings = {name: entry for name, entry in meta.items() if isinstance(entry, dict)}
    last = list(trainings.values())[-1] if trainings else {}
    result = measured(last)
    task = meta.get("env_id")
    base = last.get("base")
    data: dict[str, Any] = dict(
        library_name=LIBRARY, pipeline_tag="robotics", tags=["robotics", "vision-language-action", "flow-matching", *trainings],
        license=meta.get("license", "other" if "layout" in meta else "apache-2.0"),
    )
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        data["base_model"] = base
    if result and task:
        data["model_name"] = f"{kind}, {task}"
        data["eval_results"] = [EvalResult("robotics", task, task, "success_rate", result["success"], metric_name="success rate")]
    facts = {
        name: {key: value for key, value in entry.items() if key not in RESULT and isinstance(value, str | int | float)}
        for name, entry in trainings.items()
    }
    return template().render(
        data=ModelCardData(**data).to_yaml().strip(), kind=kind, task=task, mode=meta.get("obs_mode"), base=base, result=result,
        facts=facts, parameters=sum(p.numel() for p in policy.parameters()), version=__version__,
        config=policy.config, execute=meta.get("execute"), num_steps=meta.get("num_steps"), license=data["license"],
        options=meta.get("env_options", []),
    )


def measured(training: dict) -> dict:
    """Success, interval and episodes of a training, if its entry has them all, as numbers."""
    number, interval = (int, float), training.get("interval")
    pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(isinstance(bound, number) for bound in interval)
    whole = pair and all(isinstance(training.get(name), number) for name in ("success", "episodes"))
    return {name: training[name] for name in RESULT} if whole else {}


@cache
def template():
    """The card's, compiled once."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = cell
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def cell(value: str | int | float) -> str:
    """A value as it stands in a table of Markdown."""
    return f"`{' '.join(value.split())}`".replace("|", "\\|") if isinstance(value, str) else str(value)
