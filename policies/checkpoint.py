"""Checkpoints: a folder with `model.safetensors`, `config.json` and `tokenizer.model`.

Tensors carry the names of openpi's published π0 and π0.5, so one layout serves every size. Nothing is pickled. Loading
takes this format and those of other projects (see policies.layouts), and either returns a policy whose every weight came
from the files, or raises CheckpointError with one line that names what is wrong.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pi_stepnft.policies import card, layouts, lerobot, lora
from pi_stepnft.policies.pi0 import Pi0, Pi0Config
from pi_stepnft.policies.pi05 import Pi05, Pi05Config
from pi_stepnft.policies.processor import NormStats, Processor, Tokenizer
from pi_stepnft.policies.weights import (
    CheckpointError,
    Count,
    Declared,
    Weights,
    declared,
    inside,
    is_finite,
    listing,
    load_weights,
    published_name,
    read_json,
    short,
    weight_files,
)

FORMAT_VERSION = 1
TYPES = {"pi0": (Pi0, Pi0Config), "pi05": (Pi05, Pi05Config)}
BUNDLED = Path(__file__).parent / "checkpoints"
# Where the policy lies in the folder of a training, of ours and of lerobot's; the last of several is the newest.
ABOVE = ("", "checkpoints/last/", "checkpoints/*/", "last/", "[0-9]*/")
TRAININGS = [f"{above}{name}" for above in ABOVE for name in ("policy", "pretrained_model")]
SAVE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bundled() -> list[str]:
    """Names of the checkpoints that ship with the project."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


# -------------------------------------------------------------------- save


def save(policy: Pi0, folder: str | Path, dtype: str | None = None) -> None:
    """Write a policy, with its processor and `meta`, to a folder, which is created if needed.

    dtype: "float32", "float16" or "bfloat16" stores the weights in that type; None stores each as it is held.
    All files are written and flushed beside their targets first and then renamed, the weights last, so a full disk or a
    killed process leaves an older checkpoint readable; other files in the folder are not touched.
    Raises CheckpointError if a weight is NaN or infinite (or becomes so in `dtype`), if the policy has no processor, or
    if the folder cannot be written.
    """
    folder = Path(folder)
    if policy.processor is None:
        raise CheckpointError(
            "the policy has no processor; set policy.processor before saving, or the actions cannot be used"
        )
    tensors = published_tensors(policy, dtype, folder)
    tokenizer, described = policy.processor.tokenizer, description(policy, folder)
    write_files(folder, {
        "config.json": lambda path: path.write_text(described),
        tokenizer_file(tokenizer): lambda path: path.write_bytes(tokenizer.serialized),
        **card.writer(policy, folder),
        "model.safetensors": lambda path: save_file(tensors, path),
    })


def tokenizer_file(tokenizer: Tokenizer) -> str:
    """What a tokenizer is called in a checkpoint."""
    return f"tokenizer{tokenizer.path.suffix}"


def description(policy: Pi0, folder: Path) -> str:
    """All of a policy but its weights, as JSON. Raises CheckpointError, which names the folder, if its meta is not plain JSON."""
    processor = policy.processor
    config = {
        "format_version": FORMAT_VERSION,
        "type": policy.config.type,
        "model": policy.config.to_dict(),
        "processor": {
            "tokenizer": tokenizer_file(processor.tokenizer),
            "state": processor.state_stats.to_dict(),
            "actions": processor.action_stats.to_dict(),
            **processor.options(),
        },
        "meta": policy.meta,
    }
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"not saved to {folder}: policy.meta must be plain finite JSON values ({error})"
        ) from None


def published_tensors(policy: Pi0, dtype: str | None, folder: Path) -> dict[str, Tensor]:
    """The policy's weights under their published names, on the CPU, in `dtype` or as they are held, adapters merged.

    Raises CheckpointError on an unknown dtype, or if a weight is NaN or infinite (or becomes so in `dtype`).
    """
    if dtype is not None and dtype not in SAVE_DTYPES:
        raise CheckpointError(
            f"dtype is {dtype!r}; expected one of {', '.join(SAVE_DTYPES)}, or None to keep the weights' own"
        )
    tensors = {}
    for name, tensor in lora.merged(policy):
        tensor = tensor.cpu()
        tensor = tensor.to(SAVE_DTYPES[dtype]) if dtype else tensor
        tensors[published_name(name)] = tensor.contiguous()
    if broken := sorted(name for name, tensor in tensors.items() if not is_finite(tensor)):
        raise CheckpointError(
            f"not saved to {folder}: NaN or infinite values in {listing(broken)}; the training diverged"
        )
    return tensors


def write_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Write files, each by a function of its path, so that all of them or none replace older ones.

    All are written and flushed beside their targets first and then renamed, in the order given. Raises CheckpointError if
    the folder cannot be written.
    """
    targets = {name: folder / name for name in writers}
    temporary = {name: path.with_name(f".{path.name}.{os.getpid()}.tmp") for name, path in targets.items()}
    try:
        for name, write in writers.items():
            targets[name].parent.mkdir(parents=True, exist_ok=True)
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        for name, path in targets.items():
            os.replace(temporary[name], path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"not saved to {folder}: {error}; an older checkpoint there is unchanged") from None
    finally:
        for path in temporary.values():
            if os.path.lexists(path):  # not where the folder is a file or its name too long: that is told above
                path.unlink()


# -------------------------------------------------------------------- load


def load(
    path_or_name: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
    *,
    trained: str | None = None,
    expect: str | None = None,
    asset_id: str | None = None,
    norm_stats: str | Path | None = None,
    relative: Sequence[int] | None = None,
    **options,
) -> Pi0:
    """Read a policy in eval mode, with `policy.processor` and `policy.meta`.

    path_or_name: a folder written by `save` or `export`, by openpi (PyTorch), lerobot (π0, π0.5) or an RL run in openpi's
    layout; a hub id (org/name); or the name of a checkpoint that ships with the project. The layout is recognised.
    dtype: precision of the transformers (see Pi0.cast); tensors are cast one by one on the way.
    tokenizer: a sentencepiece file, a tokenizer.json, or a folder or hub id with one; needed where the checkpoint has none.
    trained: "expert" or "all" of the weights stay float32 whatever `dtype`, to be trained (see Pi0.cast).
    expect: "pi0" or "pi05" refuses the other.
    asset_id: which statistics of several, as in `assets/<asset_id>/norm_stats.json`.
    norm_stats: another norm_stats.json to use instead, or "identity" for none: what a base checkpoint needs before its
    fine-tuning brings statistics of its own.
    relative: action dimensions that are offsets from the state (see Processor), where the checkpoint cannot tell.
    options: fields of the policy's configuration that override the checkpoint's, such as horizon, num_cameras,
    discrete_state.
    Raises CheckpointError if anything is missing, unreadable, unexpected, mis-shaped or not finite.
    """
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"dtype is {dtype!r}; expected one of torch's, such as torch.bfloat16")
    folder = find(path_or_name)
    weights = Weights(weight_files(folder))
    described = describe(folder, weights, options, needs_statistics=norm_stats is None and asset_id is None)
    kind = described.type
    if expect not in (None, kind):
        raise CheckpointError(f"{folder} holds a {kind} policy; expected {expect}: use what is made for {kind}, or other weights")
    if relative is not None:
        described.processor["relative"] = relative
    file = norm_stats
    if file is None and (described.state is None or described.actions is None):
        file = layouts.find_norm_stats(folder, asset_id)
        described.meta["asset_id"] = layouts.asset_name(folder, file)
    if not (tokenizer or described.tokenizer):
        raise CheckpointError(
            f"{folder} holds no tokenizer; pass tokenizer=, a path to PaliGemma's tokenizer.model or tokenizer.json"
        )
    found = layouts.find_tokenizer(Path(tokenizer)) if tokenizer else inside(folder, described.tokenizer, folder / "config.json")
    model, config_class = TYPES[kind]
    try:
        config = config_class.from_dict({**described.config, **options})
        layouts.check_sizes(config, weights)
        if norm_stats == "identity":
            described.state, described.actions = NormStats.identity(config.state_dim), NormStats.identity(config.action_dim)
        elif file is not None:
            described.state, described.actions = layouts.read_norm_stats(file, config, described.notes)
        processor = Processor(config, Tokenizer(found), described.state, described.actions, device, **described.processor)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if "horizon" in options and "execute" in described.meta:  # a shorter chunk than the checkpoint's
        described.meta["execute"] = min(described.meta["execute"], config.horizon)
    for name, stats in (("state", described.state), ("action", described.actions)):
        if constant := [str(i) for i in stats.constant(config.normalization).nonzero()[0]]:
            described.notes.append(f"{name} dimensions {listing(constant)} never varied in its data: they are not scaled")
    if described.notes:
        warnings.warn(f"{folder}: {'; '.join(described.notes)}", stacklevel=2)
    with torch.device("meta"):
        policy = model(config).cast(dtype, trained)
    policy.processor, policy.meta = processor, described.meta
    load_weights(policy, weights, device)
    if config.num_cameras:  # the one buffer that no checkpoint holds
        embeddings = policy.vision_embeddings()
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return policy.to(device).eval()


def find(path_or_name: str | Path) -> Path:
    """Checkpoint folder of a path, of a bundled name, or of a hub id, which is downloaded unless cached."""
    name = str(Path(path_or_name))
    folder = BUNDLED / name if name in bundled() and not os.path.isdir(name) else Path(name)
    if os.path.isdir(folder):
        if not any(os.path.lexists(folder / file) for file in ("model.safetensors", "model.safetensors.index.json")):
            for inside in TRAININGS:  # a training's folder, ours or lerobot's: say where its policy is
                if policies := sorted(folder.glob(f"{inside}/config.json")):
                    raise CheckpointError(f"{folder} is a training's folder; its policy is {policies[-1].parent}")
        return folder
    if not os.path.lexists(folder) and layouts.is_hub_id(name):
        return layouts.fetch(name)
    kind = "is a file" if os.path.lexists(folder) else "is neither a folder nor a bundled name"
    if not os.path.lexists(folder) and os.path.isdir(folder.parent) and folder.parent != Path():
        kind += f" ({folder.parent} holds {listing(sorted(os.listdir(folder.parent))) or 'nothing'})"
    raise CheckpointError(
        f"checkpoint {name!r} {kind}; give a checkpoint's folder, a hub id org/name, or one of: {', '.join(bundled()) or 'none'}"
    )


class Policy(Declared):
    """What the programs read of a policy's `meta`, if it is there."""

    env_id: str = ""
    obs_mode: Literal["rgb", "state"] = "rgb"
    execute: Count = 1
    num_steps: Count = 1
    env_options: Annotated[list[str], Field(fail_fast=True)] = []
    cameras: Annotated[list[str], Field(fail_fast=True)] = []


class Prepared(layouts.Options):
    """How our config.json describes the processor."""

    tokenizer: str
    state: layouts.Statistics
    actions: layouts.Statistics


class Own(Declared):
    """config.json of `save`."""

    type: Literal["pi0", "pi05"]
    model: dict
    processor: Prepared
    meta: Policy = Policy()


def describe(folder: Path, weights: Weights, options: dict, needs_statistics: bool) -> layouts.Description:
    """Everything but the weights of a folder, whose layout is recognised: ours, lerobot's or openpi's.

    options: fields of the configuration that are given, for what shapes alone do not tell. Raises CheckpointError if the
    folder is damaged or contradicts itself.
    """
    file = folder / "config.json"
    content = read_json(file) if os.path.lexists(file) else {}
    if "format_version" in content:
        return own(file, content)
    kind = layouts.policy_type(weights)
    is_lerobot = "type" in content or "input_features" in content
    if is_lerobot:
        found = lerobot.describe(folder, weights, content, kind, needs_statistics)
    else:
        found = layouts.openpi(content, kind, file)
    found.tokenizer = layouts.beside(folder)
    if is_lerobot and os.path.lexists(ours := folder / lerobot.OURS):
        return exported(found, own(ours, read_json(ours)))
    head_dim = {**found.config, **options}.get("head_dim", Pi0Config.head_dim)
    sizes = layouts.sizes(weights, declared(Count, head_dim, f"{folder}: head_dim"))
    if "action_dim" in sizes:
        sizes.setdefault("state_dim", sizes["action_dim"])  # π0.5 has no projection of the state
    found.config = {**sizes, **found.config}
    return found


def exported(found: layouts.Description, ours: layouts.Description) -> layouts.Description:
    """What lerobot's files say, and our own description beside them where those cannot tell: sizes that shapes hide, statistics
    to the last digit, what the policy was trained on."""
    found.config = {**ours.config, **found.config}
    found.state, found.actions, found.tokenizer = ours.state, ours.actions, ours.tokenizer
    found.meta = ours.meta | {name: value for name, value in found.meta.items() if name != "layout"}
    if "num_steps" in found.meta:
        found.meta["num_steps"] = found.config["num_steps"]
    return found


def own(file: Path, content: dict) -> layouts.Description:
    """A file as `save` writes it. Raises CheckpointError on another version or type, or missing entries."""
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format_version {short(content.get('format_version'))}; expected {FORMAT_VERSION}")
    c = declared(Own, content, file)
    try:
        json.dumps(content.get("meta", {}), allow_nan=False)
    except ValueError:  # which would only be found when a trained policy is saved
        raise CheckpointError(f"{file}: meta holds NaN or infinity; put null there") from None
    state, actions = (
        layouts.norm_stats(getattr(c.processor, name), c.type, f"{file}: {name}") for name in ("state", "actions")
    )
    processor = c.processor.model_dump(include=set(layouts.Options.model_fields))
    return layouts.Description(c.type, c.model, state, actions, c.processor.tokenizer, processor, content.get("meta", {}))
