"""What tensor shapes and openpi's PyTorch folders say about a policy (for lerobot's see policies.lerobot), and the hub.

Sizes come from tensor shapes; what shapes cannot tell (horizon, cameras, prompt) from the configuration beside them, and
else from the published defaults. What a configuration says and is not understood is refused, or told in a warning.
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from pydantic import ConfigDict, Field

from pi_stepnft.policies.pi0 import Pi0Config
from pi_stepnft.policies.processor import CONSTANT, NormStats
from pi_stepnft.policies.weights import (
    EMBEDDING,
    EXPERT,
    PALIGEMMA,
    CheckpointError,
    Count,
    Declared,
    Vector,
    Weights,
    declared,
    listing,
    read_json,
    short,
)

HUB_FILES = ["*.json", "model*.safetensors", "policy_p*.safetensors", "tokenizer.model"]
HUB_IGNORED = ["*/*.safetensors"]
VISION, LANGUAGE = f"{PALIGEMMA}model.vision_tower.vision_model.", f"{PALIGEMMA}model.language_model."
# Configuration field -> the tensor and the axis that tell it; attention widths still have to be divided by the head's.
SIZES = {
    "vision_width": (f"{VISION}embeddings.patch_embedding.weight", 0),
    "patch_size": (f"{VISION}embeddings.patch_embedding.weight", 2),
    "vision_patches": (f"{VISION}embeddings.position_embedding.weight", 0),
    "vision_mlp": (f"{VISION}encoder.layers.0.mlp.fc1.weight", 0),
    "vocab_size": (EMBEDDING, 0),
    "vlm_width": (EMBEDDING, 1),
    "vlm_mlp": (f"{LANGUAGE}layers.0.mlp.gate_proj.weight", 0),
    "heads": (f"{LANGUAGE}layers.0.self_attn.q_proj.weight", 0),
    "kv_heads": (f"{LANGUAGE}layers.0.self_attn.k_proj.weight", 0),
    "expert_width": ("action_in_proj.weight", 0),
    "expert_mlp": (f"{EXPERT}model.layers.0.mlp.gate_proj.weight", 0),
    "action_dim": ("action_in_proj.weight", 1),
    "state_dim": ("state_proj.weight", 1),
}
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
LOCAL = ("runs", "outputs", "checkpoints")  # folders that trainings write to, not organisations of the hub


@dataclass
class Description:
    """A checkpoint without its weights."""

    type: str
    """"pi0" or "pi05" """
    config: dict
    """fields of the policy's configuration"""
    state: NormStats | None = None
    """statistics of the state; None if the checkpoint has none"""
    actions: NormStats | None = None
    """statistics of the actions; None if the checkpoint has none"""
    tokenizer: str | None = None
    """name of the tokenizer's file in the folder; None if there is none"""
    processor: dict = field(default_factory=dict)
    """further arguments of the Processor"""
    meta: dict = field(default_factory=dict)
    """what `policy.meta` tells about the origin"""
    notes: list[str] = field(default_factory=list)
    """what the folder says and is not followed, to be told in a warning"""


# -------------------------------------------------------------------- folders and the hub


def fetch(repo: str) -> Path:
    """Folder in the hub's cache that holds the files of a model repository which a policy needs.

    Raises CheckpointError if they are neither cached nor within reach.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except GatedRepoError:
        reason = "asks for its licence to be accepted; do so on its page, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is no folder here and no model on the hub, or a private one; check the name or `hf auth login`"
    except LocalEntryNotFoundError:
        reason = "is no folder here, not in the hub's cache, and the hub is out of reach; go online once or give a folder"
    except (OSError, ValueError) as error:
        reason = f"could not be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    raise CheckpointError(f"hub id {repo!r} {reason}") from None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form org/name of the hub, and is not a path of here that is mistyped."""
    first = name.partition("/")[0]
    known = first in LOCAL or os.path.isdir(first)
    return not known and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def find_tokenizer(place: Path) -> Path:
    """The tokenizer file that a path or a hub id means; the path itself if there is none, for the error that names it."""
    if not os.path.lexists(place) and is_hub_id(str(place)):
        place = fetch(str(place))
    return place / (beside(place) or "")


def beside(folder: Path) -> str | None:
    """Name of the tokenizer in a folder, if there is one."""
    return next((name for name in TOKENIZER_FILES if os.path.lexists(folder / name)), None)


# -------------------------------------------------------------------- recognising a layout


def policy_type(weights: Weights) -> str:
    """ "pi05" if the expert's norms are adaptive, "pi0" if there are state and time projections.

    Raises CheckpointError if the weights are of neither.
    """
    if f"{EXPERT}model.norm.dense.weight" in weights.shapes:
        return "pi05"
    if "action_time_mlp_in.weight" in weights.shapes or "state_proj.weight" in weights.shapes:
        return "pi0"
    raise CheckpointError(
        f"{weights} holds no π0 or π0.5 policy, but {listing(sorted(weights.shapes), 3) or 'nothing'}; "
        f"expected {EXPERT}… and action_in_proj"
    )


def sizes(weights: Weights, head_dim: int) -> dict:
    """Configuration fields that follow from the shapes of the weights; what is absent is left for loading to name."""
    shapes = weights.shapes
    found = {field: shapes[name][axis] for field, (name, axis) in SIZES.items() if len(shapes.get(name, ())) > axis}
    for field_name, stack in (("vision_depth", f"{VISION}encoder.layers."), ("vlm_depth", f"{LANGUAGE}layers.")):
        layers = {name.removeprefix(stack).partition(".")[0] for name in shapes if name.startswith(stack)}
        if layers:
            found[field_name] = len(layers)
    if "vision_patches" in found:
        found["image_size"] = math.isqrt(found.pop("vision_patches")) * found.get("patch_size", Pi0Config.patch_size)
    for field_name in ("heads", "kv_heads"):
        if field_name in found:
            found[field_name] //= head_dim
    return found


def check_sizes(config: Pi0Config, weights: Weights) -> None:
    """Compare a configuration with the shapes before anything is built by it: a damaged one may tell of 10^6 layers.

    Raises CheckpointError that names every difference.
    """
    said = config.to_dict()
    shapes = sizes(weights, config.head_dim)
    if wrong := [f"{name} {said[name]} instead of {size}" for name, size in shapes.items() if said[name] != size]:
        raise CheckpointError(f"{weights} does not fit the {config.type} configuration: {listing(wrong, 40)}; "
                              "use the config.json saved with it")


# -------------------------------------------------------------------- openpi


class Options(Declared):
    """Arguments of a Processor beside tokenizer and statistics, in our config.json"""

    model_config = ConfigDict(extra="forbid")
    relative: Annotated[list[int], Field(fail_fast=True)] = []
    pad_state_bins: bool = False


class OpenPi(Declared):
    """config.json of openpi's converter, and what `policies.export` adds to it. What else it may say is in OPENPI_KNOWN."""

    action_horizon: Count | None = None
    action_dim: Count | None = None
    max_token_len: Count | None = None
    discrete_state_input: bool | None = None
    pi05: bool | None = None
    model: dict = {}
    processor: Options = Options()


OPENPI_KNOWN = {"precision", "dtype", "paligemma_variant", "action_expert_variant", "pytorch_compile_mode"}
"""precision and compilation are the caller's, the variants follow from the shapes"""


def openpi(config: dict, kind: str, where: Path) -> Description:
    """A folder of openpi, or of RL runs that build on it: `config.json`, if there is one, tells horizon and prompt.

    A folder written by `policies.export` also carries our own configuration and processor options.
    """
    c = declared(OpenPi, config, where)
    if c.pi05 not in (None, kind == "pi05"):
        raise CheckpointError(f"{where} says pi05: {c.pi05}, but the weights are those of {kind}")
    values = dict(horizon=c.action_horizon, action_dim=c.action_dim, max_token_len=c.max_token_len)
    if kind == "pi05":
        values["discrete_state"] = c.discrete_state_input
    values = {name: value for name, value in values.items() if value is not None}
    notes = [f"{short(name)} is not known" for name in c.model_extra if name not in OPENPI_KNOWN]
    return Description(kind, {**values, **c.model}, processor=c.processor.model_dump(), meta={"layout": "openpi"}, notes=notes)


def asset_name(folder: Path, file: Path) -> str:
    """The asset that a `norm_stats.json` belongs to: its folders below `assets/` or below the checkpoint."""
    parts = file.parent.relative_to(folder).parts
    return "/".join(parts[1:] if parts[:1] == ("assets",) else parts)


def find_norm_stats(folder: Path, asset_id: str | None) -> Path:
    """The `norm_stats.json` of an asset, below `assets/` or directly beside the weights.

    Raises CheckpointError if it is not there, or if none is named and there are several.
    """
    files = {asset_name(folder, file): file for file in sorted(folder.glob("**/norm_stats.json"))}
    if asset_id in files:
        return files[asset_id]
    if asset_id is not None:
        raise CheckpointError(
            f"{folder} has no statistics for asset_id {asset_id!r}; choose one of: {listing(list(files), 40) or 'none'}"
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} has statistics of several data sets; choose one with asset_id=: {listing(list(files), 40)}"
        )
    if not files:
        raise CheckpointError(
            f"{folder} has no statistics: no config.json of policies.save, no statistics of lerobot, no "
            "assets/<asset_id>/norm_stats.json; pass norm_stats=, a path, or 'identity' to fine-tune on new data"
        )
    return next(iter(files.values()))


class Statistics(Declared):
    """Of one vector, in openpi's norm_stats.json, in our config.json and, with those of other modes, in lerobot's files."""

    mean: Vector | None = None
    std: Vector | None = None
    q01: Vector | None = None
    q99: Vector | None = None
    q10: Vector | None = None
    q90: Vector | None = None
    min: Vector | None = None
    max: Vector | None = None


class NormStatsFile(Declared):
    """norm_stats.json of openpi, or its only entry"""

    state: Statistics
    actions: Statistics


def read_norm_stats(file: str | Path, config: Pi0Config, notes: list[str]) -> tuple[NormStats, NormStats]:
    """Statistics of state and actions in openpi's layout, without the zeros that pad them to the policy's width.

    notes: takes what is to be told of them. Raises CheckpointError if an entry that this kind of policy needs is missing or
    not finite.
    """
    content = read_json(file)
    found = declared(NormStatsFile, content.get("norm_stats", content), file)
    state, actions = (norm_stats(getattr(found, name), config.type, f"{file}: {name}") for name in ("state", "actions"))
    return without_padding(state, "state", config.state_dim, notes), without_padding(actions, "actions", config.action_dim, notes)


def without_padding(stats: NormStats, name: str, width: int, notes: list[str]) -> NormStats:
    """Statistics as wide as the policy, up to the last dimension that is not constantly zero; narrower ones are not padded."""
    values = stats.to_dict()
    used = np.abs(np.stack(list(values.values()))).max(axis=0) > CONSTANT  # (D,); openpi's quantiles of zeros are off by 1e-10
    if len(used) < width or used[-1] or not used.any():
        return stats
    size = 1 + int(used.nonzero()[0].max())
    notes.append(f"statistics of {name} are zero from dimension {size} on, which is taken for padding")
    return NormStats(**{name: value[:size] for name, value in values.items()})


def norm_stats(entry: Statistics, kind: str, where: str) -> NormStats:
    """Statistics of one vector; those that this kind of policy does not use may be missing.

    Raises CheckpointError if one that it uses is missing or not finite.
    """
    given = {name: getattr(entry, name) for name in ("mean", "std", "q01", "q99") if getattr(entry, name) is not None}
    needed = ("q01", "q99") if kind == "pi05" else ("mean", "std")
    if missing := [name for name in needed if name not in given]:
        raise CheckpointError(f"{where} lacks {listing(missing)}, by which {kind} policies are scaled; pass norm_stats=")
    return scaled(*(given[name] for name in needed), kind == "pi05", where, given)


def scaled(first: list[float], second: list[float], is_range: bool, where: str, given: dict | None = None) -> NormStats:
    """Statistics from a center and a scale or, with is_range, from the bounds of a range; `given` are taken as they are.

    Raises CheckpointError if they are not finite, or not of one length.
    """
    try:
        first, second = (np.asarray(value, dtype=np.float64) for value in (first, second))
        center, scale = ((first + second) / 2, (second - first) / 2) if is_range else (first, second)
        return NormStats(**{**NormStats.affine(center, scale).to_dict(), **(given or {})})
    except (OverflowError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}; pass norm_stats=") from None
