"""Write a policy in the layout of openpi (PyTorch) or of lerobot, so that they, or what reads their files, can serve it.

    policies.export(policy, "served", asset_id="physical-intelligence/libero")
    # openpi: python scripts/serve_policy.py policy:checkpoint --policy.config=pi05_libero --policy.dir=served

    policies.export(policy, "for_lerobot", layout="lerobot")
    # lerobot: PI05Policy.from_pretrained("for_lerobot"), make_pre_post_processors(policy.config, "for_lerobot")
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, normalizers, processors

from pi_stepnft.policies import card, checkpoint, lerobot
from pi_stepnft.policies.pi0 import Pi0, Pi0Config
from pi_stepnft.policies.processor import CONSTANT, NormStats, Tokenizer
from pi_stepnft.policies.weights import EXPERT, CheckpointError

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""what openpi calls the pictures"""
PALIGEMMA_NAME, PALIGEMMA_PIECES = "google/paligemma-3b-pt-224", 256_000
"""the tokenizer that lerobot's pipelines name, and fewer pieces than it has"""
Writers = dict[str, Callable[[Path], object]]


def export(
    policy: Pi0,
    folder: str | Path,
    asset_id: str | None = None,
    dtype: str | None = None,
    *,
    layout: str = "openpi",
    cameras: Sequence[str] | None = None,
    tokenizer_name: str | None = None,
) -> None:
    """Write a policy's weights, configuration, statistics, tokenizer and card to a folder, created if needed.

    layout: "openpi" or "lerobot" (release 0.6.1); `policies.load` reads both back to the same policy.
    dtype: "float32", "float16", "bfloat16" (as published), or None for the weights' own.
    asset_id: of openpi, where its training configuration that is to serve the policy looks for the statistics, for example
    "physical-intelligence/libero".
    cameras: of lerobot, the names that pictures have in its observations, in the policy's order; default: those that the policy
    came with, or openpi's.
    tokenizer_name: of lerobot, what its pipeline loads the tokenizer by, a hub id or a folder; default: PaliGemma's hub id if the
    policy has PaliGemma's tokenizer, else this folder, by its absolute path.
    The expert's unused `lm_head`, which both insist on, is written as zeros.
    Raises CheckpointError if a weight is not finite, if the policy has no processor, if an argument does not fit, if lerobot's
    code cannot do what the policy does, or if the folder cannot be written.
    """
    folder = Path(folder)
    if policy.processor is None:
        raise CheckpointError(f"not saved to {folder}: the policy has no processor, hence no statistics; set policy.processor")
    if layout == "openpi":
        writers = openpi(policy, asset_id, dtype)
    elif layout == "lerobot":
        writers = to_lerobot(policy, folder, dtype, cameras, tokenizer_name)
    else:
        raise CheckpointError(f"layout is {layout!r}; expected 'openpi' or 'lerobot'")
    tensors = checkpoint.published_tensors(policy, dtype, folder)
    head = torch.zeros(policy.config.vocab_size, policy.config.expert_width, dtype=expert_dtype(policy, dtype))
    tensors[f"{EXPERT}lm_head.weight"] = head
    if layout == "lerobot":
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tokenizer = policy.processor.tokenizer
    writers.setdefault(checkpoint.tokenizer_file(tokenizer), lambda path: path.write_bytes(tokenizer.serialized))
    writers |= card.writer(policy, folder)
    writers["model.safetensors"] = lambda path: save_file(tensors, path, metadata={"format": "pt"})
    checkpoint.write_files(folder, writers)


def expert_dtype(policy: Pi0, dtype: str | None) -> torch.dtype:
    """The type in which the expert's layers are written."""
    return checkpoint.SAVE_DTYPES[dtype] if dtype in checkpoint.SAVE_DTYPES else policy.expert.layers[0].mlp.up_proj.weight.dtype


def text(content: Any) -> Callable[[Path], object]:
    """A writer of JSON."""
    return lambda path: path.write_text(json.dumps(content, indent=2) + "\n")


# -------------------------------------------------------------------- openpi


def openpi(policy: Pi0, asset_id: str | None, dtype: str | None) -> Writers:
    """`config.json`, with openpi's entries and ours beside them, and `assets/<asset_id>/norm_stats.json`."""
    asset = PurePosixPath(asset_id or "")
    if asset.is_absolute() or ".." in asset.parts or not asset.parts:
        raise CheckpointError(f"asset_id is {asset_id!r}; expected a name such as physical-intelligence/libero")
    c, processor = policy.config, policy.processor
    published = Pi0Config()
    config = {
        "action_dim": c.action_dim,
        "action_horizon": c.horizon,
        "paligemma_variant": "gemma_2b" if c.vlm_width == published.vlm_width else "custom",
        "action_expert_variant": "gemma_300m" if c.expert_width == published.expert_width else "custom",
        "precision": str(expert_dtype(policy, dtype)).removeprefix("torch."),
        "model": c.to_dict(),
        "processor": processor.options(),
    }
    stats = {"norm_stats": {"state": processor.state_stats.to_dict(), "actions": processor.action_stats.to_dict()}}
    return {"config.json": text(config), f"assets/{asset}/norm_stats.json": text(stats)}


# -------------------------------------------------------------------- lerobot


def to_lerobot(policy: Pi0, folder: Path, dtype: str | None, cameras: Sequence[str] | None, tokenizer_name: str | None) -> Writers:
    """`config.json`, both pipelines with their statistics, the tokenizer as transformers reads it, and our own description."""
    c, processor = policy.config, policy.processor
    tokenizer, states, actions = processor.tokenizer, len(processor.state_stats), len(processor.action_stats)
    for problem, there in (
        ("it acts without cameras", c.num_cameras == 0),
        (f"its rope_theta is {c.rope_theta:g}, not 10000", c.rope_theta != Pi0Config.rope_theta),
        ("its prompt holds a padded state, as before release 0.5", processor.reads_state and processor.pad_state_bins),
        (f"it has {states} states, to be added to {actions} relative actions", processor.relative and actions > states),
    ):
        if there:
            raise CheckpointError(f"not exported to {folder}: lerobot's code cannot do what this policy does: {problem}")
    if cameras is None:
        known = [name.removeprefix("observation.images.") for name in policy.meta.get("cameras", ())] or CAMERAS
        cameras = [*known, *(f"camera_{i}" for i in range(len(known), c.num_cameras))][: c.num_cameras]
    if isinstance(cameras, str):
        raise CheckpointError(f"cameras is {cameras!r}; expected a list of {c.num_cameras} names")
    if len(cameras) != c.num_cameras or len(set(cameras)) < len(cameras):
        raise CheckpointError(f"cameras are {', '.join(cameras)}; expected {c.num_cameras} different names")
    is_paligemma = len(tokenizer) >= PALIGEMMA_PIECES
    tokenizer_name = tokenizer_name or (PALIGEMMA_NAME if is_paligemma else str(folder.resolve()))

    picture = dict(type="VISUAL", shape=[3, c.image_size, c.image_size])
    inputs = {f"observation.images.{name}": picture for name in cameras}
    inputs["observation.state"] = dict(type="STATE", shape=[states])
    outputs = dict(action=dict(type="ACTION", shape=[actions]))
    mode = lerobot.OWN[c.type]
    modes = dict(VISUAL="IDENTITY", STATE=mode, ACTION=mode)
    relative = dict(
        enabled=bool(processor.relative), exclude_joints=["absolute"],
        action_names=[f"{'relative' if i in processor.relative else 'absolute'}_{i}" for i in range(actions)],
    )
    config = dict(
        type=c.type, n_obs_steps=1, input_features=inputs, output_features=outputs, normalization_mapping=modes, device="cpu",
        dtype="bfloat16" if expert_dtype(policy, dtype) == torch.bfloat16 else "float32",
        chunk_size=c.horizon, n_action_steps=policy.meta.get("execute", c.horizon),
        num_inference_steps=policy.meta.get("num_steps", c.num_steps), tokenizer_max_length=c.max_token_len,
        max_state_dim=c.state_dim, max_action_dim=c.action_dim, image_resolution=[c.image_size, c.image_size],
        min_period=c.min_period, max_period=c.max_period, use_relative_actions=relative["enabled"],
        relative_exclude_joints=relative["exclude_joints"], action_feature_names=relative["action_names"],
    )

    def step(name: str, **options) -> dict:
        return dict(registry_name=name, config=options)

    # The steps of lerobot's own pipelines in their order, which differs between its two policies.
    scaling = dict(eps=0.0, features=inputs | outputs, norm_map=modes)
    first = [step("rename_observations_processor", rename_map={}), step("to_batch_processor")]
    device = step("device_processor", device="cpu", float_dtype=None)
    prompt = step(
        "tokenizer_processor", tokenizer_name=tokenizer_name, max_length=c.max_token_len, task_key="task", padding_side="right",
        padding="max_length", truncation=True,
    )
    scale = [step("relative_actions_processor", **relative), step("normalizer_processor", **scaling)]
    if processor.reads_state:
        before = [*first, *scale, step(lerobot.STATE_IN_PROMPT, max_state_dim=c.state_dim, task_key="task"), prompt, device]
    else:
        before = [*first, step("pi0_new_line_processor"), prompt, device, *scale]
    after = [step("unnormalizer_processor", **scaling), step("absolute_actions_processor", enabled=relative["enabled"]), device]
    stats = {
        f"{feature}.{name}": value
        for feature, found in (("observation.state", processor.state_stats), ("action", processor.action_stats))
        for name, value in lerobot_statistics(found, c.normalization, feature == "action").items()
    }
    writers: Writers = {}
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        for index, entry in enumerate(steps):
            if "norm_map" in entry["config"]:
                entry["state_file"] = f"{name}_step_{index}_{entry['registry_name']}.safetensors"
                writers[entry["state_file"]] = lambda path: save_file(stats, path)
        writers[f"{name}.json"] = text(dict(name=name, steps=steps))
    if not is_paligemma:
        writers |= for_transformers(tokenizer)
    ours = checkpoint.description(policy, folder)
    return {**writers, lerobot.OURS: lambda path: path.write_text(ours), "config.json": text(config)}


def lerobot_statistics(stats: NormStats, normalization: str, is_action: bool) -> dict[str, torch.Tensor]:
    """Statistics by which lerobot, which adds nothing to a deviation (eps 0) or to the distance of quantiles, scales as we do.

    We add 1e-6; a state that never varied is not divided by it (see Processor), while lerobot has one scale for both directions:
    such an action is scaled back by 1e-6, as it is here.
    """
    varied = ~stats.constant(normalization) | is_action
    values = {name: getattr(stats, name).astype(np.float64) for name in ("mean", "std", "q01", "q99")}
    if normalization == "quantile":
        values["q99"] = values["q01"] + np.where(varied, values["q99"] - values["q01"] + CONSTANT, 2.0)
    else:
        values["std"] = np.where(varied, values["std"] + CONSTANT, 1.0)
    return {name: torch.from_numpy(value).float() for name, value in values.items()}


def for_transformers(tokenizer: Tokenizer) -> Writers:
    """A small tokenizer in the files that transformers' AutoTokenizer reads: the same pieces, begin-of-sequence in front."""
    if tokenizer.path.suffix == ".json":
        fast = tokenizers.Tokenizer.from_buffer(tokenizer.serialized)
        begin = "<bos>"
    else:
        fast, begin = from_sentencepiece(tokenizer)
    fast.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, fast.token_to_id(begin))])
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=begin, pad_token=fast.id_to_token(0),
        split_special_tokens=True,  # a "<s>" in an instruction is text
    )
    return {"tokenizer_config.json": text(config), "tokenizer.json": lambda path: path.write_text(fast.to_str())}


def from_sentencepiece(tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, str]:
    """A byte-pair model of sentencepiece in the format of `tokenizers`, and its begin-of-sequence piece.

    Raises CheckpointError for a model of another kind, or one that changes its text beyond blanks.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema  # protobuf's classes, which only this needs

    model = schema.ModelProto.FromString(tokenizer.serialized)
    changes = model.normalizer_spec
    if model.trainer_spec.model_type != schema.TrainerSpec.BPE or changes.precompiled_charsmap or changes.add_dummy_prefix:
        raise CheckpointError(f"tokenizer {tokenizer.path} is no plain byte-pair model; give the policy a tokenizer.json instead")
    kinds, pieces = schema.ModelProto.SentencePiece, {piece.piece: index for index, piece in enumerate(model.pieces)}
    normal = sorted((p for p in model.pieces if p.type == kinds.NORMAL and len(p.piece) > 1), key=lambda p: -p.score)
    merges = [
        (piece.piece[:cut], piece.piece[cut:])  # the best score is merged first
        for piece in normal for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in pieces and piece.piece[cut:] in pieces
    ]
    unknown = next(p.piece for p in model.pieces if p.type == kinds.UNKNOWN)
    fast = tokenizers.Tokenizer(models.BPE(pieces, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.add_special_tokens([p.piece for p in model.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)])
    whole = [p.piece for p in model.pieces if p.type == kinds.USER_DEFINED]  # taken out before anything is merged
    fast.add_tokens([tokenizers.AddedToken(piece, normalized=True, special=False) for piece in whole])
    return fast, model.pieces[model.trainer_spec.bos_id].piece
