"""What checkpoints of other projects say about a policy: openpi's PyTorch folders and lerobot's π0 and π0.5.

`describe` recognises the layout of a folder and returns everything but the weights: sizes, normalisation statistics,
prompt, cameras. Sizes come from tensor shapes; what shapes cannot tell (horizon, cameras, prompt) from the configuration
beside them, and else from the published defaults.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from pi_stepnft.policies.pi0 import Pi0Config
from pi_stepnft.policies.processor import NormStats
from pi_stepnft.policies.weights import EMBEDDING, EXPERT, PALIGEMMA, STATISTICS, CheckpointError, Weights, listing, read_json

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
RELATIVE_STEPS = ("relative_actions_processor", "delta_actions_processor")
# lerobot's names of configuration fields, older ones included, and ours.
LEROBOT_FIELDS = dict(
    chunk_size="horizon", tokenizer_max_length="max_token_len", num_steps="num_steps", num_inference_steps="num_steps",
    min_period="min_period", max_period="max_period",
)
# lerobot's normalisation modes that map a range onto [-1, 1], and the statistics that bound it.
RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
PADDING_TOLERANCE = 1e-6  # openpi's quantiles of a padded, hence constant, dimension are off by its histogram's margin, 1e-10


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
    tokenizer: Path | None = None
    """tokenizer file; None if the checkpoint names none"""
    processor: dict = field(default_factory=dict)
    """further arguments of the Processor"""
    meta: dict = field(default_factory=dict)
    """what `policy.meta` tells about the origin"""


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
    """Whether a name has the form org/name of the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def find_tokenizer(place: Path) -> Path:
    """The tokenizer file that a path or a hub id means; the path itself if there is none, for the error that names it."""
    if not place.exists() and is_hub_id(str(place)):
        place = fetch(str(place))
    return next((place / name for name in TOKENIZER_FILES if (place / name).is_file()), place)


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
        found[field_name] = max(1, len(layers))
    if "vision_patches" in found:
        found["image_size"] = math.isqrt(found.pop("vision_patches")) * found.get("patch_size", Pi0Config.patch_size)
    for field_name in ("heads", "kv_heads"):
        if field_name in found:
            found[field_name] //= head_dim
    if "action_dim" in found:
        found.setdefault("state_dim", found["action_dim"])  # π0.5 has no projection of the state
    return found


def describe(
    folder: Path, weights: Weights, asset_id: str | None, head_dim: int, needs_statistics: bool = True
) -> Description:
    """Everything but the weights of a folder that `policies.save` did not write.

    asset_id: which of several statistics to use, as in `assets/<asset_id>/norm_stats.json`; head_dim: width of an attention
    head, which shapes do not tell. Raises CheckpointError if the folder contradicts itself or, where needed, has no
    statistics.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    kind = policy_type(weights)
    try:
        if "type" in config or "input_features" in config:
            found = lerobot(folder, weights, config, kind, needs_statistics and asset_id is None)
        else:
            found = openpi(config, kind)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its JSON files are not as openpi or lerobot write them ({error!r})") from error
    if needs_statistics and (found.state is None or found.actions is None):
        file = find_norm_stats(folder, asset_id)
        found.state, found.actions = read_norm_stats(file, kind)
        found.meta["asset_id"] = asset_name(folder, file)
    found.tokenizer = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    found.config = {**sizes(weights, head_dim), **found.config}
    return found


# -------------------------------------------------------------------- openpi


def openpi(config: dict, kind: str) -> Description:
    """A folder of openpi, or of RL runs that build on it: `config.json`, if there is one, tells the horizon.

    A folder written by `policies.export` also carries our own configuration and processor options.
    """
    values = {"horizon": config["action_horizon"]} if "action_horizon" in config else {}
    return Description(
        kind, {**values, **config.get("model", {})}, processor=config.get("processor", {}), meta={"layout": "openpi"}
    )


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


def read_norm_stats(file: str | Path, kind: str) -> tuple[NormStats, NormStats]:
    """Statistics of state and actions in openpi's layout, without the zeros that pad them to the policy's width.

    Raises CheckpointError if an entry that this kind of policy needs is missing or not finite.
    """
    content = read_json(file)
    content = content.get("norm_stats", content)
    found = []
    for name in ("state", "actions"):
        entry = content.get(name)
        if not isinstance(entry, dict):
            raise CheckpointError(f"{file} has no statistics of {name!r}; expected {{'norm_stats': {{'state': …, 'actions': …}}}}")
        found.append(without_padding(norm_stats(entry, kind, f"{file}: {name}")))
    return found[0], found[1]


def without_padding(stats: NormStats) -> NormStats:
    """Statistics up to the last dimension that is not constantly zero."""
    values = stats.to_dict()
    used = np.abs(np.stack(list(values.values()))).max(axis=0) > PADDING_TOLERANCE  # (D,)
    size = 1 + int(used.nonzero()[0].max()) if used.any() else len(used)
    return NormStats(**{name: value[:size] for name, value in values.items()})


def norm_stats(entry: dict, kind: str, where: str) -> NormStats:
    """Statistics of one vector; those that this kind of policy does not use may be missing.

    Raises CheckpointError if one that it uses is missing or not finite.
    """
    names = ("mean", "std", "q01", "q99")
    needed = names[2:] if kind == "pi05" else names[:2]
    if missing := [name for name in needed if entry.get(name) is None]:
        raise CheckpointError(f"{where} lacks {listing(missing)}, by which {kind} policies are scaled; pass norm_stats=")
    try:
        given = {name: np.asarray(entry[name], dtype=np.float64) for name in names if entry.get(name) is not None}
        first, second = (given[name] for name in needed)
        center, scale = (first, second) if kind == "pi0" else ((first + second) / 2, (second - first) / 2)
        values = {**NormStats.affine(center, scale).to_dict(), **given}
        return NormStats(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}; pass norm_stats=") from None


# -------------------------------------------------------------------- lerobot


def lerobot(folder: Path, weights: Weights, config: dict, kind: str, needs_statistics: bool) -> Description:
    """A lerobot folder: sizes in `config.json`, statistics beside the processor steps or, before 0.4, among the weights."""
    if config.get("type", kind) != kind:
        raise CheckpointError(f"{folder}/config.json is of type {config['type']!r}, but the weights are those of {kind}")
    values = {own: config[theirs] for theirs, own in LEROBOT_FIELDS.items() if theirs in config}
    features = {**(config.get("input_features") or {}), **(config.get("output_features") or {})}
    widths = {name: feature["shape"][0] for name, feature in features.items() if feature.get("shape")}
    cameras = [name for name, feature in features.items() if feature.get("type") == "VISUAL"]
    if cameras:
        values["num_cameras"] = len(cameras)
    found = Description(kind, values, meta={"layout": "lerobot", "cameras": cameras})

    steps = [step for name in ("pre", "post") for step in processor_steps(folder / f"policy_{name}processor.json")]
    relative = next((step for step in steps if step_name(step) in RELATIVE_STEPS), None)
    if relative is not None and relative.get("config", {}).get("enabled"):
        found.processor["relative"] = relative_dims(relative["config"], widths["action"])
    # Prompts lost their padding in the release, 0.5, whose pipelines first had a step for relative actions.
    found.processor["pad_state_bins"] = kind == "pi05" and relative is None
    if needs_statistics:
        statistics = step_statistics(folder, steps) or buffer_statistics(weights)
        modes = [step["config"]["norm_map"] for step in steps if "norm_map" in step.get("config", {})]
        modes = {**(config.get("normalization_mapping") or {}), **(modes[0] if modes else {})}
        default = "QUANTILES" if kind == "pi05" else "MEAN_STD"
        for own, name, feature in (("state", "observation.state", "STATE"), ("actions", "action", "ACTION")):
            mode, where = modes.get(feature, default), f"{folder}: statistics of {name}"
            setattr(found, own, scaling(statistics.get(name), mode, kind, widths.get(name), where))
    return found


def processor_steps(file: Path) -> list[dict]:
    """Steps of a lerobot processor; none if there is no such file."""
    return read_json(file).get("steps", []) if file.is_file() else []


def step_name(step: dict) -> str:
    """Registered name of a processor step, or its class."""
    return step.get("registry_name") or step.get("class", "")


def step_statistics(folder: Path, steps: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics per feature in the files beside lerobot's normalising steps."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for step in steps:
        name = step.get("state_file")
        if name is None or "normalizer" not in step_name(step).lower():
            continue
        try:
            tensors = load_file(folder / Path(name).name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} is not a complete safetensors file ({error}); copy it again") from None
        for key, tensor in tensors.items():
            feature, _, statistic = key.rpartition(".")
            found.setdefault(feature, {})[statistic] = tensor.double().numpy()
    return found


def buffer_statistics(weights: Weights) -> dict[str, dict[str, np.ndarray]]:
    """Statistics per feature that lerobot before 0.4 kept among the weights, as `normalize_inputs.buffer_<feature>.<name>`."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for stored in weights.extras:
        if not stored.startswith(STATISTICS) or ".buffer_" not in stored:
            continue
        feature, _, statistic = stored.partition(".buffer_")[2].rpartition(".")
        name = {"observation_state": "observation.state", "action": "action"}.get(feature)
        if name:
            found.setdefault(name, {})[statistic] = weights.read_extra(stored).double().numpy()
    return found


def scaling(entry: dict | None, mode: str, kind: str, width: int | None, where: str) -> NormStats | None:
    """lerobot's statistics of one feature as ours, so that this kind of policy scales by them as `mode` says.

    None if there are none. Raises CheckpointError if the mode is unknown or its statistics are missing.
    """
    if mode == "IDENTITY" and width:
        return NormStats.identity(width)
    if not entry:
        return None
    if mode == ("QUANTILES" if kind == "pi05" else "MEAN_STD"):  # what this kind of policy does anyway
        return norm_stats(entry, kind, where)
    names = RANGES.get(mode, ("mean", "std"))
    if mode not in (*RANGES, "MEAN_STD") or any(name not in entry for name in names):
        raise CheckpointError(f"{where}: {listing(sorted(entry))} do not serve its mode {mode}; pass norm_stats=")
    first, second = (entry[name] for name in names)
    try:
        return NormStats.affine(*((first, second) if mode == "MEAN_STD" else ((first + second) / 2, (second - first) / 2)))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}; pass norm_stats=") from None


def relative_dims(config: dict, size: int) -> list[int]:
    """Action dimensions that lerobot's relative-action step shifts by the state: all but those of excluded names."""
    excluded, names = [name.lower() for name in config.get("exclude_joints") or ()], config.get("action_names") or ()
    return [i for i in range(size) if i >= len(names) or not any(word in str(names[i]).lower() for word in excluded)]
