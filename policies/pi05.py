"""π0.5: π0 with an adaptive action expert (Physical Intelligence, arXiv 2504.16054), in the same two passes.

The flow's time reaches the expert not through its input tokens but through its norms (adaRMS: a scale, a shift and a
residual gate per norm), and there is no state token: the state stands in the prompt as text, or is left out. States and
actions are scaled by their quantiles. All else, and the interface, is π0's (see policies.pi0).
"""

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from pi_stepnft.policies.gemma import Gemma
from pi_stepnft.policies.pi0 import Many, Pi0, Pi0Config, Prefix, time_embedding


@checked(frozen=True, config=ConfigDict(strict=True))
class Pi05Config(Pi0Config):
    """Sizes of a π0.5 policy; the defaults are the published 3.4 B model. Raises ValueError on impossible values."""

    type = "pi05"
    """name of the policy in a checkpoint"""
    normalization = "quantile"
    """statistics that scale states and actions (see policies.processor)"""

    max_token_len: Many = 200
    """prompt length in tokens, the state's included, padded on the right"""
    discrete_state: bool = True
    """whether the prompt carries the state as text; the published LIBERO policy turns it off (and has horizon 10), so it
    acts on images and instruction alone"""

    @classmethod
    def pi05(cls, **overrides) -> "Pi05Config":
        """The published dimensions (3.4 B parameters), with any field overridden."""
        return cls.from_dict(overrides)

    @classmethod
    def tiny(cls, **overrides) -> "Pi05Config":
        """π0's tiny sizes with the adaptive expert, about 1.9 M parameters, with any field overridden.

        The prompt has room for an instruction and 48 numbers, each one piece of the small tokenizer.
        """
        return super().tiny(**{"max_token_len": 80, **overrides})


class Pi05(Pi0):
    """π0.5; dimensions are named as in Pi0. `state` is part of the interface but not of the computation: it may be None."""

    def build_expert(self) -> None:
        c = self.config
        self.expert = Gemma(
            c.expert_width, c.vlm_depth, c.expert_mlp, c.heads, c.kv_heads, c.head_dim, cond_width=c.expert_width
        )
        self.action_in_proj = nn.Linear(c.action_dim, c.expert_width)
        self.time_mlp_in = nn.Linear(c.expert_width, c.expert_width)
        self.time_mlp_out = nn.Linear(c.expert_width, c.expert_width)

    def features(self, prefix: Prefix, state: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Expert output per action token, before the action head: (B, [n,] H, expert_width); inputs as in `velocity`."""
        x = x_t[:, None] if x_t.ndim == 3 else x_t  # (B, n, H, A)
        B, n, H, _ = x.shape
        x = self.action_in_proj(x.to(self.action_in_proj.weight.dtype)).to(self.expert.dtype)  # (B, n, H, W)
        cond = self.condition(t).view(B, n, 1, -1)
        rope, attend, past = self.suffix_attention(prefix, n * H, state_tokens=0)
        for layer, keys_values in zip(self.expert.layers, past):
            x = self.expert.run(layer, x, rope, attend, keys_values, cond)
        x, _ = self.expert.norm(x, cond)  # what follows is no residual branch: its gate has no use
        return x.to(self.action_out_proj.weight.dtype).view(*x_t.shape[:-1], -1)

    @property
    def critic_width(self) -> int:
        """Width of `critic_features`."""
        return 2 * self.config.kv_heads * self.config.head_dim

    def critic_features(self, prefix: Prefix, features: Tensor) -> Tensor:
        """What a critic may judge observations by, (B, critic_width): the last layer's keys and values, all that is computed of it,
        in the mean over the valid tokens of `prefix`. They hold the observation and nothing else."""
        seen = torch.cat((prefix.keys[-1], prefix.values[-1]), dim=-1)  # (B, P, 2 · kv_heads · head_dim)
        weight = prefix.mask / prefix.mask.sum(1, keepdim=True)  # (B, P)
        return (seen.float() * weight[..., None]).sum(1)

    def condition(self, t: Tensor) -> Tensor:
        """Times (...) -> condition of the expert's norms (..., expert_width)."""
        c = self.config
        time = time_embedding(t, c.expert_width, c.min_period, c.max_period).to(self.time_mlp_in.weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
