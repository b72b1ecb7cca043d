"""Thin π0 and π0.5 policies: the model, its processor, and checkpoints.

policy = policies.load("pi0-tiny-pickcube-rgb")
prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
actions = policy.processor.unnormalize_actions(policy.sample(prefix, state))
"""

from policies.checkpoint import bundled, load, load_training, save, save_training
from policies.export import export
from policies.pi0 import Pi0, Pi0Config, Prefix
from policies.pi05 import Pi05, Pi05Config
from policies.processor import NormStats, Processor, Tokenizer
from policies.weights import CheckpointError, load_weights, read_json

__all__ = [
    "CheckpointError", "NormStats", "Pi0", "Pi05", "Pi05Config", "Pi0Config", "Prefix", "Processor", "Tokenizer", "bundled",
    "export", "load", "load_training", "load_weights", "read_json", "save", "save_training",
]  # fmt: skip
