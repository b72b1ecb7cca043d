"""Write a policy in openpi's PyTorch layout, so that openpi, or what reads its files, can serve it.

    policies.export(policy, "served", asset_id="physical-intelligence/libero")
    # openpi: python scripts/serve_policy.py policy:checkpoint --policy.config=pi05_libero --policy.dir=served
"""

import json
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save_file

from pi_stepnft.policies import checkpoint
from pi_stepnft.policies.pi0 import Pi0, Pi0Config
from pi_stepnft.policies.weights import EXPERT, CheckpointError


def export(policy: Pi0, folder: str | Path, asset_id: str, dtype: str | None = None) -> None:
    """Write `model.safetensors`, `config.json` and `assets/<asset_id>/norm_stats.json` to a folder, created if needed.

    asset_id: where openpi's training configuration that is to serve the policy looks for the statistics, for example
    "physical-intelligence/libero"; dtype: "float32", "float16", "bfloat16" (as published), or None for the weights' own.
    The expert's unused `lm_head`, which openpi insists on, is written as zeros. `config.json` has openpi's entries, and ours
    beside them, so that `policies.load` restores the same policy. Raises CheckpointError if a weight is not finite, if the
    policy has no processor, if asset_id is no relative path, or if the folder cannot be written.
    """
    folder, asset = Path(folder), PurePosixPath(asset_id)
    if policy.processor is None:
        raise CheckpointError(f"not saved to {folder}: the policy has no processor, hence no statistics; set policy.processor")
    if asset.is_absolute() or ".." in asset.parts or not asset.parts:
        raise CheckpointError(f"asset_id is {asset_id!r}; expected a name such as physical-intelligence/libero")
    tensors = checkpoint.published_tensors(policy, dtype, folder)
    c, processor = policy.config, policy.processor
    head = torch.zeros(c.vocab_size, c.expert_width, dtype=tensors[f"{EXPERT}model.layers.0.mlp.up_proj.weight"].dtype)
    tensors[f"{EXPERT}lm_head.weight"] = head
    published = Pi0Config()
    config = {
        "action_dim": c.action_dim,
        "action_horizon": c.horizon,
        "paligemma_variant": "gemma_2b" if c.vlm_width == published.vlm_width else "custom",
        "action_expert_variant": "gemma_300m" if c.expert_width == published.expert_width else "custom",
        "precision": str(head.dtype).removeprefix("torch."),
        "model": c.to_dict(),
        "processor": processor.options(),
    }
    stats = {"norm_stats": {"state": processor.state_stats.to_dict(), "actions": processor.action_stats.to_dict()}}
    writers = {
        "config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n"),
        f"assets/{asset}/norm_stats.json": lambda path: path.write_text(json.dumps(stats, indent=2) + "\n"),
        f"tokenizer{processor.tokenizer.path.suffix}": lambda path: path.write_bytes(processor.tokenizer.serialized),
        "model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    }
    checkpoint.write_files(folder, writers)
