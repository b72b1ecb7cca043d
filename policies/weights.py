"""Files of a checkpoint: tensors under their published names, how they get into a policy, and JSON that is what it should be.

Published names are those of openpi's PyTorch files; every other layout is translated to them. Files are memory-mapped and
read one tensor at a time, each cast on the way, so that loading needs little more memory than the policy itself. Nothing is
ever unpickled, and nothing is opened but regular files of the folder.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

JSON_BYTES, JSON_NAMES, MESSAGE = 2 << 20, 10_000, 20_000
"""limits: bytes of a JSON file and names in one of its objects (an index of π0 has 0.1 MB and 800), characters of an error"""
FLOATS = ("F64", "F32", "F16", "BF16")
"""types of stored weights; integers and 8-bit floats need a scale, which no known layout has"""

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
    """A checkpoint that cannot be loaded or saved; the message, one line, says what was given, expected, and what to do."""

    def __init__(self, message: object):
        line = " ".join(str(message).splitlines())  # names and values that it quotes may be of any kind and length
        super().__init__(line if len(line) <= MESSAGE else f"{line[:MESSAGE]} …")


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
        """Raises CheckpointError if a file is no complete safetensors file or holds quantised, doubled or LoRA weights."""
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.extras: dict[str, Path] = {}
        self._stored: dict[str, tuple[Path, str]] = {}
        for path in files:
            try:
                with safe_open(regular(path), "pt") as file:
                    for stored in file.keys():
                        described = file.get_slice(stored)
                        self._add(path, stored, tuple(described.get_shape()), described.get_dtype())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} is not a complete safetensors file ({error}); copy, download or save it again"
                ) from None

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def _add(self, path: Path, stored: str, shape: tuple[int, ...], dtype: str) -> None:
        if "lora_" in stored.lower():
            raise CheckpointError(
                f"{path} holds LoRA factors such as {stored}; merge them into their base weights, then load the result"
            )
        name = canonical_name(stored)
        if name is None:
            self.extras[stored] = path
        elif dtype not in FLOATS:
            raise CheckpointError(f"{path} holds {stored} as {dtype}; expected one of {', '.join(FLOATS)}: save it unquantised")
        elif name in self.shapes and name != EMBEDDING:
            raise CheckpointError(f"{path} holds {stored}, which is in {self._stored[name][0]} as {self._stored[name][1]} already")
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


def read_vector(file: Path, stored: str) -> np.ndarray:
    """Statistics in a safetensors file by their stored name, float64 (D,). Raises CheckpointError for another shape."""
    with safe_open(file, "pt") as tensors:
        shape = tensors.get_slice(stored).get_shape()
        if len(shape) != 1 or shape[0] > JSON_NAMES:
            raise CheckpointError(f"{file}: {stored} has shape {tuple(shape)}; expected one dimension of at most {JSON_NAMES:,}")
        return tensors.get_tensor(stored).double().numpy()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or the shards its index names.

    Raises CheckpointError if there is none, with a word on what is there instead.
    """
    if os.path.lexists(folder / "model.safetensors"):
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        shards = sorted(set(read(Index, index).weight_map.values()))
        if missing := [name for name in shards if not os.path.lexists(folder / name)]:
            raise CheckpointError(f"{index} names {listing(missing)}, which {folder} lacks; copy or download the rest")
        if shards:
            return [inside(folder, name, index) for name in shards]
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
    tensors = {name: divided(tensor, own[name]) for name, tensor in tensors.items()}
    policy.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in own.values()))


# -------------------------------------------------------------------- tensors that lie in parts on several processes (FSDP2)


def is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; all processes have to ask for it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, divided as another one is, if it is of that shape."""
    if not is_divided(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{','.join(sorted(numbers, key=by_number))}}}")
        for pattern, numbers in layers.items()
    )


def by_number(text: str) -> tuple[int, str]:
    """Sorts 2 before 10; what is no number comes last, in any order."""
    return (int(text) if text.isdecimal() and len(text) < 10 else 1 << 31), text


# -------------------------------------------------------------------- files and JSON


def regular(path: str | Path, limit: int | None = None, what: str = "") -> Path:
    """The path, if a regular file is there, which can be read to its end: no folder, pipe or device, which may have none.

    Links are followed wherever they lead: the hub's cache is made of them. limit: bytes that such a file has at most; what:
    a word for the message. Raises CheckpointError otherwise.
    """
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file" if os.path.lexists(path) else "not there"
        raise CheckpointError(f"{what}{path} cannot be read: it is {kind}; expected a file")
    if limit is not None and (size := os.path.getsize(path)) > limit:
        raise CheckpointError(f"{what}{path} cannot be read: it has {size:,} bytes; expected at most {limit:,}")
    return Path(path)


def inside(folder: Path, name: str, where: object) -> Path:
    """The file of `folder` that `name` in the file `where` means. Raises CheckpointError if it leads out of the folder."""
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{where} names {name!r}, outside its folder; copy that file into the folder and name it there")
    return regular(folder / name)


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises CheckpointError if the file is missing, broken, too large or holds something else."""
    try:
        content = json.loads(regular(path, JSON_BYTES).read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deep; restore or save it again") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); restore or save it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object of which nothing is lost: json keeps the last of several entries of one name."""
    if len(pairs) > JSON_NAMES:
        raise ValueError(f"an object has {len(pairs):,} names; expected at most {JSON_NAMES:,}")
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{short(name)} is there twice")
        entries[name] = value
    return entries


Count = Annotated[int, Field(ge=1, le=1 << 20)]
"""a size in JSON"""
Vector = Annotated[list[float], Field(fail_fast=True)]
"""numbers in JSON; of a million strings the first is told"""
EXPECTED = dict(
    bool_type="true or false", int_type="an integer", float_type="a number", string_type="text", list_type="a list",
    dict_type="an object", model_type="an object", greater_than_equal="at least {ge:.10g}", less_than_equal="at most {le:.10g}",
)
"""what pydantic's errors say, in our words"""
T = TypeVar("T")


class Declared(BaseModel):
    """Entries of a JSON object by type, to be subclassed. Nothing is converted; `model_extra` has what is not declared."""

    model_config = ConfigDict(strict=True, extra="allow")


class Index(Declared):
    """model.safetensors.index.json"""

    weight_map: dict[str, str]


def read(declaration: type[T], path: Path) -> T:
    """A JSON file as `declaration` says. Raises CheckpointError, which names the file and the entry."""
    return declared(declaration, read_json(path), path)


def declared(declaration: type[T], content: object, where: object) -> T:
    """Content of the JSON file `where` as `declaration` says. Raises CheckpointError, which names the file and the entry."""
    try:
        return TypeAdapter(declaration).validate_python(content)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {problem(error)}") from None


def problem(error: ValidationError) -> str:
    """The first thing that does not agree with a declaration: the entry, what it is, and what was expected."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"lacks the entry {name}"
    if first["type"] == "value_error":  # of our own checks, in words already
        return str(first["ctx"]["error"])
    ours = EXPECTED.get(first["type"])
    expected = ours.format(**first.get("ctx", {})) if ours else first["msg"].removeprefix("Input should be ")
    return f"{name or 'it'} is {short(first['input'])}; expected {expected}"


def short(value: object) -> str:
    """A value of JSON as a message quotes it."""
    nested = isinstance(value, list) and (len(value) > 8 or any(isinstance(item, list | dict) for item in value))
    text = "a list" if nested else "an object" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
