"""Parity of π0 and π0.5 with independent implementations, relative to the largest value, on random weights.

Every parameter, the norms' and gates' included, is far from its initial value; cameras are absent at every place and texts
are padded.

1. transformers' own π0. It has no adaRMS, thus no π0.5. What else it does otherwise, all of it handled below:
   - its time frequencies are float32 (the published code computes them in float64); at the shortest period that is an error
     of about 1e-4 in the angle, so the test puts float64 frequencies in their place;
   - it takes the features of the k-th camera that is present for the k-th run of image tokens, so the runs of absent cameras
     go behind those of the others, masked; as the mask sets the positions, the order makes no other difference;
   - it evaluates one point of the flow per observation (that several together are as if alone is tested elsewhere).
2. For both types, a naive reference in float64 that shares no code with `policies`: SigLIP, the language model and the expert
   written out, one joint attention with a block mask over prefix and suffix, nothing cached. That π0 agrees with it and with
   transformers vouches for what the reference shares between π0 and π0.5.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_policies import SMALL, encode, relative_error

from pi_stepnft.policies import Pi0, Pi0Config, Pi05, Pi05Config

LIMIT = 1e-5


def random_policy(model: type, seed: int = 0, **overrides) -> Pi0:
    torch.manual_seed(seed)
    config = {Pi0: Pi0Config, Pi05: Pi05Config}[model]
    policy = model(config(**{**SMALL, "num_cameras": 3, "max_token_len": 9, **overrides}))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return policy.eval()


def random_inputs(policy: Pi0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Five observations: all cameras, the middle one absent, the first, the last, and two of three; texts of 9 to 5 tokens."""
    c, g = policy.config, torch.Generator().manual_seed(seed)
    image_mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 1, 0]]).bool()
    images = torch.rand(5, 3, 3, c.image_size, c.image_size, generator=g) * 2 - 1
    token_mask = torch.arange(c.max_token_len) < torch.arange(c.max_token_len, c.max_token_len - 5, -1)[:, None]
    return dict(
        images=torch.where(image_mask[..., None, None, None], images, -1.0),
        image_mask=image_mask,
        tokens=torch.randint(3, c.vocab_size, (5, c.max_token_len), generator=g) * token_mask,
        token_mask=token_mask,
        state=torch.randn(5, c.state_dim, generator=g),
        noise=torch.randn(5, c.horizon, c.action_dim, generator=g),
        actions=torch.randn(5, c.horizon, c.action_dim, generator=g),
        t=torch.tensor([0.001, 0.3, 0.5, 0.9, 1.0]),
    )


def ours(policy: Pi0, inputs: dict) -> dict[str, torch.Tensor]:
    prefix, rest = encode(policy, inputs), (inputs["actions"], inputs["noise"], inputs["t"])
    return dict(
        velocity=policy.velocity(prefix, inputs["state"], inputs["noise"], inputs["t"]),
        loss=policy.flow_loss(prefix, inputs["state"], *rest),
        samples=policy.sample(prefix, inputs["state"], inputs["noise"], num_steps=10),
    )


def assert_parity(policy: Pi0, inputs: dict, theirs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in ours(policy, inputs).items():
            assert value.shape == theirs[name].shape and relative_error(value, theirs[name]) <= LIMIT, name


# -------------------------------------------------------------------- transformers


def transformers_pi0(policy: Pi0):
    """transformers' own π0 with this policy's weights, its time frequencies in float64 as in the published code."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "PI0ForConditionalGeneration"):
        pytest.skip("this release of transformers has no pi0 model")
    c = policy.config
    attention = dict(num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim)
    config = transformers.PI0Config(
        vlm_config=dict(
            model_type="paligemma",
            text_config=dict(
                model_type="gemma", hidden_size=c.vlm_width, num_hidden_layers=c.vlm_depth, intermediate_size=c.vlm_mlp,
                vocab_size=c.vocab_size, **attention,
            ),
            vision_config=dict(
                model_type="siglip_vision_model", hidden_size=c.vision_width, intermediate_size=c.vision_mlp,
                num_hidden_layers=c.vision_depth, num_attention_heads=c.vision_heads, image_size=c.image_size,
                patch_size=c.patch_size, vision_use_head=False,
            ),
            projection_dim=c.vlm_width,
            image_token_id=c.vocab_size,
        ),
        dit_config=dict(
            model_type="gemma", hidden_size=c.expert_width, num_hidden_layers=c.vlm_depth,
            intermediate_size=c.expert_mlp, **attention,
        ),
        chunk_size=c.horizon, max_state_dim=c.state_dim, max_action_dim=c.action_dim, num_inference_steps=10,
        loss_reduction="none",
    )
    model = transformers.PI0ForConditionalGeneration(config).eval()
    theirs = {}
    for name, tensor in policy.state_dict().items():
        if name.startswith("expert."):
            name = name.replace("expert.", "model.dit.")
        elif name.startswith(("vision_tower.", "multi_modal_projector.", "language_model.")):
            name = "model.vlm." + name
        elif not name.startswith("action_out_proj."):
            name = "embed_action_time." + name
        theirs[name] = tensor
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert missing == ["model.dit.embed_tokens.weight"] and not unexpected
    fraction = torch.linspace(0, 1, c.expert_width // 2, dtype=torch.float64)
    model.embed_action_time.sinusoid_embeds.sinusoid_freq = 2 * math.pi / (4e-3 * 1e3**fraction)
    return model


def transformers_inputs(policy: Pi0, inputs: dict) -> dict:
    """The same observations as that model takes them: runs of image tokens for the present cameras, then masked ones."""
    c = policy.config
    cameras = inputs["image_mask"].sort(dim=1, descending=True, stable=True).values.repeat_interleave(c.tokens_per_image, dim=1)
    ids = torch.full(cameras.shape, c.vocab_size)
    return dict(
        input_ids=torch.cat((ids, inputs["tokens"]), dim=1),
        attention_mask=torch.cat((cameras, inputs["token_mask"]), dim=1).long(),
        pixel_values=inputs["images"],
        pixel_attention_mask=inputs["image_mask"],
        state=inputs["state"],
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_pi0_agrees_with_transformers(kv_heads):
    policy = random_policy(Pi0, kv_heads=kv_heads)
    inputs, oracle = random_inputs(policy), transformers_pi0(policy)
    common = transformers_inputs(policy, inputs)
    noise, t = inputs["noise"], inputs["t"]
    with torch.no_grad():
        theirs = dict(
            velocity=oracle(**common, noise=noise, timestep=t).logits,
            loss=oracle(**common, noise=noise, timestep=t, actions=inputs["actions"]).loss,
            samples=oracle.sample_actions(**common, noise=noise, num_steps=10),
        )
    assert_parity(policy, inputs, theirs)


# -------------------------------------------------------------------- naive reference


def double_weights(policy: Pi0) -> dict[str, torch.Tensor]:
    """Float64 copies; the vision tower's `vision_model` level is there in some releases of transformers only."""
    return {name.replace("vision_model.", ""): value.detach().double() for name, value in policy.state_dict().items()}


def naive_velocity(w: dict[str, torch.Tensor], c: Pi0Config, inputs: dict, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity (B, H, A) of π0 or π0.5, by its definition, in float64."""
    adaptive = "time_mlp_in.weight" in w  # π0.5
    images, state, x_t, t = (x.double() for x in (inputs["images"], inputs["state"], x_t, t))
    B, H = x_t.shape[:2]

    def linear(name, x):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def attend(q, k, v, visible=None):  # heads (B, heads, T, D)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if visible is not None:
            scores = scores.where(visible, -math.inf)
        return scores.softmax(dim=-1) @ v

    # SigLIP: patches in rows, learned positions, pre-norm layers with LayerNorm, a last LayerNorm.
    def layer_norm(name, x):
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    p = c.patch_size
    x = images.flatten(0, 1).unfold(2, p, p).unfold(3, p, p)  # (B * N, 3, rows, columns, p, p)
    x = x.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)  # (B * N, tokens, 3 * p * p)
    tower = "vision_tower.embeddings."
    x = x @ w[f"{tower}patch_embedding.weight"].flatten(1).T + w[f"{tower}patch_embedding.bias"]
    x = x + w[f"{tower}position_embedding.weight"]
    for i in range(c.vision_depth):
        name = f"vision_tower.encoder.layers.{i}."
        h = layer_norm(f"{name}layer_norm1", x)
        q, k, v = (linear(f"{name}self_attn.{n}_proj", h).unflatten(-1, (c.vision_heads, -1)).transpose(1, 2) for n in "qkv")
        x = x + linear(f"{name}self_attn.out_proj", attend(q, k, v).transpose(1, 2).flatten(2))
        h = F.gelu(linear(f"{name}mlp.fc1", layer_norm(f"{name}layer_norm2", x)), approximate="tanh")
        x = x + linear(f"{name}mlp.fc2", h)
    x = linear("multi_modal_projector.linear", layer_norm("vision_tower.post_layernorm", x))
    text = w["language_model.embed_tokens.weight"][inputs["tokens"]] * c.vlm_width**0.5
    prefix = torch.cat((x.reshape(B, -1, c.vlm_width), text), dim=1)

    # Time and suffix.
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, c.expert_width // 2, dtype=torch.float64)
    angle = 2 * math.pi * t[:, None] / period
    time = torch.cat((angle.sin(), angle.cos()), dim=1)  # (B, W)
    suffix, cond = linear("action_in_proj", x_t), None
    if adaptive:
        cond = F.silu(linear("time_mlp_out", F.silu(linear("time_mlp_in", time))))
    else:
        both = torch.cat((suffix, time[:, None].expand_as(suffix)), dim=2)
        suffix = linear("action_time_mlp_out", F.silu(linear("action_time_mlp_in", both)))
        suffix = torch.cat((linear("state_proj", state)[:, None], suffix), dim=1)

    # Who sees whom: blocks 0 prefix, 1 state, 2 actions; a token sees valid tokens of its own block and of those before.
    P, T = prefix.shape[1], suffix.shape[1]
    block = torch.tensor([0] * P + [1] * (T - H) + [2] * H)
    cameras = inputs["image_mask"].repeat_interleave((c.image_size // p) ** 2, dim=1)
    valid = torch.cat((cameras, inputs["token_mask"], torch.ones(B, T, dtype=torch.bool)), dim=1)
    visible = ((block[:, None] >= block[None, :]) & valid[:, None, :])[:, None]  # (B, 1, P + T, P + T)
    position = valid.cumsum(dim=1) - 1
    frequency = 1e4 ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    angle = (position[..., None] * frequency)[:, None]  # (B, 1, P + T, D / 2)

    def rope(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    def norm(name, x):  # -> the normed x and the gate of the branch behind it
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if f"{name}.dense.weight" not in w:
            return y * (1 + w[f"{name}.weight"]), 1.0
        scale, shift, gate = linear(f"{name}.dense", cond)[:, None].chunk(3, dim=-1)
        return y * (1 + scale) + shift, gate

    # All layers: both streams have their own weights and meet in one attention.
    streams = {"language_model": prefix, "expert": suffix}
    for i in range(c.vlm_depth):
        names = {s: f"{s}.layers.{i}." for s in streams}
        normed = {s: norm(f"{names[s]}input_layernorm", x) for s, x in streams.items()}
        q, k, v = (
            torch.cat([linear(f"{names[s]}self_attn.{n}_proj", h) for s, (h, _) in normed.items()], dim=1)
            .unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for n in "qkv"
        )
        k, v = (x.repeat_interleave(c.heads // c.kv_heads, dim=1) for x in (rope(k), v))
        out = attend(rope(q), k, v, visible).transpose(1, 2).flatten(2)
        for s, part in zip(streams, out.split((P, T), dim=1)):
            x = streams[s] + linear(f"{names[s]}self_attn.o_proj", part) * normed[s][1]
            h, gate = norm(f"{names[s]}post_attention_layernorm", x)
            gated = F.gelu(linear(f"{names[s]}mlp.gate_proj", h), approximate="tanh") * linear(f"{names[s]}mlp.up_proj", h)
            streams[s] = x + linear(f"{names[s]}mlp.down_proj", gated) * gate
    return linear("action_out_proj", norm("expert.norm", streams["expert"])[0][:, -H:])


@pytest.mark.parametrize("model", [Pi0, Pi05])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_both_agree_with_the_naive_joint_attention(model, kv_heads):
    policy = random_policy(model, kv_heads=kv_heads)
    inputs, w, c = random_inputs(policy), double_weights(policy), policy.config
    noise, actions, t = (inputs[k].double() for k in ("noise", "actions", "t"))
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    x = noise
    for i in range(10):
        x = x - 0.1 * naive_velocity(w, c, inputs, x, torch.full((len(x),), 1 - i / 10))
    theirs = dict(
        velocity=naive_velocity(w, c, inputs, noise, t),
        loss=(noise - actions - naive_velocity(w, c, inputs, x_t, t)) ** 2,
        samples=x,
    )
    assert_parity(policy, inputs, theirs)


def test_gradients_of_pi05_agree_with_the_naive_joint_attention():
    policy = random_policy(Pi05)
    inputs = random_inputs(policy)
    w = {name: value.requires_grad_() for name, value in double_weights(policy).items()}
    naive_velocity(w, policy.config, inputs, inputs["noise"], inputs["t"]).square().sum().backward()
    policy.velocity(encode(policy, inputs), None, inputs["noise"], inputs["t"]).square().sum().backward()
    without = set()
    for name, parameter in policy.named_parameters():
        theirs = w[name.replace("vision_model.", "")].grad
        if parameter.grad is None:
            without.add(name)
            assert theirs is None or not theirs.any(), name
        else:
            # A gradient that vanishes (a key's bias shifts every score alike) is rounding noise in float32.
            assert (parameter.grad - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-5, name
    # Of the language model's last layer only keys and values are read.
    assert without and all(name.startswith(("language_model.layers.2.", "language_model.norm.")) for name in without)
