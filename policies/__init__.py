"""Thin π0 and π0.5 policies: the model, its processor, and checkpoints.

policy = policies.load("pi0-tiny-pickcube-rgb")
prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
actions = policy.processor.unnormalize_actions(policy.sample(prefix, state))
"""

from pi_stepnft.policies.checkpoint import bundled, load, save
from pi_stepnft.policies.export import export
from pi_stepnft.policies.lora import add_lora
from pi_stepnft.policies.pi0 import Inputs, Pi0, Pi0Config, Prefix
from pi_stepnft.policies.pi05 import Pi05, Pi05Config
from pi_stepnft.policies.processor import NormStats, Processor, Tokenizer
from pi_stepnft.policies.weights import CheckpointError, inside, load_weights, read_json

__all__ = [
    "CheckpointError", "Inputs", "NormStats", "Pi0", "Pi05", "Pi05Config", "Pi0Config", "Prefix", "Processor", "Tokenizer",
    "add_lora", "bundled", "export", "inside", "load", "load_weights", "read_json", "save",
]
