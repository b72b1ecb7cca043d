"""Facts about the policies: masks, caching, checkpoints, and the processor."""

import copy
import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch

from pi_stepnft import policies
from pi_stepnft.policies import CheckpointError, NormStats, Pi0, Pi0Config, Prefix, Processor, Tokenizer, gemma
from pi_stepnft.policies.checkpoint import published_name
from pi_stepnft.policies.gemma import rotary, rotate
from pi_stepnft.policies.processor import resize_with_padding

SMALL = dict(
    image_size=24, patch_size=12, num_cameras=2, vision_width=16, vision_depth=2, vision_mlp=24, vision_heads=2,
    vlm_width=24, vlm_depth=3, vlm_mlp=40, expert_width=16, expert_mlp=32, heads=4, kv_heads=1, head_dim=8,
    vocab_size=768, max_token_len=6, state_dim=5, action_dim=4, horizon=3,
)


def make_policy(seed: int = 0, **overrides) -> Pi0:
    """A small policy with weights, norms included, far from their initial values."""
    torch.manual_seed(seed)
    policy = Pi0(Pi0Config(**{**SMALL, **overrides}))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return policy.eval()


def make_inputs(policy: Pi0, batch: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random inputs; the second observation lacks a camera, and texts have different lengths."""
    c, g = policy.config, torch.Generator().manual_seed(seed)
    image_mask = torch.ones(batch, c.num_cameras, dtype=torch.bool)
    if c.num_cameras > 1:
        image_mask[1, 1] = False
    images = torch.rand(batch, c.num_cameras, 3, c.image_size, c.image_size, generator=g) * 2 - 1
    lengths = torch.arange(batch) % 3 + c.max_token_len - 2
    token_mask = torch.arange(c.max_token_len) < lengths[:, None]
    tokens = torch.randint(3, c.vocab_size, (batch, c.max_token_len), generator=g) * token_mask
    return dict(
        images=torch.where(image_mask[..., None, None, None], images, -1.0),
        image_mask=image_mask,
        tokens=tokens,
        token_mask=token_mask,
        state=torch.randn(batch, c.state_dim, generator=g),
        x_t=torch.randn(batch, c.horizon, c.action_dim, generator=g),
        t=torch.rand(batch, generator=g),
    )


def encode(policy: Pi0, inputs: dict) -> Prefix:
    return policy.encode_prefix(*(inputs[k] for k in ("images", "image_mask", "tokens", "token_mask")))


def velocity(policy: Pi0, inputs: dict) -> torch.Tensor:
    return policy.velocity(encode(policy, inputs), inputs["state"], inputs["x_t"], inputs["t"])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# -------------------------------------------------------------------- two passes


def joint_velocity(policy: Pi0, inputs: dict) -> torch.Tensor:
    """Velocity by one joint attention over prefix and suffix with an explicit mask, without caching or head folding."""
    c = policy.config
    text = policy.language_model.embed_tokens(inputs["tokens"]) * math.sqrt(c.vlm_width)
    pre = torch.cat((policy.encode_images(inputs["images"]), text), dim=1)
    suf = policy.embed_suffix(inputs["state"], inputs["x_t"], inputs["t"])
    B, P, T = len(pre), pre.shape[1], suf.shape[1]
    cameras = inputs["image_mask"].repeat_interleave(c.tokens_per_image, dim=1)
    valid = torch.cat((cameras, inputs["token_mask"], torch.ones(B, T, dtype=torch.bool)), dim=1)
    group = torch.tensor([0] * P + [1] + [2] * (T - 1))  # a token sees its own group and those before
    mask = (group[None, :] <= group[:, None]) & valid[:, None, :]
    rope = rotary(valid.cumsum(1) - 1, c.head_dim, c.rope_theta, torch.float32)
    for a, b in zip(policy.language_model.layers, policy.expert.layers):
        h = a.input_layernorm(pre), b.input_layernorm(suf)
        q, k, v = (
            torch.cat([getattr(m.self_attn, n)(x).unflatten(-1, (-1, c.head_dim)) for m, x in zip((a, b), h)], dim=1)
            for n in ("q_proj", "k_proj", "v_proj")
        )  # (B, P + T, heads, D)
        k, v = (x.repeat_interleave(c.heads // c.kv_heads, dim=2) for x in (rotate(k, rope), v))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, rope), k) / math.sqrt(c.head_dim)
        weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        pre, suf = pre + a.self_attn.o_proj(out[:, :P]), suf + b.self_attn.o_proj(out[:, P:])
        pre, suf = pre + a.mlp(a.post_attention_layernorm(pre)), suf + b.mlp(b.post_attention_layernorm(suf))
    return policy.action_out_proj(policy.expert.norm(suf[:, 1:]))


@pytest.mark.parametrize("overrides", [{}, {"kv_heads": 2}, {"num_cameras": 0}])
def test_two_passes_equal_one_joint_attention(overrides):
    policy = make_policy(**overrides)
    if not policy.config.num_cameras:
        policy.encode_images = lambda images: torch.zeros(len(images), 0, policy.config.vlm_width)
    inputs = make_inputs(policy)
    with torch.no_grad():
        assert relative_error(velocity(policy, inputs), joint_velocity(policy, inputs)) < 1e-5


def test_gradients_through_the_prefix_equal_those_of_joint_attention():
    policy = make_policy()
    inputs = make_inputs(policy)
    names, parameters = zip(*policy.named_parameters())
    ours, joint = (
        torch.autograd.grad(f(policy, inputs).square().sum(), parameters, allow_unused=True)
        for f in (velocity, joint_velocity)
    )
    unused = [name for name, gradient in zip(names, ours) if gradient is None]
    assert all(n.startswith(("language_model.layers.2.", "language_model.norm.")) for n in unused) and unused
    for name, a, b in zip(names, ours, joint):
        if a is not None:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6, name


# -------------------------------------------------------------------- masks, prefix, time


def test_content_of_padding_does_not_matter():
    policy = make_policy()
    inputs = make_inputs(policy)
    changed = dict(inputs)
    changed["tokens"] = torch.where(inputs["token_mask"], inputs["tokens"], 77)
    absent = ~inputs["image_mask"][..., None, None, None]
    changed["images"] = torch.where(absent, torch.rand_like(inputs["images"]), inputs["images"])
    assert not torch.equal(changed["tokens"], inputs["tokens"]) and not torch.equal(changed["images"], inputs["images"])
    assert torch.equal(velocity(policy, changed), velocity(policy, inputs))


def test_what_no_observation_uses_is_not_computed():
    policy = make_policy()
    inputs = make_inputs(policy)
    whole, rows = encode(policy, inputs), {k: v[1:2] for k, v in inputs.items()}  # lacks a camera, and a text token
    sizes = []
    handles = [
        policy.vision_tower.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0]))),
        policy.language_model.layers[0].register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[1])),
    ]
    alone = encode(policy, rows)
    assert sizes == [1, whole.n_valid[1]] and alone.keys.shape[2] == policy.config.prefix_len
    valid = rows["image_mask"].repeat_interleave(4, dim=1), rows["token_mask"]
    assert torch.equal(alone.mask, torch.cat(valid, dim=1)) and torch.equal(alone.mask, whole.mask[1:2])
    for mine, together in ((alone.keys, whole.keys), (alone.values, whole.values)):
        assert torch.allclose(mine[:, alone.mask], together[:, 1][:, alone.mask[0]], atol=1e-5)
        assert not mine[:, ~alone.mask].any()
    sizes.clear()
    blind = encode(policy, {**rows, "image_mask": torch.zeros(1, 2, dtype=torch.bool)})
    assert sizes == [rows["token_mask"].sum()] and blind.n_valid == rows["token_mask"].sum()
    for handle in handles:
        handle.remove()


def test_state_token_does_not_see_actions_but_actions_see_everything():
    policy = make_policy()
    inputs = make_inputs(policy)
    base = velocity(policy, inputs)
    for key, index in (("state", (0, 0)), ("tokens", (0, 0)), ("x_t", (0, -1, 0)), ("images", (0, 0, 0, 0, 0))):
        changed = {k: v.clone() for k, v in inputs.items()}
        changed[key][index] += 1
        difference = (velocity(policy, changed) - base).abs().amax(dim=2)  # (B, H)
        assert (difference[0] > 0).all() and (difference[1:] == 0).all(), key
    seen = []  # the state token's output of the last layer
    handle = policy.expert.layers[-1].register_forward_hook(lambda m, i, o: seen.append(o[0][:, 0]))
    velocity(policy, inputs)
    velocity(policy, {**inputs, "x_t": inputs["x_t"] + 1})
    handle.remove()
    assert torch.allclose(seen[0], seen[1], atol=1e-6)


def test_observations_that_share_an_instruction_share_its_encoding():
    policy = Pi0(Pi0Config(**{**SMALL, "num_cameras": 0}))
    tokens = torch.randint(1, policy.config.vocab_size, (2, policy.config.max_token_len))[torch.tensor([1, 0, 1, 1])]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1:3, -2:] = False  # the same tokens, differently padded, are another text
    together = policy.encode_prefix(None, None, tokens, mask)
    for i in range(len(tokens)):
        alone = policy.encode_prefix(None, None, tokens[i : i + 1], mask[i : i + 1])
        assert torch.equal(together.mask[i], mask[i])
        assert torch.allclose(together.keys[:, i, mask[i]], alone.keys[:, 0, mask[i]], atol=1e-6)
        assert torch.allclose(together.values[:, i, mask[i]], alone.values[:, 0, mask[i]], atol=1e-6)


def test_points_of_the_flow_that_share_a_prefix_are_as_if_alone():
    policy = make_policy()
    inputs = make_inputs(policy)
    prefix, state = encode(policy, inputs), inputs["state"]
    x_t = torch.randn(len(state), 3, *inputs["x_t"].shape[1:])
    t = torch.rand(len(state), 3)
    together = policy.velocity(prefix, state, x_t, t)
    assert together.shape == x_t.shape
    for i in range(3):
        assert torch.allclose(together[:, i], policy.velocity(prefix, state, x_t[:, i], t[:, i]), atol=1e-5)
    loss = policy.flow_loss(prefix, state, x_t, torch.zeros_like(x_t), t)
    assert torch.allclose(loss[:, 1], policy.flow_loss(prefix, state, x_t[:, 1], torch.zeros_like(x_t[:, 1]), t[:, 1]), atol=1e-5)


def test_prefix_selection_and_cat():
    policy = make_policy()
    inputs = make_inputs(policy)
    prefix, whole = encode(policy, inputs), velocity(policy, inputs)
    for index in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, False, True])):
        rows = {k: v[index] for k, v in inputs.items()}
        part = policy.velocity(prefix[index], rows["state"], rows["x_t"], rows["t"])
        assert len(prefix[index]) == len(part) and torch.allclose(part, whole[index], atol=1e-6)
    assert len(prefix[2]) == 1 and torch.equal(prefix[-1].keys, prefix.keys[:, -1:])
    joined = Prefix.cat([prefix[:1], prefix[1:]])
    assert all(torch.equal(getattr(joined, f.name), getattr(prefix, f.name)) for f in dataclasses.fields(Prefix))
    assert prefix.keys.requires_grad and not prefix.detach().keys.requires_grad
    assert prefix.to(dtype=torch.float16).values.dtype == torch.float16


def test_sample_takes_euler_steps_from_noise_to_action():
    policy = make_policy()
    inputs = make_inputs(policy)
    prefix, state, x = encode(policy, inputs), inputs["state"], inputs["x_t"]
    expected = x
    for t in (1.0, 2 / 3, 1 / 3):
        expected = expected - policy.velocity(prefix, state, expected, torch.full((4,), t)) / 3
    sampled = policy.sample(prefix, state, x, num_steps=3)
    assert torch.allclose(sampled, expected, atol=1e-5) and not sampled.requires_grad
    default = policy.sample(prefix, state, x)
    assert torch.equal(default, policy.sample(prefix, state, x, num_steps=policy.config.num_steps))
    with pytest.raises(ValueError, match="num_steps"):
        policy.sample(prefix, state, x, num_steps=0)


def test_flow_loss_is_the_squared_velocity_error_and_draws_times_in_range():
    policy = make_policy()
    inputs = make_inputs(policy)
    prefix, state, noise, t = encode(policy, inputs), inputs["state"], inputs["x_t"], inputs["t"]
    actions = torch.randn_like(noise)
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    expected = (policy.velocity(prefix, state, x_t, t) - (noise - actions)) ** 2
    assert torch.allclose(policy.flow_loss(prefix, state, actions, noise, t), expected)
    assert policy.flow_loss(prefix, state, actions).shape == actions.shape
    times = policies.pi0.sample_time(200_000)
    assert times.min() >= 0.001 and times.max() <= 1.0
    assert times.mean().item() == pytest.approx(0.6 * 0.999 + 0.001, abs=2e-3)  # Beta(1.5, 1) has mean 0.6


# -------------------------------------------------------------------- training and precision


def test_frozen_vlm_gets_no_gradient_and_stays_in_eval_mode():
    policy = make_policy().freeze_vlm().train()
    inputs = make_inputs(policy)
    prefix = encode(policy, inputs)
    assert not prefix.keys.requires_grad
    policy.flow_loss(prefix, inputs["state"], inputs["x_t"]).mean().backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None}
    vlm = ("vision_tower.", "multi_modal_projector.", "language_model.")
    assert with_gradient == {name for name, _ in policy.named_parameters() if not name.startswith(vlm)}
    assert {id(p) for p in policy.expert_parameters()} == {id(p) for p in policy.parameters() if p.requires_grad}
    assert policy.expert.training and not any(m.training for m in policy.vlm_modules())


def test_small_policy_learns_to_overfit():
    torch.manual_seed(0)
    policy = Pi0(Pi0Config(**SMALL))
    inputs = make_inputs(policy)
    actions, optimizer = torch.randn_like(inputs["x_t"]), torch.optim.Adam(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = policy.flow_loss(encode(policy, inputs), inputs["state"], actions[:, None].expand(-1, 8, -1, -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_cast_keeps_sensitive_parts_in_float32_and_the_velocity_close():
    policy = make_policy()
    inputs = make_inputs(policy)
    exact = velocity(policy, inputs)
    half = copy.deepcopy(policy).cast(torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {"state_proj.weight", "action_out_proj.bias", "expert.norm.weight"} <= kept
    assert {n.split(".")[-2] for n in kept if "vision_tower" in n} == {"patch_embedding", "position_embedding"}
    assert half.expert.layers[0].mlp.up_proj.weight.dtype == encode(half, inputs).keys.dtype == torch.bfloat16
    v = velocity(half, inputs)
    assert v.dtype == torch.float32 and (v - exact).norm() < 0.05 * exact.norm()
    # A cached bfloat16 prefix serves a float32 expert.
    half.expert.float()
    assert velocity(half, inputs).dtype == torch.float32


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("shape", [(64,), (300, 64), (4, 70, 64), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_onednn_agrees_with_double_precision(monkeypatch, shape, bias):
    monkeypatch.setattr(gemma, "ONEDNN", True)
    torch.manual_seed(0)
    layer, x = gemma.Linear(64, 96, bias=bias), torch.randn(shape, requires_grad=True)
    exact, x_exact = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    strided = torch.randn(96, *shape[:-1]).movedim(0, -1)  # a gradient that is not contiguous
    for gradient in (strided, torch.ones(1).expand(strided.shape)):
        for inputs, module in ((x, layer), (x_exact, exact)):
            module(inputs).backward(gradient.to(inputs.dtype))
        for ours, reference in zip((layer(x), x.grad, *(p.grad for p in layer.parameters())),
                                   (exact(x_exact), x_exact.grad, *(p.grad for p in exact.parameters()))):
            assert ours.shape == reference.shape and torch.allclose(ours.double(), reference, rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(layer(x).double(), exact(x_exact), rtol=1e-5, atol=1e-5)


def test_velocity_traces_without_graph_breaks():
    policy = make_policy()
    inputs = make_inputs(policy)
    prefix = encode(policy, inputs).detach()
    compiled = torch.compile(policy.velocity, fullgraph=True, backend="eager")
    args = (prefix, inputs["state"], inputs["x_t"], inputs["t"])
    assert torch.allclose(compiled(*args), policy.velocity(*args), atol=1e-6)


# -------------------------------------------------------------------- configuration


def test_published_and_tiny_sizes():
    with torch.device("meta"):
        sizes = {c: sum(p.numel() for p in Pi0(c).parameters()) for c in (Pi0Config.pi0(), Pi0Config.tiny())}
    published, tiny = sizes.values()
    assert published == pytest.approx(3.238e9, rel=1e-3) and 1e6 < tiny < 2e6
    assert Pi0Config.tiny().vocab_size >= len(Tokenizer())
    assert Pi0Config.tiny().tokens_per_image == 64 and Pi0Config.pi0().prefix_len == 3 * 256 + 48
    assert Pi0Config.from_dict(json.loads(json.dumps(Pi0Config.tiny().to_dict()))) == Pi0Config.tiny()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"horzion": 8}, "unknown policy option horzion"),
        ({"horizon": -1}, "horizon is -1"),
        ({"horizon": 8.0}, "horizon is 8.0"),
        ({"num_cameras": -1}, "num_cameras is -1"),
        ({"image_size": 100}, "image_size is 100; expected a multiple of patch_size 12"),
        ({"heads": 4, "kv_heads": 3}, "heads is 4; expected a multiple of kv_heads 3"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"min_period": 0.0}, "min_period is 0.0"),
    ],
)
def test_impossible_configurations_are_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        Pi0Config.tiny(**values)
    assert "\n" not in str(caught.value)


def test_images_of_another_shape_are_refused():
    policy = make_policy()
    inputs = make_inputs(policy)
    for images in (inputs["images"][:, :1], inputs["images"][..., :12], None):
        with pytest.raises(ValueError, match="images: got"):
            encode(policy, {**inputs, "images": images})


# -------------------------------------------------------------------- processor


def make_processor(config: Pi0Config, state_dim: int = 3, action_dim: int = 2) -> Processor:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(2, 3, (50, state_dim)), rng.normal(-1, 2, (10, 5, action_dim))
    return Processor(config, Tokenizer(), NormStats.from_data(states), NormStats.from_data(actions))


def test_normalisation_round_trip_and_padding():
    processor = make_processor(Pi0Config(**SMALL))
    actions = np.random.default_rng(1).normal(-1, 2, (4, 3, 2)).astype(np.float32)
    normalised = processor.normalize_actions(actions)
    assert normalised.shape == (4, 3, 4) and (normalised[..., 2:] == 0).all()
    assert abs(normalised[..., :2].mean()) < 0.6 and 0.5 < normalised[..., :2].std() < 1.5
    back = processor.unnormalize_actions(normalised)
    assert isinstance(back, torch.Tensor) and np.allclose(back, actions, atol=1e-5)
    as_numpy = processor.unnormalize_actions(normalised.numpy())
    assert (
        isinstance(as_numpy, np.ndarray) and as_numpy.shape == (4, 3, 2) and np.allclose(as_numpy, actions, atol=1e-5)
    )
    state = processor.normalize_state(np.ones((4, 3)))
    stats = processor.state_stats
    assert np.allclose(state[0, :3], (1 - stats.mean) / (stats.std + 1e-6)) and (state[:, 3:] == 0).all()
    with pytest.raises(ValueError, match="state has 4 dimensions; expected 3"):
        processor.normalize_state(np.ones((1, 4)))


def test_constant_dimensions_do_not_blow_up():
    data = np.stack((np.full(100, 0.5), np.linspace(-1, 1, 100)), axis=1)
    stats = NormStats.from_data(data, min_std=0.1)
    assert np.allclose(stats.std, [0.1, data[:, 1].std()]) and np.allclose(stats.mean, [0.5, 0], atol=1e-6)
    assert np.allclose((stats.q01, stats.q99), [[0.4, -0.98], [0.6, 0.98]])  # as far apart as two deviations at least
    with pytest.raises(ValueError, match="at least one vector"):
        NormStats.from_data(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="NaN"):
        NormStats.from_data(np.array([[np.nan]]))


def test_dimensions_beyond_the_policy_are_refused():
    config = Pi0Config(**SMALL)
    with pytest.raises(ValueError, match="state has 6 dimensions, the policy takes 5"):
        make_processor(config, state_dim=6)
    with pytest.raises(ValueError, match="action has 5 dimensions, the policy takes 4"):
        make_processor(config, action_dim=5)
    with pytest.raises(ValueError, match="raise vocab_size"):
        make_processor(Pi0Config(**{**SMALL, "vocab_size": 100}))


def test_images_are_scaled_and_missing_cameras_masked():
    processor = make_processor(Pi0Config(**SMALL))
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 24, 24, 3), dtype=np.uint8)
    obs = {"image": frames, "state": np.zeros((2, 3), np.float32)}
    images, image_mask, tokens, token_mask, state = processor(obs, ["pick the cube", "lift"])
    assert images.shape == (2, 2, 3, 24, 24) and tokens.shape == token_mask.shape == (2, 6) and state.shape == (2, 5)
    assert np.allclose(images[:, 0].permute(0, 2, 3, 1), frames[:, 0] / 255 * 2 - 1, atol=1e-6)
    assert (images[:, 1] == -1).all() and image_mask.tolist() == [[True, False]] * 2
    with pytest.raises(ValueError, match="one each"):
        processor(obs, ["pick the cube"])
    for wrong in (frames.repeat(3, axis=1), frames.astype(np.float32), frames[:1]):
        with pytest.raises(ValueError, match="images are"):
            processor({**obs, "image": wrong}, ["a", "b"])


def test_resize_keeps_the_aspect_and_centres_on_black():
    wide = torch.full((1, 3, 20, 40), 200, dtype=torch.uint8)
    out = resize_with_padding(wide, 24)
    assert out.shape == (1, 3, 24, 24) and out.dtype == torch.uint8
    assert (out[:, :, 6:18] == 200).all() and (out[:, :, :6] == 0).all() and (out[:, :, 18:] == 0).all()
    tall = resize_with_padding(wide.transpose(2, 3), 24)
    assert torch.equal(tall, out.transpose(2, 3))
    assert resize_with_padding(wide[..., :20], 20).data_ptr() == wide.data_ptr()


def test_resize_agrees_with_pil():
    Image = pytest.importorskip("PIL.Image")
    frame = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    ours = resize_with_padding(torch.from_numpy(frame).permute(2, 0, 1)[None], 24)[0].permute(1, 2, 0)
    theirs = np.asarray(Image.fromarray(frame).resize((24, 24), Image.Resampling.BILINEAR))
    assert np.abs(ours.numpy().astype(int) - theirs.astype(int)).max() <= 1


def test_prompt_is_bos_text_newline_padded_with_zeros():
    tokenizer, processor = Tokenizer(), make_processor(Pi0Config.tiny())
    ids = tokenizer.encode("pick the cube")
    assert ids[0] == 2 and len(ids) == 5 and tokenizer.encode("  pick_the\ncube ") == ids
    assert tokenizer.encode("") == [2, ids[-1]]
    tokens, mask = processor.tokenize(["pick the cube", "Grasp a red cube and move it to a target goal position."])
    assert tokens.dtype == torch.int64 and tokens[0].tolist() == ids + [0] * 11 and mask.sum(dim=1).tolist() == [5, 16]
    assert max(tokenizer.encode("Ünïcode 机器人")) < len(tokenizer) <= 768  # bytes, not unknowns
    assert 3 not in tokenizer.encode("Ünïcode 机器人")


def test_long_instruction_is_cut_with_one_warning():
    processor = make_processor(Pi0Config(**SMALL))
    with pytest.warns(UserWarning, match="cut to max_token_len 6"):
        tokens, mask = processor.tokenize(["pick up the red cube and put it on the plate"])
    assert mask.all() and tokens[0, 0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.tokenize(["put the plate on the table and push the cube to the goal"])


def test_missing_tokenizer_is_named(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"nonsense")
    for name in ("absent.model", "broken.model"):
        with pytest.raises(ValueError, match=name):
            Tokenizer(tmp_path / name)


def test_state_mode_has_no_vision_tower_and_acts_on_the_state():
    policy = make_policy(num_cameras=0)
    policy.processor = make_processor(policy.config)
    assert not any("vision" in name or "projector" in name for name in policy.state_dict())
    obs = {"state": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)}
    images, image_mask, tokens, token_mask, state = policy.processor(obs, ["push", "push"])
    assert images.shape == (2, 0, 3, 24, 24) and image_mask.shape == (2, 0)
    prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
    assert torch.equal(prefix.keys, policy.encode_prefix(None, None, tokens, token_mask).keys)
    noise = torch.randn(1, 3, 4).expand(2, 3, 4)
    actions = policy.sample(prefix, state, noise)
    assert actions.shape == (2, 3, 4) and not torch.allclose(actions[0], actions[1])


# -------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    policy = make_policy()
    policy.processor, policy.meta = make_processor(policy.config), {"env_id": "PickCube-v1", "sft": {"demos": 32}}
    policies.save(policy, tmp_path / "ckpt")
    return policy, tmp_path / "ckpt"


def act(policy: Pi0) -> torch.Tensor:
    inputs = make_inputs(policy)
    actions = policy.sample(encode(policy, inputs), inputs["state"], inputs["x_t"])
    return policy.processor.unnormalize_actions(actions)


def edit_config(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saved_and_loaded_policy_acts_identically(saved):
    policy, folder = saved
    loaded = policies.load(folder)
    assert torch.equal(act(loaded), act(policy)) and loaded.meta == policy.meta and not loaded.training
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.model"]
    assert loaded.processor.tokenizer.path == folder / "tokenizer.model"
    assert loaded.processor.tokenizer.encode("pick the cube") == policy.processor.tokenizer.encode("pick the cube")


def test_tensors_carry_published_names(saved):
    from safetensors import safe_open

    with safe_open(saved[1] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    paligemma = "paligemma_with_expert.paligemma."
    assert {
        f"{paligemma}lm_head.weight",
        f"{paligemma}model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        f"{paligemma}model.multi_modal_projector.linear.bias",
        f"{paligemma}model.language_model.layers.2.self_attn.o_proj.weight",
        f"{paligemma}model.language_model.norm.weight",
        "paligemma_with_expert.gemma_expert.model.layers.0.mlp.down_proj.weight",
        "paligemma_with_expert.gemma_expert.model.norm.weight",
        "action_time_mlp_in.weight",
    } <= names
    older_release = "vision_tower.vision_model.post_layernorm.weight"
    assert published_name(older_release) == published_name("vision_tower.post_layernorm.weight")


def test_half_precision_files_are_smaller_and_close(saved):
    policy, folder = saved
    policies.save(policy, folder.parent / "half", dtype="float16")
    size = (folder / "model.safetensors").stat().st_size
    assert (folder.parent / "half" / "model.safetensors").stat().st_size < 0.7 * size
    loaded = policies.load(folder.parent / "half")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert (act(loaded) - act(policy)).norm() < 0.02 * act(policy).norm()
    assert policies.load(folder, dtype=torch.bfloat16).expert.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "no config.json of policies.save"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model cannot be read: it is not there"),
        (lambda f: (f / "config.json").write_text('{"format_version": 1,'), "not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
        (lambda f: edit_config(f, lambda c: c.update(format_version=99)), "format_version 99"),
        (lambda f: edit_config(f, lambda c: c["model"].update(colour=1)), "unknown policy option colour"),
        (lambda f: edit_config(f, lambda c: c["model"].update(horizon=0)), "horizon is 0"),
        (lambda f: edit_config(f, lambda c: c["processor"].pop("state")), "config.json: lacks the entry processor.state"),
        (lambda f: edit_config(f, lambda c: c["processor"]["state"].update(std=[1.0])), "normalisation std has shape"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            "not a complete safetensors file",
        ),
        (
            lambda f: edit_weights(f, lambda t: t["state_proj.bias"].fill_(float("nan"))),
            "NaN or infinite values in state_proj.bias",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(saved, damage, message):
    damage(saved[1])
    with pytest.raises(CheckpointError, match=message) as caught:
        policies.load(saved[1])
    assert "\n" not in str(caught.value)


def test_every_wrong_tensor_is_named(saved):
    def change(tensors):
        del tensors["state_proj.bias"], tensors["action_in_proj.bias"]
        tensors["surprise"] = torch.zeros(1)
        tensors["action_out_proj.bias"] = torch.zeros(9)

    edit_weights(saved[1], change)
    with pytest.raises(CheckpointError) as caught:
        policies.load(saved[1])
    message = str(caught.value)
    assert "2 missing: action_in_proj.bias, state_proj.bias" in message and "1 unexpected: surprise" in message
    assert "1 mis-shaped: action_out_proj.bias (9,) instead of (4,)" in message
    edit_weights(saved[1], lambda tensors: [tensors.pop(n) for n in list(tensors) if "gemma_expert" in n])
    with pytest.raises(CheckpointError, match=r"30 missing: .*gemma_expert.model.layers.\{0,1,2\}.mlp.up_proj.weight"):
        policies.load(saved[1])


def test_unknown_name_lists_the_bundled_ones(tmp_path, monkeypatch, saved):
    monkeypatch.setattr(policies.checkpoint, "BUNDLED", saved[1].parent)
    assert policies.bundled() == ["ckpt"] and torch.equal(act(policies.load("ckpt")), act(saved[0]))
    with pytest.raises(CheckpointError, match="'nowhere' is neither a folder nor a bundled name; .* one of: ckpt"):
        policies.load("nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        policies.load(saved[1] / "model.safetensors")


def test_failed_save_leaves_the_older_checkpoint_as_it_was(saved, monkeypatch):
    policy, folder = saved
    (folder / "events.log").write_text("kept")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    changed = make_policy(seed=5)
    changed.processor, changed.meta = policy.processor, {"env_id": "other"}
    with monkeypatch.context() as patch:
        patch.setattr(policies.checkpoint, "save_file", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            policies.save(changed, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    policies.save(changed, folder)
    assert torch.equal(act(policies.load(folder)), act(changed)) and (folder / "events.log").read_text() == "kept"


def test_what_cannot_be_used_is_not_saved(tmp_path):
    policy = make_policy()
    with pytest.raises(CheckpointError, match="no processor"):
        policies.save(policy, tmp_path)
    policy.processor = make_processor(policy.config)
    with pytest.raises(CheckpointError, match="dtype is 'int8'"):
        policies.save(policy, tmp_path, dtype="int8")
    policy.meta = {"success": float("nan")}
    with pytest.raises(CheckpointError, match="policy.meta"):
        policies.save(policy, tmp_path)
    policy.meta = {}
    with torch.no_grad():
        policy.state_proj.bias[0] = 1e6
    with pytest.raises(CheckpointError, match="NaN or infinite values in state_proj.bias"):
        policies.save(policy, tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_act_goes_from_observations_to_actions_in_the_environments_units():
    policy = make_policy()
    policy.processor = make_processor(policy.config)
    rng = np.random.default_rng(0)
    obs = {"image": rng.integers(0, 256, (2, 2, 24, 24, 3), dtype=np.uint8), "state": np.zeros((2, 3), np.float32)}
    noise = torch.randn(2, 3, 4)
    actions = policy.act(obs, ["push", "lift"], num_steps=2, noise=noise)
    *inputs, state = policy.processor(obs, ["push", "lift"])
    expected = policy.sample(policy.encode_prefix(*inputs), state, noise, num_steps=2)
    assert actions.shape == (2, 3, 2) and np.allclose(actions, policy.processor.unnormalize_actions(expected))


@pytest.mark.parametrize("change, instructions, message", [
    (dict(image=None), ["push"], 'must be a dict with "state" and "image", got \'state\''),
    (dict(state=None), ["push"], 'must be a dict with "state" and "image", got \'image\''),
    (dict(state=np.zeros(3)), ["push"], "state must be"),
    ({}, "push", "a list of B texts"),
    ({}, "p", "a list of B texts"),
])
def test_act_does_not_go_blind_or_by_a_letter(change, instructions, message):
    policy = make_policy()
    policy.processor = make_processor(policy.config)
    obs = dict(image=np.zeros((1, 2, 24, 24, 3), np.uint8), state=np.zeros((1, 3), np.float32))
    given = {name: value for name, value in (obs | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        policy.act(given, instructions)
    with pytest.raises(ValueError, match="got ndarray"):
        policy.act(obs["state"], ["push"])


def test_a_precision_by_its_name_is_refused():
    with pytest.raises(CheckpointError, match="dtype is 'bfloat16'; expected one of torch's"):
        policies.load(policies.bundled()[0], "cpu", "bfloat16")


def test_a_policy_that_has_moved_takes_its_tokenizer_along_or_another(saved):
    policy, folder = saved
    (folder / "tokenizer.model").rename(folder.parent / "away.model")
    for name in ("../away.model", str(folder.parent / "away.model")):
        edit_config(folder, lambda c, name=name: c["processor"].update(tokenizer=name))
        with pytest.raises(CheckpointError, match="away.model', outside its folder; copy that file into the folder"):
            policies.load(folder)
        assert torch.equal(act(policies.load(folder, tokenizer=folder.parent / "away.model")), act(policy))
    (folder / "linked.model").symlink_to(folder.parent / "away.model")  # a link is the user's own, as all are in the hub's cache
    edit_config(folder, lambda c: c["processor"].update(tokenizer="linked.model"))
    assert torch.equal(act(policies.load(folder)), act(policy))
