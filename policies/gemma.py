"""Gemma transformer blocks shared by the language model and by the action experts of π0 and π0.5.

Parameter names and numerics follow the published Gemma checkpoints: RMSNorm scales by (1 + weight) and computes in
float32, the MLP is gelu_tanh(gate) * up, rotary positions are half-split with theta 1e4, linear layers have no bias. A
block takes the keys and values of tokens that came before (`past`), so one block serves a prefix and a suffix that
attends to it. π0.5's expert uses the adaptive block, whose norms are scaled, shifted and gated by a condition.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def mkl_skips_avx512() -> bool:
    """Whether PyTorch's float32 products leave half of this processor idle: MKL runs AVX2 code on AMD's, AVX-512 or not."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpuinfo.exists()
        and "AuthenticAMD" in cpuinfo.read_text()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


ONEDNN = mkl_skips_avx512()
"""Compute linear layers of float32 on the CPU by oneDNN, at more than twice MKL's speed (docs/notebook/policies.md)."""
if ONEDNN:  # it, and PyTorch's layer above it, keep what they made for the last 1024 shapes: in rollouts, a gigabyte
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")


class OneDNNLinear(torch.autograd.Function):
    """F.linear and its gradients by oneDNN, which PyTorch gives such products only where it compiles them."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return OneDNNLinear.product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, inputs = (y.reshape(-1, y.shape[-1]) for y in (gradient, x))
        return (
            OneDNNLinear.product(gradient, weight.t()) if ctx.needs_input_grad[0] else None,
            OneDNNLinear.product(rows.t(), inputs.t()) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """A linear layer that computes in its input's precision, whatever its weight's.

    So a trained weight can be float32, where no small step of the optimizer is rounded away, beside frozen ones in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
            return OneDNNLinear.apply(x, weight, bias)
        return F.linear(x, weight, bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, scaled by (1 + weight); in float32, returned in x's dtype."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.eps).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """Root-mean-square norm whose scale, shift and residual gate are linear in a condition (adaRMS, zero-initialised).

    Zeros leave the norm plain and the gate closed, so an untrained block passes its input on.
    """

    def __init__(self, width: int, cond_width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(cond_width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., width), cond (..., cond_width) with leading dimensions that broadcast to x's.

        -> norm(x) * (1 + scale) + shift and the gate of the residual branch, computed in float32, in x's dtype; the gate
        keeps cond's leading dimensions.
        """
        scale, shift, gate = self.dense(cond.float()).chunk(3, dim=-1)
        y = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return torch.addcmul(shift, y, 1.0 + scale).to(x.dtype), gate.to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary factors (cos, signed sin), each (B, T, 1, head_dim), for integer positions (B, T); angles are float32.

    The first half of the sine carries the minus sign of the rotation, so `rotate` needs no negation.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * theta**-exponent  # (B, T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary factors to heads x (B, T, heads, D)."""
    cos, sin = rope
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean visibility -> additive attention mask of the same shape: 0 where visible, the dtype's most negative value
    elsewhere.

    A finite value keeps a row that sees nothing finite, so padding can never put a NaN into a cache.
    """
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class Attention(nn.Module):
    """Grouped-query attention whose query heads are folded into the query length.

    The `heads / kv_heads` queries of a group share their keys, so (B, T, heads, D) is attended as (B, kv_heads, T *
    group, D) against (B, kv_heads, K, D): keys and values are never expanded, and with one key head nothing is even
    copied.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = Linear(width, heads * head_dim, bias=False)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = Linear(heads * head_dim, width, bias=False)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, each (B, T, kv_heads * D), of normed tokens x (B, T, width)."""
        keys = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)), rope).flatten(-2)
        return keys, self.v_proj(x)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Attend from normed tokens x (B, T, width) to keys and values (B, K, kv_heads * D).

        mask: additive, (B, 1, 1, K) for all queries alike or (B, 1, T * heads / kv_heads, K), query-major. -> (B, T,
        width)
        """
        B, T, _ = x.shape
        G = self.heads // self.kv_heads
        q = rotate(self.q_proj(x).view(B, T, self.heads, self.head_dim), rope)
        q = (
            q.view(B, T, self.kv_heads, G, self.head_dim)
            .transpose(1, 2)
            .reshape(B, self.kv_heads, T * G, self.head_dim)
        )
        k = keys.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)  # (B, kv, K, D)
        v = values.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)  # (B, kv, K, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, kv, T * G, D)
        out = out.view(B, self.kv_heads, T, G, self.head_dim).transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(out)


class MLP(nn.Module):
    """Gated feed-forward layer, gelu_tanh(gate) * up."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm Gemma layer."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.input_layernorm = RMSNorm(width)
        self.self_attn = Attention(width, heads, kv_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = MLP(width, hidden)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What later tokens need of this layer and no more: keys and values (B, T, kv_heads * D) of x (B, T, width)."""
        return self.self_attn.keys_values(self.input_layernorm(x), rope)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, width), mask over past + own keys (see Attention), past: keys and values (B, P, kv_heads * D).

        -> the new x (B, T, width) and this layer's own keys and values (B, T, kv_heads * D).
        """
        out, own_k, own_v = self.attend(self.input_layernorm(x), rope, mask, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), own_k, own_v

    def attend(
        self, h: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of normed tokens h (B, T, width) over past + own keys: its output, and the own keys and values."""
        own_k, own_v = k, v = self.self_attn.keys_values(h, rope)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        return self.self_attn(h, k, v, rope, mask), own_k, own_v


class AdaptiveBlock(Block):
    """A Gemma layer with adaRMS norms and gated residuals, for groups of tokens that have a condition each."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int, cond_width: int):
        super().__init__(width, hidden, heads, kv_heads, head_dim)
        self.input_layernorm = AdaRMSNorm(width, cond_width)
        self.post_attention_layernorm = AdaRMSNorm(width, cond_width)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor], cond: Tensor
    ) -> Tensor:
        """x (B, n, H, width): n groups of H tokens; cond (B, n, 1, cond_width); the rest as in Block, with T = n * H.

        -> the new x (B, n, H, width).
        """
        h, gate = self.input_layernorm(x, cond)
        out, _, _ = self.attend(h.flatten(1, 2), rope, mask, past)
        x = torch.addcmul(x, gate, out.view_as(x))
        h, gate = self.post_attention_layernorm(x, cond)
        return torch.addcmul(x, gate, self.mlp(h))


class Gemma(nn.Module):
    """A stack of blocks with its final norm; with a vocabulary also the token embedding.

    With a condition width the blocks and the final norm are adaptive. The caller drives the layers through `run`, because a
    prefix pass and a suffix pass read them differently.
    """

    compute_dtype: torch.dtype | None = None
    """precision of the matrix products where it is not the weights' (see Pi0.cast)"""
    checkpointing: bool = False
    """compute what is inside a layer again in the backward pass instead of keeping it"""

    def __init__(
        self,
        width: int,
        depth: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        vocab_size: int | None = None,
        cond_width: int | None = None,
    ):
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, width)
        sizes = (width, hidden, heads, kv_heads, head_dim)
        if cond_width is None:
            self.layers = nn.ModuleList(Block(*sizes) for _ in range(depth))
            self.norm = RMSNorm(width)
        else:
            self.layers = nn.ModuleList(AdaptiveBlock(*sizes, cond_width) for _ in range(depth))
            self.norm = AdaRMSNorm(width, cond_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise for training from scratch: fan-in normal weights, residual branches divided by sqrt(2 * depth)."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.zeros_(parameter)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=(parameter.shape[1] * (2 * len(self.layers) if residual else 1)) ** -0.5)

    def run(self, layer: Block, *inputs):
        """layer(*inputs); with `checkpointing` only the inputs are kept for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is random
        return layer(*inputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products; norms may stay float32."""
        return self.compute_dtype or self.layers[0].self_attn.q_proj.weight.dtype
