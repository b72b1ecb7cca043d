"""lerobot's π0 and π0.5 folders: what they say, and what of it is followed, refused or told.

Below stands every field of both configurations, up to release 0.6.1, and every processor step that their pipelines have. What is
in no table is told in a warning (a field of config.json) or refused (a step, which is there to change something).
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from pi_stepnft.policies import layouts
from pi_stepnft.policies.layouts import Description, Statistics
from pi_stepnft.policies.processor import NormStats
from pi_stepnft.policies.weights import (
    JSON_BYTES,
    STATISTICS,
    CheckpointError,
    Count,
    Declared,
    Weights,
    declared,
    inside,
    listing,
    read,
    read_vector,
    regular,
    short,
)

Mode = Literal["IDENTITY", "MEAN_STD", "QUANTILES", "QUANTILE10", "MIN_MAX"]
FeatureType = Literal["STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE"]
Modes = dict[FeatureType, Mode]
"""how features of a type are scaled; lerobot leaves a type that is not there as it is"""

Names = Annotated[list[str], Field(fail_fast=True)] | None


class Feature(Declared):
    """One of input_features or output_features."""

    type: FeatureType
    shape: Annotated[list[Annotated[int, Field(ge=0, le=1 << 20)]], Field(fail_fast=True)] = []


class Config(Declared):
    """config.json: the fields that are followed."""

    type: str | None = None
    input_features: dict[str, Feature] | None = None
    output_features: dict[str, Feature] | None = None
    normalization_mapping: Modes | None = None
    chunk_size: Count | None = None
    n_action_steps: Count | None = None
    tokenizer_max_length: Count | None = None
    num_steps: Count | None = None
    num_inference_steps: Count | None = None
    min_period: float | None = None
    max_period: float | None = None
    max_state_dim: Count | None = None
    max_action_dim: Count | None = None
    image_resolution: Annotated[list[int], Field(fail_fast=True)] | None = None
    resize_imgs_with_padding: Annotated[list[int], Field(fail_fast=True)] | None = None
    use_relative_actions: bool = False
    relative_exclude_joints: Names = None
    action_feature_names: Names = None


FIELDS = dict(
    chunk_size="horizon", tokenizer_max_length="max_token_len", num_steps="num_steps", num_inference_steps="num_steps",
    min_period="min_period", max_period="max_period", max_state_dim="state_dim", max_action_dim="action_dim",
)
"""their names of fields of our configuration, older ones included"""
REFUSED = dict(
    n_obs_steps=(1, "several observations are given at once"),
    adapt_to_pi_aloha=(False, "joints and gripper are converted to another robot's convention"),
    use_delta_joint_actions_aloha=(False, "actions are offsets of joints"),
)
"""fields that change observations or actions unless they have this value"""
TOLD = dict(
    rtc_config=None, time_sampling_beta_alpha=1.5, time_sampling_beta_beta=1.0, time_sampling_scale=0.999,
    time_sampling_offset=0.001,
)
"""fields that change, unless they have this value, what is the program's here: how it trains, how chunks follow on one another"""
HARMLESS = set(
    # precision, speed, and sizes that follow from the shapes or the features
    """dtype device use_amp compile_model compile_mode gradient_checkpointing use_cache attention_implementation
    paligemma_variant action_expert_variant proj_width empty_cameras
    """
    # how it was trained and published
    """freeze_vision_encoder train_expert_only train_state_proj use_peft pretrained_path pretrained_revision push_to_hub repo_id
    private tags license optimizer_lr optimizer_betas optimizer_eps optimizer_weight_decay optimizer_grad_clip_norm
    optimizer_fused scheduler_warmup_steps scheduler_decay_steps scheduler_decay_lr
    """.split()
)


class Step(Declared):
    """A step of policy_preprocessor.json or policy_postprocessor.json."""

    registry_name: str | None = None
    class_path: str | None = Field(None, alias="class")
    config: dict = {}
    state_file: str | None = None


class Pipeline(Declared):
    """policy_preprocessor.json or policy_postprocessor.json"""

    steps: Annotated[list[Step], Field(fail_fast=True)]


class Scaling(Declared):
    """Of normalizer_processor and unnormalizer_processor; their eps, 1e-8, matters for dimensions that never varied only."""

    norm_map: Modes
    normalize_observation_keys: None = None
    state_file: str | None = None


class Relative(Declared):
    """Of relative_actions_processor: offsets from the state, but for actions whose names hold one of exclude_joints."""

    enabled: bool = False
    exclude_joints: Names = None
    action_names: Names = None


class Absolute(Declared):
    """Of absolute_actions_processor, which undoes the former."""

    enabled: bool = False


class StateInPrompt(Declared):
    """Of pi05_prepare_state_tokenizer_processor_step."""


class Prompt(Declared):
    """Of tokenizer_processor."""

    tokenizer_name: str | None = None
    max_length: Count | None = None
    padding_side: Literal["right"] = "right"


STATE_IN_PROMPT = "pi05_prepare_state_tokenizer_processor_step"
STEPS = {
    "relative_actions_processor": Relative, "delta_actions_processor": Relative, "normalizer_processor": Scaling,
    STATE_IN_PROMPT: StateInPrompt, "tokenizer_processor": Prompt, "unnormalizer_processor": Scaling,
    "absolute_actions_processor": Absolute,
}
"""steps that are followed, in the order in which a pipeline may have them (the tokenizer's place does not matter)"""
HARMLESS_STEPS = {
    "rename_observations_processor", "rename_processor", "to_batch_processor", "device_processor", "pi0_new_line_processor",
    "torch2numpy_action_processor", "numpy2torch_action_processor",
}
"""steps that do what policies.processor does anyway, or move and rename things"""
RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
"""modes that map a range onto [-1, 1], and the statistics that bound it"""
OWN: dict[str, Mode] = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}
"""the mode of each kind of policy"""
OURS = "pi_stepnft.json"
"""what `policies.export` writes beside lerobot's files: config.json of `policies.save`"""


def describe(folder: Path, weights: Weights, content: dict, kind: str, needs_statistics: bool) -> Description:
    """A lerobot folder: sizes in `config.json`, statistics beside the processor steps or, before 0.4, among the weights.

    Raises CheckpointError for what is damaged, contradicts itself, or would change observations or actions and is not supported.
    """
    where = folder / "config.json"
    config = declared(Config, content, where)
    if config.type not in (None, kind):
        raise CheckpointError(f"{where} is of type {config.type!r}, but the weights are those of {kind}")
    features = {**(config.input_features or {}), **(config.output_features or {})}
    widths = {name: feature.shape[0] for name, feature in features.items() if feature.shape}
    cameras = [name for name, feature in features.items() if feature.type == "VISUAL"]
    values = {own: value for theirs, own in FIELDS.items() if (value := getattr(config, theirs)) is not None}
    if cameras:
        values["num_cameras"] = len(cameras)
    found = Description(kind, values, meta={"layout": "lerobot", "cameras": cameras})
    if config.n_action_steps is not None:
        if config.n_action_steps > (config.chunk_size or config.n_action_steps):
            raise CheckpointError(f"{where}: n_action_steps is {config.n_action_steps}, more than chunk_size {config.chunk_size}")
        found.meta["execute"] = config.n_action_steps

    refused: list[str] = []
    look_through(config, content, cameras, layouts.sizes(weights, 1).get("image_size"), refused, found.notes)
    steps = {**pipeline(folder / "policy_preprocessor.json", refused), **pipeline(folder / "policy_postprocessor.json", refused)}
    modes = scalings(config, steps, kind, refused, found.notes)
    if cameras and modes["VISUAL"] != "IDENTITY":
        refused.append(f"pictures are scaled by {modes['VISUAL']}")
    step = steps.get("relative_actions_processor") or steps.get("delta_actions_processor")
    relative = step or Relative(
        enabled=config.use_relative_actions, exclude_joints=config.relative_exclude_joints, action_names=config.action_feature_names
    )
    if relative.enabled != getattr(steps.get("absolute_actions_processor"), "enabled", relative.enabled):
        refused.append("relative actions are made and not undone, or the other way round")
    if "use_relative_actions" in config.model_fields_set and relative.enabled != config.use_relative_actions:
        found.notes.append(f"use_relative_actions is {config.use_relative_actions}, but the step's {relative.enabled} is followed")
    prompt = steps.get("tokenizer_processor", Prompt())
    if prompt.max_length is not None:
        values["max_token_len"] = prompt.max_length
    if kind == "pi05" and "tokenizer_processor" in steps and STATE_IN_PROMPT not in steps:
        values["discrete_state"] = False
    if "paligemma" not in (prompt.tokenizer_name or "paligemma").lower() and not os.path.lexists(folder / OURS):
        found.notes.append(f"its prompts are those of the tokenizer {short(prompt.tokenizer_name)}")
    if refused:
        raise CheckpointError(
            f"{folder} asks for what would change observations or actions and is not supported: {listing(refused, 40)}; "
            "if your environment does the same, delete these entries, or else train without them"
        )

    # Prompts lost their padding in the release, 0.5, that first had a step and a field for relative actions.
    found.processor["pad_state_bins"] = kind == "pi05" and step is None and "use_relative_actions" not in config.model_fields_set
    if relative.enabled:
        if "action" not in widths:
            raise CheckpointError(f"{where} lacks the shape of 'action' in output_features, by which actions are relative")
        found.processor["relative"] = relative_dims(relative, widths["action"])
    if needs_statistics:
        statistics = step_statistics(folder, steps) or buffer_statistics(weights)
        for own, name, feature in (("state", "observation.state", "STATE"), ("actions", "action", "ACTION")):
            stats = scaling(statistics.get(name), modes[feature], kind, widths.get(name), f"{folder}: statistics of {name}")
            if stats is not None and len(stats) != widths.get(name, len(stats)):
                raise CheckpointError(f"{folder}: {name} has {len(stats)} statistics, but {widths[name]} dimensions in config.json")
            setattr(found, own, stats)
    return found


def look_through(
    config: Config, content: dict, cameras: list[str], side: int | None, refused: list[str], notes: list[str]
) -> None:
    """Add what `config.json` asks for and is not followed to `refused` or to `notes`. side: of the vision tower's pictures."""
    refused += [
        f"{name} is {short(content[name])} ({why})" for name, (value, why) in REFUSED.items() if differs(content, name, value)
    ]
    for resolution in (config.image_resolution, config.resize_imgs_with_padding):
        if resolution not in (None, [side, side]):
            refused.append(f"pictures are fitted to {short(resolution)} (the vision tower takes {side})")
    notes += [f"{name} is not followed" for name, value in TOLD.items() if differs(content, name, value)]
    notes += [f"{short(name)} is not known" for name in config.model_extra if name not in {*REFUSED, *TOLD, *HARMLESS}]
    seeing = [name for name in cameras if "empty" not in name]
    if seeing != sorted(seeing, key=lambda name: "wrist" in name):
        notes.append(f"pictures are expected in the order {', '.join(seeing)}")


def differs(content: dict, name: str, value: object) -> bool:
    """Whether an entry is there, switched on, and not `value`."""
    given = content.get(name)
    return given not in (None, value) and not (isinstance(given, dict) and given.get("enabled") is False)


def pipeline(file: Path, refused: list[str]) -> dict[str, Declared]:
    """The steps of a processor that are followed, by name; none if there is no such file. Adds the others to `refused`."""
    found: dict[str, Declared] = {}
    if not os.path.lexists(file):
        return found
    for step in read(Pipeline, file).steps:
        name = step.registry_name or step.class_path or ""
        if name in STEPS and name not in found:
            found[name] = declared(STEPS[name], {**step.config, "state_file": step.state_file}, f"{file}: {name}")
        elif name not in HARMLESS_STEPS:
            refused.append(f"{'another ' if name in found else ''}step {short(name)} in {file.name}")
    order = [list(STEPS).index(name) for name in found if name != "tokenizer_processor"]
    if order != sorted(order):
        refused.append(f"the order of {listing(list(found))} in {file.name}")
    return found


def scalings(config: Config, steps: dict[str, Declared], kind: str, refused: list[str], notes: list[str]) -> dict[str, Mode]:
    """How features of each type are scaled: as the steps say, else `config.json`, else as this kind of policy does."""
    found = {}
    for feature, default in (("VISUAL", "IDENTITY"), ("STATE", OWN[kind]), ("ACTION", OWN[kind])):
        names = ("normalizer_processor", "unnormalizer_processor") if feature == "ACTION" else ("normalizer_processor",)
        said = [steps[name].norm_map.get(feature, "IDENTITY") for name in names if name in steps]
        general = default if config.normalization_mapping is None else config.normalization_mapping.get(feature, "IDENTITY")
        if len(set(said)) > 1:
            refused.append(f"{feature} is scaled by {said[0]}, but scaled back by {said[1]}")
        if said and config.normalization_mapping is not None and general != said[0]:
            notes.append(f"normalization_mapping says {general} for {feature}, but the step's {said[0]} is followed")
        found[feature] = said[0] if said else general
    return found


def step_statistics(folder: Path, steps: dict[str, Declared]) -> dict[str, Statistics]:
    """Statistics per feature in the files beside lerobot's normalising steps."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for step in steps.values():
        if not isinstance(step, Scaling) or step.state_file is None:
            continue
        file = regular(inside(folder, step.state_file, folder / "policy_preprocessor.json"), JSON_BYTES)
        try:
            with safe_open(file, "pt") as tensors:
                stored = list(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is not a complete safetensors file ({error}); copy it again") from None
        for name in stored:
            feature, _, statistic = name.rpartition(".")
            if feature in ("observation.state", "action") and statistic in Statistics.model_fields:
                found.setdefault(feature, {})[statistic] = read_vector(file, name)
    return {feature: Statistics.model_construct(**entry) for feature, entry in found.items()}


def buffer_statistics(weights: Weights) -> dict[str, Statistics]:
    """Statistics per feature that lerobot before 0.4 kept among the weights, as `normalize_inputs.buffer_<feature>.<name>`."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for stored, file in weights.extras.items():
        feature, _, statistic = stored.partition(".buffer_")[2].rpartition(".")
        name = {"observation_state": "observation.state", "action": "action"}.get(feature)
        if name and stored.startswith(STATISTICS) and statistic in Statistics.model_fields:
            found.setdefault(name, {})[statistic] = read_vector(file, stored)
    return {feature: Statistics.model_construct(**entry) for feature, entry in found.items()}


def scaling(entry: Statistics | None, mode: Mode, kind: str, width: int | None, where: str) -> NormStats | None:
    """lerobot's statistics of one feature as ours, so that this kind of policy scales by them as `mode` says.

    None if there are none. Raises CheckpointError if those of the mode are missing.
    """
    if mode == "IDENTITY" and width:
        return NormStats.identity(width)
    if entry is None:
        return None
    if mode == OWN[kind]:
        return layouts.norm_stats(entry, kind, where)
    names = RANGES.get(mode, ("mean", "std"))
    if any(getattr(entry, name) is None for name in names):
        raise CheckpointError(f"{where}: {listing(sorted(entry.model_fields_set))} do not serve its mode {mode}; pass norm_stats=")
    return layouts.scaled(*(getattr(entry, name) for name in names), mode in RANGES, where)


def relative_dims(relative: Relative, size: int) -> list[int]:
    """Action dimensions that lerobot's relative-action step shifts by the state: all but those of excluded names."""
    excluded, names = [name.lower() for name in relative.exclude_joints or () if name], relative.action_names or ()
    return [i for i in range(size) if i >= len(names) or not any(word in names[i].lower() for word in excluded)]
