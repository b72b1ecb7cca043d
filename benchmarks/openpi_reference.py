"""openpi's PyTorch π0 and π0.5 at any size and with a policy's weights, for the benchmark that compares with them.

openpi's own entry on the package index is an empty placeholder; `rlinf-openpi` is its code. The networks run as published:
`pi0_pytorch.py`, `gemma_pytorch.py` and `preprocessing_pytorch.py` are imported unmodified, without JAX: all that they take from
modules that import it are a table of sizes, which is ours here, and a function that scales pictures, which is not reached.

Five files of transformers 4.53.2 are openpi's own (`transformers_replace`), to be copied over those of an installation.
`rlinf-transformer-openpi` is that release with the five in place, byte for byte those that `rlinf-openpi` brings along.
"""

import importlib
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import safetensors.torch
import torch
from lerobot_reference import OURS, StandIn, layers

from pi_stepnft import policies

OPENPI = "0.1.1"
"""release of rlinf-openpi"""
REQUIREMENTS = (*OURS, "rlinf-transformer-openpi==4.53.2", "pytest")
"""what openpi's networks (one of whose files imports pytest), our policies and the benchmark need, and no more"""


def openpi_network(policy):
    """openpi's `PI0Pytorch` of this policy's type and sizes, float32, in eval mode, with the weights that `policies.export` writes.

    Its solver counts time down in float32, so that a step of 0.1 ends up 1e-7 off, which is 1e-4 in the angle of the time embedding
    at the shortest period. `sample_actions` puts the rounded times in, unless `own_times`.
    """
    c = policy.config

    def gemma_sizes(variant: str) -> SimpleNamespace:
        width, mlp = (c.vlm_width, c.vlm_mlp) if variant == "gemma_2b" else (c.expert_width, c.expert_mlp)
        return SimpleNamespace(
            width=width, depth=c.vlm_depth, mlp_dim=mlp, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim
        )

    for package, name in (("models", "gemma"), ("shared", "image_tools")):
        importlib.import_module(f"openpi.{package}")
        sys.modules.setdefault(f"openpi.{package}.{name}", StandIn(f"openpi.{package}.{name}"))
    sys.modules["openpi.models.gemma"].get_config = gemma_sizes
    from openpi.models_pytorch import gemma_pytorch, pi0_pytorch, preprocessing_pytorch

    config = SimpleNamespace(
        pi05=c.type == "pi05", paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", dtype="float32",
        action_horizon=c.horizon, action_dim=c.action_dim,
    )
    with mock.patch.multiple(
        gemma_pytorch, **layers(gemma_pytorch, c, "PaliGemmaForConditionalGeneration", "GemmaForCausalLM")
    ):
        network = pi0_pytorch.PI0Pytorch(config).eval()
    with tempfile.TemporaryDirectory() as folder:  # the way in which openpi's server loads a policy: strictly
        policies.export(policy, folder, asset_id="any")
        safetensors.torch.load_model(network, f"{folder}/model.safetensors")
    torch.set_float32_matmul_precision("highest")  # the constructor lowers it for the whole process
    published = pi0_pytorch.PI0Pytorch  # of the instance, the constructor compiles sample_actions, which would take minutes

    def sample_actions(observation, noise, num_steps: int, own_times: bool = False):
        def denoise_step(state, masks, cache, x_t, t):
            t = t if own_times else (t * num_steps).round() / num_steps
            return published.denoise_step(network, state, masks, cache, x_t, t)

        network.denoise_step = denoise_step
        return published.sample_actions(network, "cpu", observation, noise, num_steps)

    def preprocess(observation, train: bool):  # training would crop, turn and colour the pictures at random
        return preprocessing_pytorch.preprocess_observation_pytorch(observation, image_resolution=(c.image_size, c.image_size))

    network.sample_actions = sample_actions
    pi0_pytorch._preprocessing = SimpleNamespace(preprocess_observation_pytorch=preprocess)
    return network


def openpi_inputs(policy, inputs: dict) -> tuple:
    """The positional argument that its `forward` and `sample_actions` begin with."""
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    observation = SimpleNamespace(
        images=dict(zip(cameras, inputs["images"].unbind(dim=1))),
        image_masks=dict(zip(cameras, inputs["image_mask"].unbind(dim=1))),
        state=inputs["state"], tokenized_prompt=inputs["tokens"], tokenized_prompt_mask=inputs["token_mask"],
        token_ar_mask=None, token_loss_mask=None,
    )
    return (observation,)
