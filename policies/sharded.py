"""Policies whose weights lie in parts on several processes (PyTorch's FSDP2): none holds all of them, their gradients and moments.

Layers are brought together one by one as they compute, so all processes have to compute the same layers in the same order. Where
they do not, as in rollouts, each takes a whole copy for a while: `together`.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

from torch import nn
from torch.utils import _pytree

from pi_stepnft.policies.pi0 import Pi0, Prefix
from pi_stepnft.policies.weights import whole

EMPTY: dict[Pi0, Pi0] = {}
"""Of each divided policy one without weights, for `together`."""


def shard(policy: Pi0) -> None:
    """Divide a policy's weights among all processes, in place. Its parameters are others from then on."""
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    meta = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in policy.parameters()}
    EMPTY[policy] = copy.deepcopy(policy, meta)
    if Prefix not in _pytree.SUPPORTED_NODES:  # FSDP2 looks for tensors in what a method returns
        _pytree.register_pytree_node(Prefix, lambda prefix: (list(vars(prefix).values()), None), lambda values, _: Prefix(*values))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    mesh = init_device_mesh(next(policy.parameters()).device.type, (get_world_size(),))
    units: list[nn.Module] = [*policy.language_model.layers, *policy.expert.layers]
    if policy.config.num_cameras:
        from transformers.modeling_layers import GradientCheckpointingLayer

        units += [module for module in policy.vision_tower.modules() if isinstance(module, GradientCheckpointingLayer)]
        units.append(policy.vision_tower)
    for unit in (*units, policy.language_model.embed_tokens, policy.action_out_proj, policy):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(policy.language_model.layers[-1], "keys_values")
    for name in ("encode_prefix", "features"):
        register_fsdp_forward_method(policy, name)


@contextlib.contextmanager
def together(policy: Pi0) -> Iterator[Pi0]:
    """A whole copy of a divided policy, as it is now and without gradients, to which all processes contribute; another policy is
    what it is."""
    if policy not in EMPTY:
        yield policy
        return
    acting = EMPTY[policy]
    empty = acting.state_dict()
    acting.load_state_dict({name: whole(tensor.detach()) for name, tensor in policy.state_dict().items()}, assign=True)
    try:
        yield acting
    finally:
        acting.load_state_dict(empty, assign=True)
