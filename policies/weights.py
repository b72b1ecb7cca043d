"""Tensors of a checkpoint: their published names, where they lie on disk, and how they get into a policy.

Published names are those of openpi's PyTorch files; every other layout is translated to them. Files are memory-mapped and
read one tensor at a time, each cast on the way, so that loading needs little more memory than the policy itself. Nothing is
ever unpickled.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."
EMBEDDING = f"{PALIGEMMA}lm_head.weight"  # the token embedding; published files hold it as the head it is tied to

# Module path in a policy -> published name; the first match counts. The vision tower's own level names differ between
# transformers releases, so `vision_model.` is dropped where present before the published prefix is set.
PUBLISHED_NAMES = (
    ("vision_tower.vision_model.", f"{PALIGEMMA}model.vision_tower.vision_model."),
    ("vision_tower.", f"{PALIGEMMA}model.vision_tower.vision_model."),
    ("multi_modal_projector.", f"{PALIGEMMA}model.multi_modal_projector."),
    ("language_model.embed_tokens.", f"{PALIGEMMA}lm_head."),
    ("language_model.", f"{PALIGEMMA}model.language_model."),
    ("expert.", f"{EXPERT}model."),
)
# What other projects keep beside a policy's weights: statistics (older lerobot), critics and noise networks of RL runs,
# buffers that follow from the configuration.
STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
NOT_WEIGHTS = (*STATISTICS, "value_head.", "noise_head.")
BUFFERS = (".position_ids", ".inv_freq")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or saved; the message says what was given, expected, and what to do."""


def published_name(name: str) -> str:
    """Published tensor name of one of a policy's parameters."""
    for own, published in PUBLISHED_NAMES:
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name


def canonical_name(stored: str) -> str | None:
    """Published name of a tensor as any known layout stores it, or None for what a policy has no use for.

    Layouts differ by a leading `model.` (lerobot), by absent `model.` or `vision_model.` levels and a `language_model.model.`
    level (older transformers), and by holding the token embedding under its own name, as the tied head, or both.
    """
    name = stored.removeprefix("model.")
    if name.startswith(NOT_WEIGHTS) or name.endswith(BUFFERS):
        return None
    if name.startswith(EXPERT):
        rest = name.removeprefix(EXPERT).removeprefix("model.")
        return None if rest in ("lm_head.weight", "embed_tokens.weight") else f"{EXPERT}model.{rest}"
    if name.startswith(PALIGEMMA):
        rest = name.removeprefix(PALIGEMMA).removeprefix("model.").replace("language_model.model.", "language_model.", 1)
        if rest in ("lm_head.weight", "language_model.lm_head.weight", "language_model.embed_tokens.weight"):
            return EMBEDDING
        if rest.startswith("vision_tower."):
            rest = "vision_tower.vision_model." + rest.removeprefix("vision_tower.").removeprefix("vision_model.")
        return f"{PALIGEMMA}model.{rest}"
    return name


class Weights:
    """The tensors in some safetensors files under their published names, read only when asked for.

    `shapes` maps published names to shapes, `extras` the stored names of what is no weight to their files.
    """

    def __init__(self, files: list[Path]):
        """Raises CheckpointError if a file is no complete safetensors file or holds LoRA factors."""
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.extras: dict[str, Path] = {}
        self._stored: dict[str, tuple[Path, str]] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    for stored in file.keys():
                        self._add(path, stored, tuple(file.get_slice(stored).get_shape()))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} is not a complete safetensors file ({error}); copy, download or save it again"
                ) from None

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def _add(self, path: Path, stored: str, shape: tuple[int, ...]) -> None:
        if "lora_" in stored.lower():
            raise CheckpointError(
                f"{path} holds LoRA factors such as {stored}; merge them into their base weights, then load the result"
            )
        name = canonical_name(stored)
        if name is None:
            self.extras[stored] = path
        elif name != EMBEDDING or name not in self.shapes or stored.endswith("embed_tokens.weight"):
            self.shapes[name] = shape  # an explicit embedding wins over the head, whichever comes first
            self._stored[name] = path, stored

    def read(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """A copy of one tensor by its published name.

        The file is opened for this tensor alone: pages of a mapping count as memory in use for as long as it is open.
        """
        path, stored = self._stored[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(stored).to(device=device, dtype=dtype, copy=True)

    def read_extra(self, stored: str) -> Tensor:
        """One of the `extras` by its stored name."""
        with safe_open(self.extras[stored], "pt") as file:
            return file.get_tensor(stored)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or the shards its index names.

    Raises CheckpointError if there is none, with a word on what is there instead.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [name for name in shards if Path(name).name != name or not (folder / name).is_file()]:
            raise CheckpointError(f"{index} names {listing(missing)}, which {folder} lacks; copy or download the rest")
        if shards:
            return [folder / name for name in shards]
    present = {path.name for path in folder.iterdir()}
    pickles = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if present & {"adapter_model.safetensors", "adapter_config.json"}:
        found = "a LoRA adapter without its base weights; merge it into them and load the result"
    elif pickles:
        found = f"{listing(pickles)}, a pickle, which can run code and is never read; save the weights as safetensors"
    elif "params" in present:
        found = "JAX parameters; convert them with openpi's examples/convert_jax_model_to_pytorch.py"
    else:
        found = f"{listing(sorted(present)) or 'nothing'}; give a folder with safetensors weights"
    raise CheckpointError(f"{folder} holds no model.safetensors but {found}")


def load_weights(policy: nn.Module, source: Weights | Path, device: torch.device | str = "cpu") -> None:
    """Fill the policy with every tensor of `source`, each in the dtype of the parameter it becomes.

    A policy on the meta device takes the tensors as its own, on `device`; another is overwritten in place. Raises
    CheckpointError that names every missing, unexpected, mis-shaped or not finite tensor; the policy is then unchanged.
    """
    weights = source if isinstance(source, Weights) else Weights([Path(source)])
    own = policy.state_dict()
    names = {name: published_name(name) for name in own}
    expected = {names[name]: tuple(tensor.shape) for name, tensor in own.items()}
    given = weights.shapes
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"{len(missing)} missing: {tensor_listing(missing)}")
    if unexpected := sorted(given.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} unexpected: {tensor_listing(unexpected)}")
    if wrong := sorted(name for name in expected.keys() & given.keys() if given[name] != expected[name]):
        described = [f"{name} {given[name]} instead of {expected[name]}" for name in wrong]
        problems.append(f"{len(wrong)} mis-shaped: {tensor_listing(described)}")
    if problems:
        kind = policy.config.type
        raise CheckpointError(
            f"{weights} does not fit the {kind} configuration: {'; '.join(problems)}; use the config.json saved with it"
        )

    tensors, broken = {}, []
    for name, target in own.items():
        place = device if target.is_meta else target.device
        tensors[name] = weights.read(names[name], place, target.dtype)
        if not is_finite(tensors[name]):
            broken.append(names[name])
    if broken:
        raise CheckpointError(
            f"{weights} has NaN or infinite values in {listing(sorted(broken))}; the training diverged, use an earlier one"
        )
    policy.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in own.values()))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return not tensor.is_floating_point() or tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def listing(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def tensor_listing(names: list[str]) -> str:
    """Every tensor name; the layers of a stack that lack or have the same one share an entry: layers.{0,1,2}.mlp.up_proj."""
    layers: dict[str, list[str]] = {}
    for name in names:
        head, separator, tail = name.partition(".layers.")
        number, _, rest = tail.partition(".")
        layers.setdefault(f"{head}.layers.{{}}.{rest}" if separator else name, []).append(number)
    return ", ".join(
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{','.join(sorted(numbers, key=int))}}}")
        for pattern, numbers in layers.items()
    )


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises CheckpointError if the file is missing, broken or holds something else."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); restore or save it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content
