"""Checkpoints: a folder with `model.safetensors`, `config.json` and `tokenizer.model`.

Tensors carry the names of openpi's published π0 and π0.5, so one layout serves every size. Nothing is pickled. Loading
takes this format and those of other projects (see policies.layouts), and either returns a policy whose every weight came
from the files, or raises CheckpointError with one line that names what is wrong.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pi_stepnft.policies import layouts, lora
from pi_stepnft.policies.pi0 import Pi0, Pi0Config
from pi_stepnft.policies.pi05 import Pi05, Pi05Config
from pi_stepnft.policies.processor import NormStats, Processor, Tokenizer
from pi_stepnft.policies.weights import (
    CheckpointError,
    Weights,
    is_finite,
    listing,
    load_weights,
    published_name,
    read_json,
    weight_files,
)

FORMAT_VERSION = 1
TYPES = {"pi0": (Pi0, Pi0Config), "pi05": (Pi05, Pi05Config)}
BUNDLED = Path(__file__).parent / "checkpoints"
# A tokenizer up to this size is copied into the checkpoint; a larger one (PaliGemma's has 4 MB) is referenced by its
# path.
TOKENIZER_COPY_LIMIT = 1 << 20
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
    processor = policy.processor
    tokenizer = processor.tokenizer
    copied = f"tokenizer{tokenizer.path.suffix}" if len(tokenizer.serialized) <= TOKENIZER_COPY_LIMIT else None
    config = {
        "format_version": FORMAT_VERSION,
        "type": policy.config.type,
        "model": policy.config.to_dict(),
        "processor": {
            "tokenizer": copied or str(tokenizer.path.resolve()),
            "state": processor.state_stats.to_dict(),
            "actions": processor.action_stats.to_dict(),
            **processor.options(),
        },
        "meta": policy.meta,
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"not saved to {folder}: policy.meta must be plain finite JSON values ({error})"
        ) from None

    writers = {"config.json": lambda path: path.write_text(text)}
    if copied:
        writers[copied] = lambda path: path.write_bytes(tokenizer.serialized)
    writers["model.safetensors"] = lambda path: save_file(tensors, path)
    write_files(folder, writers)


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
            path.unlink(missing_ok=True)


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
    folder = find(path_or_name)
    weights = Weights(weight_files(folder))
    file = folder / "config.json"
    if file.is_file() and "format_version" in read_json(file):
        described = read_config(folder)
    else:
        head_dim = options.get("head_dim", Pi0Config.head_dim)
        described = layouts.describe(folder, weights, asset_id, head_dim, needs_statistics=norm_stats is None)
    kind = described.type
    if expect not in (None, kind):
        raise CheckpointError(f"{folder} holds a {kind} policy; expected {expect}: use what is made for {kind}, or other weights")
    if relative is not None:
        described.processor["relative"] = relative
    found = layouts.find_tokenizer(Path(tokenizer)) if tokenizer else described.tokenizer
    if found is None:
        raise CheckpointError(
            f"{folder} holds no tokenizer; pass tokenizer=, a path to PaliGemma's tokenizer.model or tokenizer.json"
        )
    try:
        model, config_class = TYPES[kind]
        config = config_class.from_dict({**described.config, **options})
        if norm_stats == "identity":
            described.state, described.actions = NormStats.identity(config.state_dim), NormStats.identity(config.action_dim)
        elif norm_stats is not None:
            described.state, described.actions = layouts.read_norm_stats(norm_stats, kind)
        processor = Processor(
            config, Tokenizer(found), described.state, described.actions, device, **described.processor
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
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
    for folder in (Path(path_or_name), BUNDLED / path_or_name):
        if folder.is_dir():
            if not any(folder.glob("*.safetensors")):  # a training's folder, ours or lerobot's: say where its policy is
                for inside in ("policy", "pretrained_model", "checkpoints/last/pretrained_model"):
                    if (folder / inside / "config.json").is_file():
                        raise CheckpointError(f"{folder} is a training's folder; its policy is {folder / inside}")
            return folder
    if not Path(path_or_name).exists() and layouts.is_hub_id(str(path_or_name)):
        return layouts.fetch(str(path_or_name))
    kind = "is a file" if Path(path_or_name).exists() else "is neither a folder nor a bundled name"
    raise CheckpointError(
        f"checkpoint {str(path_or_name)!r} {kind}; "
        f"give a checkpoint's folder, a hub id org/name, or one of: {', '.join(bundled()) or 'none'}"
    )


def read_config(folder: Path) -> layouts.Description:
    """config.json of a folder written by `save`. Raises CheckpointError on another version or type, or missing entries."""
    config = read_json(folder / "config.json")
    if config.get("format_version") != FORMAT_VERSION or config.get("type") not in TYPES:
        raise CheckpointError(
            f"{folder}/config.json has format_version {config.get('format_version')!r} and "
            f"type {config.get('type')!r}; expected {FORMAT_VERSION} and one of {', '.join(TYPES)}"
        )
    try:
        processor = dict(config["processor"])
        state, actions = NormStats(**processor.pop("state")), NormStats(**processor.pop("actions"))
        tokenizer = folder / processor.pop("tokenizer")
        return layouts.Description(
            config["type"], config["model"], state, actions, tokenizer, processor, config.get("meta", {})
        )
    except KeyError as error:
        raise CheckpointError(
            f"{folder}/config.json lacks the entry {error}; restore the file or save the policy again"
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None
