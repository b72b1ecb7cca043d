"""π0: a flow-matching vision-language-action policy (Black et al., arXiv 2410.24164), in two passes.

A PaliGemma prefix (camera images, then the instruction) is encoded once per observation into keys and values per layer;
a small action expert then reads them at every solver step. As the prefix never sees the expert's tokens, the two passes
are exactly the joint attention of the published model, and one code path serves supervised training, rollouts and
reinforcement learning.

    prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)   # once per observation
    v = policy.velocity(prefix, state, x_t, t)                              # once per solver step

Time runs from t = 1 (noise) to t = 0 (action): x_t = t * noise + (1 - t) * action, and the velocity is noise - action.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi_stepnft.policies.gemma import AdaRMSNorm, Gemma, Linear, RMSNorm, additive_mask, rotary
from pi_stepnft.policies.weights import problem

# Ranges far beyond any policy: what is outside is a damaged file, and would be built for ever.
Few = Annotated[int, Field(ge=1, le=256)]
Many = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Scale = Annotated[float, Field(ge=1e-9, le=1e9)]


@checked(frozen=True, config=ConfigDict(strict=True))
class Pi0Config:
    """Sizes of a π0 policy; the defaults are the published 3.2 B model. Raises ValueError on impossible values."""

    type = "pi0"
    """name of the policy in a checkpoint"""
    normalization = "mean_std"
    """statistics that scale states and actions (see policies.processor)"""

    image_size: Many = 224
    """side of the square camera images, pixels"""
    patch_size: Many = 14
    """side of a vision patch, pixels; divides image_size"""
    num_cameras: Annotated[int, Field(ge=0, le=256)] = 3
    """images per observation; 0 builds no vision tower: the prefix is text, the policy acts on the state vector"""
    vision_width: Width = 1152
    """width of the SigLIP vision tower"""
    vision_depth: Few = 27
    """layers of the vision tower"""
    vision_mlp: Width = 4304
    """hidden width of the vision tower's feed-forward layers"""
    vision_heads: Few = 16
    """attention heads of the vision tower"""
    vlm_width: Width = 2048
    """width of the language model"""
    vlm_depth: Few = 18
    """layers of the language model, and of the action expert, which reads the keys and values of each"""
    vlm_mlp: Width = 16384
    """hidden width of the language model's feed-forward layers"""
    expert_width: Width = 1024
    """width of the action expert; even, because the time embedding is half sines and half cosines"""
    expert_mlp: Width = 4096
    """hidden width of the expert's feed-forward layers"""
    heads: Few = 8
    """query heads of the language model and of the expert"""
    kv_heads: Few = 1
    """key/value heads shared by groups of query heads; divides heads"""
    head_dim: Many = 256
    """width of a head; even, for rotary positions"""
    vocab_size: Width = 257152
    """rows of the token embedding"""
    max_token_len: Many = 48
    """instruction length in tokens, padded on the right"""
    state_dim: Many = 32
    """width of the padded state vector"""
    action_dim: Many = 32
    """width of the padded action vector"""
    horizon: Many = 50
    """actions per chunk"""
    num_steps: Many = 10
    """solver steps when a caller names none"""
    rope_theta: Scale = 1e4
    """base of the rotary frequencies"""
    min_period: Scale = 4e-3
    """shortest period of the time embedding"""
    max_period: Scale = 4.0
    """longest period of the time embedding"""

    def __post_init__(self):
        for name, divisor in (("image_size", "patch_size"), ("vision_width", "vision_heads"), ("heads", "kv_heads")):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a multiple of {divisor} {getattr(self, divisor)}"
                )
        for name in ("head_dim", "expert_width"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} is {getattr(self, name)}; expected an even number")
        if self.min_period >= self.max_period:
            raise ValueError(f"min_period is {self.min_period}; expected less than max_period {self.max_period}")

    @classmethod
    def pi0(cls, **overrides) -> "Pi0Config":
        """The published dimensions (3.2 B parameters), with any field overridden."""
        return cls.from_dict(overrides)

    @classmethod
    def tiny(cls, **overrides) -> "Pi0Config":
        """The same architecture at about 1.6 M parameters, for two CPU cores, with any field overridden."""
        sizes = dict(
            image_size=96, patch_size=12, num_cameras=1,
            vision_width=128, vision_depth=4, vision_mlp=256, vision_heads=4,
            vlm_width=128, vlm_depth=3, vlm_mlp=256, expert_width=128, expert_mlp=256, heads=4, kv_heads=1, head_dim=32,
            vocab_size=768, max_token_len=16, state_dim=48, action_dim=8, horizon=8, num_steps=4,
        )
        return cls.from_dict({**sizes, **overrides})

    @classmethod
    def from_dict(cls, values: dict) -> "Pi0Config":
        """Build from a plain dictionary; raises ValueError on a key that is no field."""
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"unknown policy option {', '.join(unknown)}; expected some of {', '.join(names)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(problem(error)) from None

    def to_dict(self) -> dict:
        """A plain dictionary that `from_dict` and JSON take back."""
        return asdict(self)

    @property
    def tokens_per_image(self) -> int:
        """Prefix tokens of one camera."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix_len(self) -> int:
        """Prefix tokens in all, padding included."""
        return self.num_cameras * self.tokens_per_image + self.max_token_len


@dataclass
class Prefix:
    """Encoded observations: what the action expert reads, once per layer. B observations, P prefix tokens."""

    keys: Tensor
    """(depth, B, P, kv_heads * head_dim), after rotary positions"""
    values: Tensor
    """(depth, B, P, kv_heads * head_dim)"""
    mask: Tensor
    """(B, P) bool, False for padding and absent cameras"""
    n_valid: Tensor
    """(B,) int64, valid tokens: the position at which the suffix begins"""

    def __len__(self) -> int:
        return self.mask.shape[0]

    def __getitem__(self, index) -> "Prefix":
        """Select observations by slice, index tensor (B',) or boolean mask (B,); an integer keeps a batch of one."""
        if isinstance(index, int):
            index = [index]
        return Prefix(self.keys[:, index], self.values[:, index], self.mask[index], self.n_valid[index])

    def rows(self) -> list[Tensor]:
        """Its tensors, each with a row for each observation, (B, …)."""
        return [self.keys.transpose(0, 1), self.values.transpose(0, 1), self.mask, self.n_valid]

    @staticmethod
    def from_rows(keys: Tensor, values: Tensor, mask: Tensor, n_valid: Tensor) -> "Prefix":
        """What `rows` came from."""
        return Prefix(keys.transpose(0, 1), values.transpose(0, 1), mask, n_valid)

    @staticmethod
    def cat(prefixes: "Iterable[Prefix]") -> "Prefix":
        """Join prefixes along the batch."""
        prefixes = list(prefixes)
        return Prefix(
            torch.cat([p.keys for p in prefixes], dim=1),
            torch.cat([p.values for p in prefixes], dim=1),
            torch.cat([p.mask for p in prefixes]),
            torch.cat([p.n_valid for p in prefixes]),
        )

    def detach(self) -> "Prefix":
        """The same prefix without gradient history."""
        return Prefix(self.keys.detach(), self.values.detach(), self.mask, self.n_valid)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Prefix":
        """Move to a device; dtype applies to keys and values."""
        return Prefix(
            self.keys.to(device=device, dtype=dtype),
            self.values.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.n_valid.to(device=device),
        )


@dataclass
class Inputs:
    """What `encode_prefix` takes, for B observations; unpacks to its arguments. Stored where prefixes are too large to keep."""

    images: Tensor
    """(B, N, 3, H, W)"""
    image_mask: Tensor
    """(B, N) bool"""
    tokens: Tensor
    """(B, L) int64"""
    token_mask: Tensor
    """(B, L) bool"""

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self):
        return iter((self.images, self.image_mask, self.tokens, self.token_mask))

    def __getitem__(self, index) -> "Inputs":
        """Select observations by slice, index tensor (B',) or boolean mask (B,)."""
        return Inputs(*(tensor[index] for tensor in self))

    def rows(self) -> list[Tensor]:
        """Its tensors, each with a row for each observation, (B, …)."""
        return list(self)

    @staticmethod
    def from_rows(*tensors: Tensor) -> "Inputs":
        """What `rows` came from."""
        return Inputs(*tensors)

    @staticmethod
    def cat(inputs: "Iterable[Inputs]") -> "Inputs":
        """Join inputs along the batch."""
        return Inputs(*(torch.cat(column) for column in zip(*inputs)))

    def to(self, device: torch.device | str | None = None) -> "Inputs":
        """Move to a device."""
        return Inputs(*(tensor.to(device=device) for tensor in self))


class Pi0(nn.Module):
    """π0 with B the batch, N cameras, L text tokens, H the horizon, A and S the padded action and state widths.

    `processor` (see policies.processor) turns observations into this module's inputs and its outputs into actions, and
    `meta` is a JSON dictionary that travels with the checkpoint; both may be set freely.
    """

    def __init__(self, config: Pi0Config):
        super().__init__()
        self.config = c = config
        self.processor = None
        self.meta: dict = {}
        self.vlm_frozen = False

        if c.num_cameras:
            from transformers import SiglipVisionConfig, SiglipVisionModel  # takes seconds, and not every program needs it

            vision = SiglipVisionConfig(
                hidden_size=c.vision_width, intermediate_size=c.vision_mlp, num_hidden_layers=c.vision_depth,
                num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.patch_size,
                hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=False, attn_implementation="sdpa",
            )
            self.vision_tower = SiglipVisionModel(vision)
            for module in self.vision_tower.modules():  # the same layers, computing in their input's precision
                module.__class__ = {nn.Linear: Linear, nn.LayerNorm: LayerNorm}.get(type(module), type(module))
            embeddings = self.vision_embeddings()
            embeddings.output_dtype = torch.float32
            embeddings.register_forward_hook(cast_output)
            self.multi_modal_projector = nn.ModuleDict({"linear": Linear(c.vision_width, c.vlm_width)})
        self.language_model = Gemma(
            c.vlm_width, c.vlm_depth, c.vlm_mlp, c.heads, c.kv_heads, c.head_dim, vocab_size=c.vocab_size
        )
        self.build_expert()
        self.action_out_proj = nn.Linear(c.expert_width, c.action_dim)
        # The first velocities are near zero, so the first losses are those of predicting the mean.
        nn.init.normal_(self.action_out_proj.weight, std=0.1 * c.expert_width**-0.5)
        nn.init.zeros_(self.action_out_proj.bias)

    def build_expert(self) -> None:
        """Set up the action expert and its input projections."""
        c = self.config
        self.expert = Gemma(c.expert_width, c.vlm_depth, c.expert_mlp, c.heads, c.kv_heads, c.head_dim)
        self.state_proj = nn.Linear(c.state_dim, c.expert_width)
        self.action_in_proj = nn.Linear(c.action_dim, c.expert_width)
        self.action_time_mlp_in = nn.Linear(2 * c.expert_width, c.expert_width)
        self.action_time_mlp_out = nn.Linear(c.expert_width, c.expert_width)

    # ---------------------------------------------------------------- prefix

    def encode_prefix(
        self, images: Tensor | None, image_mask: Tensor | None, tokens: Tensor, token_mask: Tensor
    ) -> Prefix:
        """Encode observations, all cameras first, then the text; attention is bidirectional over the valid tokens.

        images: (B, N, 3, H, W) in [-1, 1]; image_mask: (B, N) bool, False for an absent camera (give it an all -1
        image); tokens: (B, L) int64; token_mask: (B, L) bool. Without cameras in the configuration images and
        image_mask are ignored and may be None. Raises ValueError on another number of cameras or another image size.
        """
        if not self.config.num_cameras:  # text alone: encode each instruction once, however many observations share it
            texts, which = torch.cat((tokens, token_mask.long()), dim=1).unique(dim=0, return_inverse=True)
            tokens, token_mask = texts.chunk(2, dim=1)
        x = self.language_model.embed_tokens(tokens) * math.sqrt(self.config.vlm_width)  # (B, L, W)
        mask = token_mask.bool()
        if self.config.num_cameras:
            features = self.encode_images(images, image_mask).to(x.dtype)  # (B, N * tokens_per_image, W)
            x = torch.cat((features, x), dim=1)  # (B, P, W)
            mask = torch.cat((image_mask.bool().repeat_interleave(self.config.tokens_per_image, dim=1), mask), dim=1)
        # Columns that no observation uses (a camera absent in all, the padding behind the longest text) would be computed
        # only to be masked: they are left out here and are zeros in the result.
        used = mask.any(dim=0).nonzero().squeeze(1)  # (U,)
        x, valid = x[:, used].to(self.language_model.dtype), mask[:, used]
        rope = rotary(valid.cumsum(dim=1) - 1, self.config.head_dim, self.config.rope_theta, x.dtype)
        attend = additive_mask(valid, x.dtype)[:, None, None, :]  # (B, 1, 1, U): every query sees every valid key
        keys, values = [], []
        for layer in self.language_model.layers[:-1]:
            x, k, v = self.language_model.run(layer, x, rope, attend)
            keys.append(k)
            values.append(v)
        # Of the last layer the expert reads only keys and values: its attention and feed-forward parts, and the final
        # norm, stay in the module for the published layout but are never computed.
        k, v = self.language_model.layers[-1].keys_values(x, rope)
        keys, values = torch.stack([*keys, k]), torch.stack([*values, v])  # (depth, B, U, kv_heads * head_dim)
        shape = (*keys.shape[:2], mask.shape[1], keys.shape[3])
        keys, values = (y.new_zeros(shape).index_copy(2, used, y) for y in (keys, values))
        prefix = Prefix(keys, values, mask, mask.sum(dim=1))
        return prefix if self.config.num_cameras else prefix[which]

    def encode_images(self, images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Camera images (B, N, 3, H, W) in [-1, 1] -> prefix features (B, N * tokens_per_image, vlm_width).

        image_mask: (B, N) bool, all present if None; the features of an absent camera are not computed, they are zeros.
        """
        c = self.config
        expected = (c.num_cameras, 3, c.image_size, c.image_size)
        if images is None or tuple(images.shape[1:]) != expected:
            given = "none" if images is None else f"shape {tuple(images.shape)}"
            raise ValueError(
                f"images: got {given}; expected (batch, cameras, 3, height, width) = (B, {str(expected)[1:]}"
            )
        present = torch.arange(images.shape[0] * c.num_cameras, device=images.device)
        shape = (len(present), c.tokens_per_image, c.vlm_width)
        features = torch.zeros(shape, dtype=self.language_model.dtype, device=images.device)
        if image_mask is not None:
            present = present[image_mask.flatten().bool()]
        if len(present):
            seen = self.vision_tower(images.flatten(0, 1)[present]).last_hidden_state  # (present, tokens, vision_width)
            seen = self.multi_modal_projector["linear"](seen).to(features.dtype)
            features = features.index_copy(0, present, seen)
        return features.unflatten(0, (-1, c.num_cameras)).flatten(1, 2)

    # ---------------------------------------------------------------- suffix

    def velocity(self, prefix: Prefix, state: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted velocity d x / d t at x_t.

        state: (B, S) normalised and padded; x_t: (B, H, A); t: (B,) in [0, 1], 1 is noise. -> v (B, H, A)

        With x_t (B, n, H, A) and t (B, n), n points of the flow per observation share its prefix and its state token, which
        costs much less than n observations: -> v (B, n, H, A).
        """
        return self.action_out_proj(self.features(prefix, state, x_t, t))

    def features(self, prefix: Prefix, state: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Expert output per action token, before the action head: (B, [n,] H, expert_width); inputs as in `velocity`."""
        x = self.embed_suffix(state, x_t, t).to(self.expert.dtype)  # (B, T, W): one state token, then n times H actions
        rope, attend, past = self.suffix_attention(prefix, x.shape[1], state_tokens=1)
        for layer, keys_values in zip(self.expert.layers, past):
            x, _, _ = self.expert.run(layer, x, rope, attend, keys_values)
        return self.expert.norm(x[:, 1:]).to(self.action_out_proj.weight.dtype).view(*x_t.shape[:-1], -1)

    @property
    def critic_width(self) -> int:
        """Width of `critic_features`."""
        return self.config.expert_width

    def critic_features(self, prefix: Prefix, features: Tensor) -> Tensor:
        """What a critic may judge observations by, (B, critic_width): the mean over the action tokens of `features` (B, H, W).

        They see the state, which a prefix does not hold, and the x_t and t that they were computed at.
        """
        return features.mean(1)

    def suffix_attention(
        self, prefix: Prefix, T: int, state_tokens: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
        """What the expert's layers need beside T suffix tokens, `state_tokens` of them in front of the actions.

        A state token sees the prefix and the state tokens; an action sees the prefix, the state, and the actions of its own
        chunk. -> rotary factors, additive mask (B, 1, T * heads / kv_heads, P + T), and the prefix's keys and values per
        layer.
        """
        c, dtype = self.config, self.expert.dtype
        index = torch.arange(T - state_tokens, device=prefix.mask.device)
        chunk = index // c.horizon  # which of the n an action belongs to
        own = torch.zeros(T, T, dtype=torch.bool, device=index.device)
        own[:, :state_tokens] = True
        own[state_tokens:, state_tokens:] = chunk[:, None] == chunk
        own = own.expand(len(prefix), T, T)
        visible = torch.cat((prefix.mask[:, None, :].expand(-1, T, -1), own), dim=2)  # (B, T, P + T)
        first = torch.arange(state_tokens, device=index.device)
        positions = prefix.n_valid[:, None] + torch.cat((first, state_tokens + index % c.horizon))  # (B, T)
        # Each row of the mask serves the query heads of a group.
        attend = additive_mask(visible, dtype).repeat_interleave(c.heads // c.kv_heads, dim=1)[:, None]
        past = list(zip(prefix.keys.to(dtype).unbind(), prefix.values.to(dtype).unbind()))
        return rotary(positions, c.head_dim, c.rope_theta, dtype), attend, past

    def embed_suffix(self, state: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """State (B, S), noisy actions (B, [n,] H, A), times (B, [n]) -> expert tokens (B, 1 + [n ·] H, expert_width)."""
        dtype = self.action_in_proj.weight.dtype
        action = self.action_in_proj(x_t.to(dtype))  # (B, [n,] H, W)
        time = time_embedding(t, self.config.expert_width, self.config.min_period, self.config.max_period).to(dtype)
        action = self.action_time_mlp_in(torch.cat((action, time[..., None, :].expand_as(action)), dim=-1))
        action = self.action_time_mlp_out(F.silu(action))
        return torch.cat((self.state_proj(state.to(dtype))[:, None, :], action.flatten(1, -2)), dim=1)

    # ---------------------------------------------------------------- flow

    def flow_loss(
        self, prefix: Prefix, state: Tensor, actions: Tensor, noise: Tensor | None = None, t: Tensor | None = None
    ) -> Tensor:
        """Flow-matching loss of every action element, (B, H, A): (velocity(x_t) - (noise - actions))².

        actions: (B, H, A) normalised and padded; noise: (B, H, A), standard normal if None; t: (B,), drawn from
        Beta(1.5, 1) * 0.999 + 0.001 if None (arXiv 2410.24164, appendix B). Several draws per observation share its prefix:
        expand actions to (B, n, H, A), and the loss has that shape.
        """
        if noise is None:
            noise = torch.randn_like(actions)
        if t is None:
            t = sample_time(actions.shape[:-2], device=actions.device)
        time = t[..., None, None].to(actions.dtype)
        x_t = time * noise + (1 - time) * actions
        return (self.velocity(prefix, state, x_t, t) - (noise - actions)).square()

    @torch.no_grad()
    def sample(
        self, prefix: Prefix, state: Tensor, noise: Tensor | None = None, num_steps: int | None = None
    ) -> Tensor:
        """Actions (B, H, A), normalised and padded, by Euler steps from noise (B, H, A) at t = 1 to t = 0; no gradient.

        num_steps: solver steps, the configuration's if None. Raises ValueError if it is below 1.
        """
        c = self.config
        steps = c.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps is {steps}; expected at least 1")
        B = len(prefix)
        x = torch.randn(B, c.horizon, c.action_dim, device=prefix.mask.device) if noise is None else noise
        for i in range(steps):
            t = torch.full((B,), 1 - i / steps, device=x.device)
            x = x - self.velocity(prefix, state, x, t) / steps
        return x

    @torch.no_grad()
    def act(
        self,
        obs: dict[str, np.ndarray],
        instructions: list[str],
        num_steps: int | None = None,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """Observations (see Processor) and B instructions -> action chunks (B, H, A_raw) in the environment's units.

        noise: (B, H, A) that the solver starts from; default: drawn from torch's generator.
        """
        images, image_mask, tokens, token_mask, state = self.processor(obs, instructions)
        prefix = self.encode_prefix(images, image_mask, tokens, token_mask)
        if noise is None:
            noise = torch.randn(len(state), self.config.horizon, self.config.action_dim, device=state.device)
        return self.processor.unnormalize_actions(self.sample(prefix, state, noise, num_steps).cpu().numpy(), obs["state"])

    # ---------------------------------------------------------------- training and precision

    def vlm_modules(self) -> list[nn.Module]:
        """The parts that encode the prefix."""
        names = ("vision_tower", "multi_modal_projector", "language_model")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def vision_embeddings(self) -> nn.Module:
        """The vision tower's patch and position embeddings, wherever this release of transformers keeps them."""
        return next(module for module in self.vision_tower.modules() if hasattr(module, "patch_embedding"))

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters of the action expert and of the state, action and time projections."""
        vlm = {id(parameter) for module in self.vlm_modules() for parameter in module.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in vlm]

    def freeze_vlm(self) -> "Pi0":
        """Train the action expert only: the VLM gets no gradient and stays in eval mode; prefixes may be cached."""
        self.vlm_frozen = True
        for module in self.vlm_modules():
            module.requires_grad_(False).eval()
        return self

    def train(self, mode: bool = True) -> "Pi0":
        """As nn.Module.train, except that a frozen VLM stays in eval mode."""
        super().train(mode)
        if self.vlm_frozen:
            for module in self.vlm_modules():
                module.eval()
        return self

    def checkpoint_gradients(self, enabled: bool = True) -> "Pi0":
        """Keep only the inputs of each transformer layer for the backward pass, which computes the rest again.

        Same gradients, a third more time, a fraction of the memory (docs/memory.md).
        """
        self.language_model.checkpointing = self.expert.checkpointing = enabled
        if self.config.num_cameras:
            from transformers.modeling_layers import GradientCheckpointingLayer

            for module in self.vision_tower.modules():  # transformers' layers do this themselves, in training mode
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = enabled
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return self

    def cast(self, dtype: torch.dtype, trained: str | None = None) -> "Pi0":
        """Set the precision of the transformers in place; what is sensitive to it stays float32.

        As in the published code, that is the Gemma norms, the SigLIP patch and position embeddings, and the expert's
        state, action and time projections. Use this rather than `.to(dtype)`, which would convert them too.

        trained: "expert" or "all" of the weights are to be trained and stay float32, so that an optimizer's steps, far smaller
        than bfloat16 resolves, are not lost; each is rounded to `dtype` where it is used, and the computation is the same.
        """
        low = {id(p) for module in [*self.vlm_modules(), self.expert] for p in module.parameters()}
        precise = [module for module in self.modules() if isinstance(module, RMSNorm | AdaRMSNorm)]
        if self.config.num_cameras:
            precise.append(self.vision_embeddings())
        low -= {id(p) for module in precise for p in module.parameters()}
        if trained is not None:
            low -= {id(p) for p in (self.expert_parameters() if trained == "expert" else self.parameters())}
        for parameter in self.parameters():  # one by one: no island is rounded on the way, no second copy of all is made
            parameter.data = parameter.data.to(dtype if id(parameter) in low else torch.float32)
        self.language_model.compute_dtype = self.expert.compute_dtype = None if trained is None else dtype
        if self.config.num_cameras:
            self.vision_embeddings().output_dtype = dtype
        return self


class LayerNorm(nn.LayerNorm):
    """A layer norm that computes in its input's precision, whatever its weight's (see policies.gemma.Linear)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def cast_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Forward hook: hand float32 embeddings on in the precision of the layers behind them."""
    return output.to(module.output_dtype)


def time_embedding(t: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sines, then cosines, of 2πt / period for width / 2 periods in geometric progression; t (...) -> (..., width),
    float64.

    Computed in float64, because at the shortest period the angle reaches 1600 radians.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    frequency = 2 * math.pi / min_period * (min_period / max_period) ** fraction
    angle = t.double()[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def sample_time(
    shape: int | tuple[int, ...], device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Training times from Beta(1.5, 1) * 0.999 + 0.001; Beta(a, 1) is u^(1 / a) for uniform u."""
    return torch.rand(shape, device=device, generator=generator) ** (1 / 1.5) * 0.999 + 0.001
