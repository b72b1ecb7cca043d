"""LoRA (Hu et al., arXiv 2106.09685): train low-rank additions to frozen weights, W + (alpha / rank) · B·A.

Adapters sit on the attention and feed-forward layers of the language model and of the action expert, as in openpi's LoRA
configurations; state, action and time projections, which are small, are trained in full. All else is frozen: the vision
tower (openpi trains it), the token embedding, the norms. Checkpoints never hold adapters: saving merges them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_stepnft.policies.gemma import Linear
from pi_stepnft.policies.pi0 import Pi0
from pi_stepnft.policies.weights import whole


class LoRALinear(Linear):
    """A frozen linear layer with a trained low-rank addition, which is float32 and used in the input's precision."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        """Takes over the layer's weight, the same tensor. A is Gaussian and B zero, so at first nothing changes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, alpha / rank
        self.weight, self.bias = linear.weight, linear.bias
        options = dict(device=linear.weight.device, dtype=torch.float32)
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, **options) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **options))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))

    def merged(self) -> Tensor:
        """W + (alpha / rank) · B·A in float32: rounded to bfloat16, additions below its resolution would be lost."""
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


def add_lora(policy: Pi0, rank: int = 16, alpha: float = 16.0) -> Pi0:
    """Freeze the policy but for its small projections, and put an adapter on every matrix of both transformers, in place.

    rank, alpha: the additions are (alpha / rank) · B·A with B (out, rank) and A (rank, in); openpi's values are 16 for the
    language model and 32 for the expert. The last layer of the language model has adapters that stay zero: of it only keys
    and values are read. Raises ValueError for a rank or an alpha that is not positive.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA has rank {rank} and alpha {alpha}; expected a rank of at least 1 and a positive alpha")
    for module in [*policy.vlm_modules(), policy.expert]:
        module.requires_grad_(False)
    for gemma in (policy.language_model, policy.expert):
        for layer in gemma.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    setattr(block, name, LoRALinear(linear, rank, alpha))
    return policy


@torch.no_grad()
def merged(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a policy's state, one after another: adapters merged into the weights they belong to, and whole where
    they lie in parts on several processes."""
    adapted = {name: module for name, module in policy.named_modules() if isinstance(module, LoRALinear)}
    for name, tensor in policy.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if owner not in adapted:
            yield name, whole(tensor)
        elif kind == "weight":
            yield name, adapted[owner].merged()
