"""What all simulators share: seeds, the error, what describes an environment, and the two faces that a simulator shows.

`Simulator` is asked in the parent process (`envs.make`, evaluation, demonstrations), `Environment` is one scene in a worker. A new
simulator subclasses both and `Spec`, and stands in the table `envs.SIMULATORS`; what it does not write is taken from here.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from gymnasium.spaces import Box
from pydantic import Field, TypeAdapter, ValidationError

TRAIN_SEEDS = 500_000_000
"""Training episodes use seeds below this, demonstrations those from here to TUNING_SEED."""
TUNING_SEED = 1_000_000_000
"""Evaluations by which settings are chosen use seeds from here on (`--eval-seed`), so that results are not picked by chance."""
EVAL_SEED = 1_100_000_000
"""Reported evaluations use seeds from here on: no initial state is shared with training, demonstrations or tuning."""


def num_cores() -> int:
    """Cores that this process may use, which under Slurm, taskset or in a container can be fewer than the machine has; of several
    that torchrun has started on this machine, its share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class EnvError(RuntimeError):
    """A simulator, task or driver problem, told in one line: what was given, what was expected, what to do next."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to append to a message about an unknown name: the nearest three, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


EXPECTED = dict(
    greater_than="greater than {gt:.10g}", greater_than_equal="at least {ge:.10g}", less_than="less than {lt:.10g}",
    less_than_equal="at most {le:.10g}", finite_number="a finite number", literal_error="{expected}", none_required="nothing",
    string_type="text", string_too_short="text that is not empty",
)
EXPECTED |= dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number")
EXPECTED |= dict.fromkeys(("float_type", "float_parsing"), "a number")
EXPECTED |= dict.fromkeys(("bool_type", "bool_parsing"), "true or false")
EXPECTED |= dict.fromkeys(("list_type", "tuple_type"), "a list")
EXPECTED |= dict.fromkeys(("dict_type", "dataclass_type", "model_type"), "names with values")
"""What pydantic's errors say of a value, in our words."""


def explain(error: ValidationError, name: Callable[[str], str] = str, depth: int = 1) -> str:
    """What is wrong with the first value that pydantic refuses: "seed must be at least 0, got -1". An error of pydantic's names a
    place in nested values, of which `depth` parts are told; the alternatives of a union are parts behind that."""
    first, *more = error.errors(include_url=False)
    place, whole = (name(".".join(map(str, first["loc"][:parts]))) for parts in (depth, None))
    if first["type"] in ("missing", "extra_forbidden", "unexpected_keyword_argument"):
        return f"{whole} is {'missing' if first['type'] == 'missing' else 'unknown'}"
    found = repr(first["input"])
    either = [first, *(other for other in more if other["loc"][:depth] == first["loc"][:depth])]
    told = [EXPECTED.get(e["type"], e["msg"].removeprefix("Input should be ")).format(**e.get("ctx", {})) for e in either]
    return f"{place} must be {' or '.join(dict.fromkeys(told))}, got {found if len(found) < 80 else found[:70] + '…'}".strip()


def import_module(name: str) -> None:
    """Import the module of a user's own task. EnvError, in one line, where that fails."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise EnvError(f"{name!r} is no module's name: a task of your own is my_module:MyTask-v1")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        advice = "put its folder on PYTHONPATH" if error.name == name.partition(".")[0] else "install what it needs"
        raise EnvError(f"no module named {error.name!r}, for the tasks of {name!r}: {advice}") from None
    except (ImportError, SyntaxError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvError(f"module {name!r} cannot be imported: {reason}") from None


def import_below(package: str, name: str) -> types.ModuleType:
    """The module package.name of an installed wheel, imported alone: what the package, and those that it lies in, would import when
    imported themselves is left out. ImportError where something is missing."""
    parts = package.split(".")
    wheel = importlib.util.find_spec(parts[0])
    if wheel is None or not wheel.submodule_search_locations:
        raise ImportError(f"no package named {parts[0]!r}")
    above = {".".join(parts[: i + 1]): Path(wheel.submodule_search_locations[0], *parts[1 : i + 1]) for i in range(len(parts))}
    empty = {name_above: types.ModuleType(name_above) for name_above in above if name_above not in sys.modules}
    for name_above, module in empty.items():
        module.__path__ = [str(above[name_above])]
    sys.modules.update(empty)
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        for name_above in empty:  # who wants the wheel itself imports it as it is
            del sys.modules[name_above]


def fit(images: np.ndarray, size: int | None, square: bool = True) -> np.ndarray:
    """(T, H, W, 3) uint8 with the longer side at most `size`: bilinear with antialiasing, as the policies' processor does it but
    for rounding, by Pillow, which loads faster than torch.

    square: (T, size, size, 3), centred on black, as the processor makes it of all; for cameras that differ and are to be one array.
    """
    ratio = max(images.shape[1:3]) / (size or np.inf)
    if images.shape[1:3] == (size, size) or (ratio <= 1 and not square):
        return images
    from PIL import Image

    H, W = (max(1, int(side / ratio)) for side in images.shape[1:3])
    resized = np.stack([np.asarray(Image.fromarray(image).resize((W, H), Image.Resampling.BILINEAR)) for image in images])
    if square:
        top, left = (size - H) // 2, (size - W) // 2
        resized = np.pad(resized, ((0, 0), (top, size - H - top), (left, size - W - left), (0, 0)))
    return resized


def no_expert(env_id: str, known: str) -> EnvError:
    """known: which tasks have one."""
    return EnvError(f"no scripted expert for {env_id!r}, only for {known}: bring demonstrations of your own with --dataset")


Pixels = Annotated[int, Field(ge=1, le=4096)]


@dataclass(frozen=True)
class Spec:
    """All that a worker process needs to build its environments; each simulator adds options of its own, with their types."""

    env_id: str
    obs_mode: Literal["rgb", "state"] = "rgb"
    """"rgb": camera images and a state without privileged object poses; "state": no images, privileged state."""
    image_size: Pixels = 96
    """Side of the square camera images, px."""
    max_episode_steps: Annotated[int, Field(ge=1)] | None = None
    """None: the task's own limit."""
    video_size: Pixels = 256
    """Side of the pictures for people, px."""
    instruction: str | None = None
    """In place of the task's own."""

    control_mode: ClassVar[str] = "pd_ee_delta_pose"
    """What an action means, which demonstrations are marked with."""
    death: ClassVar[str] = "too little memory, perhaps: take fewer environments"
    """Why a worker process may have been killed, and what to do."""
    internal: ClassVar[tuple[str, ...]] = "env_id", "obs_mode"
    """Fields that are no options: `envs.make` or the simulator fills them in."""

    def create(self, slot: int, num_envs: int) -> Environment:
        """The environment for place `slot` among `num_envs`. Called in a worker; EnvError where the task cannot be had."""
        raise NotImplementedError


class Environment(Protocol):
    """One scene, stepped by action chunks: what a worker of the pool needs. Subclass it for what has a default."""

    spec: Spec
    task: str
    """Id of its task, which of a suite is one of several."""
    instruction: str
    """Of the current episode."""
    action_space: Box
    """Of one action (A,) float32, with the bounds that the simulator has."""
    state_dim: int
    cameras: tuple[str, ...]
    """In the order of the pictures; none in obs_mode "state"."""
    max_episode_steps: int
    success: bool
    """Whether the current episode has succeeded."""

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`, 0 to 2^32 − 1: the same seed, the same initial state, whatever ran before."""

    def step(self, chunk: np.ndarray) -> tuple[float, bool, bool, int]:
        """Execute up to n actions (n, A); stop at success, failure or the limit. Returns (reward, terminated, truncated, steps)."""

    def observe(self, image: np.ndarray, state: np.ndarray) -> None:
        """Write the current observation into `image` uint8 (cameras, H, W, 3) and `state` float32 (S,)."""

    def render(self) -> np.ndarray:
        """A picture for people (H, W, 3) uint8. Default: black."""
        return np.zeros((self.spec.video_size, self.spec.video_size, 3), np.uint8)

    def object_positions(self) -> np.ndarray:
        """Where the movable objects are (objects, 3) float32, m, which demonstrations hold. Default: none."""
        return np.zeros((0, 3), np.float32)

    def expert(self) -> Expert:
        """The scripted expert that acts in this scene. EnvError, as of `Simulator.expert`, where there is none."""
        raise no_expert(self.task, "other tasks")

    def close(self) -> None:
        """Give back what it holds, where the process lives on. Default: nothing."""


class Expert(Protocol):
    def reset(self) -> None:
        """Call at the start of an episode."""

    def act(self) -> np.ndarray:
        """The action (A,) for the scene as it is."""


class Simulator(Protocol):
    """A simulator's tasks, asked in the parent process. Importing it must be cheap: nothing of the simulator itself."""

    Spec: type[Spec]
    packages: tuple[str, ...] = ()
    """Distributions whose versions belong to a result."""
    paired: bool = True
    """Whether episodes of equal seeds begin alike in all environments of a family, so that their outcomes can be paired."""
    pooled: bool = False
    """Whether `evaluate.py --episodes` counts the tasks of a suite together."""

    def knows(self, env_id: str) -> bool:
        """Whether an id is, or is meant to be, one of this simulator's."""
        raise NotImplementedError

    def check(self, env_id: str) -> None:
        """Raise EnvError, in one line, for a task that does not exist, needs a download, or lacks its driver; create nothing."""

    def spec(self, env_id: str, **options: Any) -> Spec:
        """What `envs.make` was asked for. EnvError for an option that means nothing here, with all that do, or of another type."""
        names = [field.name for field in fields(self.Spec)]
        if unknown := [name for name in options if name not in names]:
            known = [name for name in names if name not in self.Spec.internal]
            hint = did_you_mean(unknown[0], known)
            raise EnvError(f"{env_id} has no option {unknown[0]!r}{hint or ':'} there are {', '.join(known)}")
        try:
            return TypeAdapter(self.Spec).validate_python(options | dict(env_id=env_id))
        except ValidationError as error:
            raise EnvError(f"{env_id}: {explain(error)}") from None

    def instruction(self, env_id: str) -> str:
        """What a task's policy is told, where episodes do not say otherwise. Default: the id."""
        return env_id

    def expert(self, env_id: str) -> None:
        """Raise EnvError, which points to --dataset, where a task has no scripted expert (`Environment.expert` is it)."""
        raise no_expert(env_id, "other tasks")

    def task_of(self, env_id: str) -> str:
        """The plain task's id, of a variant's id or of a plain one."""
        return env_id

    def variants(self, env_id: str) -> dict[str, str]:
        """Out-of-distribution variants of a task, in a fixed order, and the family of each. Default: none."""
        return {}

    def select(self, env_id: str, suites: Iterable[str], obs_mode: str) -> dict[str, str]:
        """Environments that an evaluation is to be in, and their families, in order.

        suites: "id" (the task itself, whose family is "id"), "ood" (all variants), a family's name, or a variant's. In obs_mode
        "state" nothing of the family "vision" is seen.
        """
        families = self.variants(env_id)
        chosen: dict[str, str] = {}
        for suite in suites:
            if suite == "id":
                found = {env_id: "id"}
            elif suite == "ood":
                found = {name: family for name, family in families.items() if family != "vision" or obs_mode == "rgb"}
            else:
                found = {name: family for name, family in families.items() if suite in (family, name.rpartition("/")[2])}
            if not found:
                known = ", ".join(["id", "ood", *dict.fromkeys(families.values()), "a variant's name"] if families else ["id"])
                raise EnvError(f"--suites: {env_id} has no {suite!r}, it has: {known}")
            chosen |= found
        return chosen

    def on_gpu(self) -> bool:
        """Whether `batched` works on this machine, so that backend "auto" takes it."""
        return False

    def batched(self, spec: Spec, num_envs: int, *, chunk: int, seed: int) -> Any:
        """All environments in one simulation on a GPU: a `vector.ChunkEnv`. EnvError where there is no such thing."""
        raise EnvError(f"{spec.env_id} takes backend 'cpu' (or 'auto'), not 'cuda'")
