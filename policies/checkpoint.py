"""Checkpoints: a folder with `model.safetensors`, `config.json` and `tokenizer.model`.

Tensors carry the names of openpi's published π0, so one layout serves every size. Nothing is pickled. Loading either
returns a policy whose every weight came from the file, or raises CheckpointError with one line that names what is
wrong.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from policies.pi0 import Pi0, Pi0Config
from policies.pi05 import Pi05, Pi05Config
from policies.processor import NormStats, Processor, Tokenizer

FORMAT_VERSION = 1
TYPES = {"pi0": (Pi0, Pi0Config), "pi05": (Pi05, Pi05Config)}
BUNDLED = Path(__file__).parent / "checkpoints"
# A tokenizer up to this size is copied into the checkpoint; a larger one (PaliGemma's has 4 MB) is referenced by its
# path.
TOKENIZER_COPY_LIMIT = 1 << 20
SAVE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Module path in Pi0 -> published name; the first match counts. The vision tower's own level names differ between
# transformers releases, so `vision_model.` is dropped where present before the published prefix is set.
PUBLISHED_NAMES = (
    ("vision_tower.vision_model.", "paligemma_with_expert.paligemma.model.vision_tower.vision_model."),
    ("vision_tower.", "paligemma_with_expert.paligemma.model.vision_tower.vision_model."),
    ("multi_modal_projector.", "paligemma_with_expert.paligemma.model.multi_modal_projector."),
    ("language_model.embed_tokens.", "paligemma_with_expert.paligemma.lm_head."),
    ("language_model.", "paligemma_with_expert.paligemma.model.language_model."),
    ("expert.", "paligemma_with_expert.gemma_expert.model."),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or saved; the message says what was given, expected, and what to do."""


def published_name(name: str) -> str:
    """Published tensor name of one of Pi0's parameters."""
    for own, published in PUBLISHED_NAMES:
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name


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
    if dtype is not None and dtype not in SAVE_DTYPES:
        raise CheckpointError(
            f"dtype is {dtype!r}; expected one of {', '.join(SAVE_DTYPES)}, or None to keep the weights' own"
        )
    tensors = {}
    for name, tensor in policy.state_dict().items():
        tensor = tensor.detach().cpu()
        tensor = tensor.to(SAVE_DTYPES[dtype]) if dtype else tensor
        tensors[published_name(name)] = tensor.contiguous()
    if broken := not_finite(tensors):
        raise CheckpointError(
            f"not saved to {folder}: NaN or infinite values in {listing(broken)}; the training diverged"
        )

    processor = policy.processor
    copy_tokenizer = len(processor.tokenizer.serialized) <= TOKENIZER_COPY_LIMIT
    config = {
        "format_version": FORMAT_VERSION,
        "type": policy.config.type,
        "model": policy.config.to_dict(),
        "processor": {
            "tokenizer": "tokenizer.model" if copy_tokenizer else str(processor.tokenizer.path.resolve()),
            "state": processor.state_stats.to_dict(),
            "actions": processor.action_stats.to_dict(),
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
    if copy_tokenizer:
        writers["tokenizer.model"] = lambda path: path.write_bytes(processor.tokenizer.serialized)
    writers["model.safetensors"] = lambda path: save_file(tensors, path)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        for name in writers:
            os.replace(temporary[name], folder / name)
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
) -> Pi0:
    """Read a policy in eval mode, with `policy.processor` and `policy.meta`.

    path_or_name: a checkpoint folder, or the name of one that ships with the project; dtype: precision of the
    transformers (see Pi0.cast); tokenizer: a sentencepiece file to use instead of the one the checkpoint names.
    Raises CheckpointError if anything is missing, unreadable, unexpected, mis-shaped or not finite.
    """
    folder = find(path_or_name)
    config = read_config(folder)
    try:
        model, sizes = TYPES[config["type"]]
        policy = model(sizes.from_dict(config["model"]))
        stated = config["processor"]
        policy.processor = Processor(
            policy.config,
            Tokenizer(tokenizer or folder / stated["tokenizer"]),
            NormStats(**stated["state"]),
            NormStats(**stated["actions"]),
            device,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{folder}/config.json lacks the entry {error}; restore the file or save the policy again"
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None
    policy.meta = config.get("meta", {})
    load_weights(policy, folder / "model.safetensors")
    return policy.cast(dtype).to(device).eval()


def find(path_or_name: str | Path) -> Path:
    """Checkpoint folder of a path or of a bundled name."""
    for folder in (Path(path_or_name), BUNDLED / path_or_name):
        if folder.is_dir():
            for file in ("config.json", "model.safetensors"):
                if not (folder / file).is_file():
                    raise CheckpointError(f"{folder} holds no {file}; expected a folder written by policies.save")
            return folder
    kind = "is a file" if Path(path_or_name).exists() else "is neither a folder nor a bundled name"
    raise CheckpointError(
        f"checkpoint {str(path_or_name)!r} {kind}; "
        f"give a folder written by policies.save, or one of: {', '.join(bundled()) or 'none'}"
    )


def read_config(folder: Path) -> dict:
    """config.json of a checkpoint folder, checked for format version and policy type."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/config.json is not readable JSON ({error}); restore it or save the policy again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder}/config.json holds a {type(config).__name__}; expected an object written by policies.save"
        )
    if config.get("format_version") != FORMAT_VERSION or config.get("type") not in TYPES:
        raise CheckpointError(
            f"{folder}/config.json has format_version {config.get('format_version')!r} and "
            f"type {config.get('type')!r}; expected {FORMAT_VERSION} and one of {', '.join(TYPES)}"
        )
    return config


def load_weights(policy: Pi0, file: Path) -> None:
    """Copy every weight of a safetensors file into the policy, or raise CheckpointError that names each difference."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); copy or save it again") from None
    names = {own: published_name(own) for own in policy.state_dict()}
    expected = {names[own]: tuple(tensor.shape) for own, tensor in policy.state_dict().items()}
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} unexpected: {listing(unexpected)}")
    shapes = {name: tuple(tensors[name].shape) for name in expected.keys() & tensors.keys()}
    if wrong := sorted(name for name, shape in shapes.items() if shape != expected[name]):
        described = [f"{name} {shapes[name]} instead of {expected[name]}" for name in wrong]
        problems.append(f"{len(wrong)} mis-shaped: {listing(described)}")
    if problems:
        raise CheckpointError(
            f"{file} does not fit config.json: {'; '.join(problems)}; use the config.json saved with it"
        )
    if broken := not_finite(tensors):
        raise CheckpointError(
            f"{file} has NaN or infinite values in {listing(broken)}; the training diverged, use an earlier one"
        )
    policy.load_state_dict({own: tensors[published] for own, published in names.items()})


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return sorted(
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    )


def listing(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# -------------------------------------------------------------------- progress of a training run


def save_training(folder: str | Path, optimizer: torch.optim.Optimizer, rng: np.random.Generator, progress: dict) -> None:
    """Write what a run needs to go on, besides its policies: `training.safetensors` and `training.json`.

    Holds the optimizer's tensors, torch's and Python's and `rng`'s states, and `progress`, a dictionary of plain JSON values.
    Both files are written beside their targets first and then renamed. Raises CheckpointError if that fails.
    """
    folder = Path(folder)
    tensors = {"torch_rng": torch.get_rng_state()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps({"numpy_rng": rng.bit_generator.state, "progress": progress}, indent=2)
    temporary = folder / ".training.safetensors.tmp", folder / ".training.json.tmp"
    try:
        save_file(tensors, temporary[0])
        temporary[1].write_text(text)
        os.replace(temporary[0], folder / "training.safetensors")
        os.replace(temporary[1], folder / "training.json")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"training state not saved to {folder}: {error}; an older one there is unchanged") from None


def load_training(folder: str | Path, optimizer: torch.optim.Optimizer, rng: np.random.Generator) -> dict:
    """Restore what `save_training` wrote into `optimizer`, `rng` and torch's generator; returns `progress`.

    Raises CheckpointError if a file is missing or does not fit the optimizer.
    """
    folder = Path(folder)
    stored = read_json(folder / "training.json")
    try:
        tensors = load_file(folder / "training.safetensors")
        torch.set_rng_state(tensors.pop("torch_rng"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        rng.bit_generator.state = stored["numpy_rng"]
        return stored["progress"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no training state to go on with: {error}") from None


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises CheckpointError if the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
