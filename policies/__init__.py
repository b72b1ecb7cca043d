"""Thin π0 and π0.5 policies: the model, its processor, and checkpoints.

policy = policies.load("pi0-tiny-pickcube-rgb")
prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
actions = policy.processor.unnormalize_actions(policy.sample(prefix, state))
"""

from policies.checkpoint import bundled, load, load_training, save, save_training
from policies.export import export
from policies.lora import add_lora
from policies.memory import Rows, memory_gb
from policies.pi0 import Inputs, Pi0, Pi0Config, Prefix
from policies.pi05 import Pi05, Pi05Config
from policies.processor import NormStats, Processor, Tokenizer
from policies.weights import CheckpointError, load_weights, read_json

__all__ = [
    "CheckpointError", "Inputs", "NormStats", "Pi0", "Pi05", "Pi05Config", "Pi0Config", "Prefix", "Processor", "Rows", "Tokenizer",
    "add_lora", "bundled", "export", "load", "load_training", "load_weights", "memory_gb", "read_json", "save", "save_training",
]  # fmt: skip
