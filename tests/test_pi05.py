"""Facts about π0.5: adaRMS, gates, the suffix without a state token, training, precision, configuration, checkpoints.

That its two passes equal one joint attention is tested in test_parity.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from test_policies import SMALL, encode, make_inputs, make_processor, velocity

from pi_stepnft import policies
from pi_stepnft.policies import CheckpointError, Pi0, Pi0Config, Pi05, Pi05Config, Tokenizer
from pi_stepnft.policies.gemma import AdaptiveBlock, AdaRMSNorm, Block, additive_mask, rotary


def fresh(seed: int = 0, **overrides) -> Pi05:
    torch.manual_seed(seed)
    return Pi05(Pi05Config(**{**SMALL, **overrides})).eval()


def random_policy(seed: int = 0, **overrides) -> Pi05:
    """A small policy with weights, those of its norms included, far from their initial values."""
    policy = fresh(seed, **overrides)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return policy


# -------------------------------------------------------------------- adaRMS


def test_adarms_is_the_formula():
    norm = AdaRMSNorm(2, 1)
    with torch.no_grad():
        norm.dense.weight.copy_(torch.tensor([[1.0], [2.0], [10.0], [20.0], [5.0], [6.0]]))
        norm.dense.bias.copy_(torch.tensor([0.5, 0.0, 0.0, 1.0, 0.0, 0.0]))
    # x = (3, 4): root mean square sqrt(12.5). cond = 2: scale (2.5, 4), shift (20, 41), gate (10, 12).
    y, gate = norm(torch.tensor([3.0, 4.0]), torch.tensor([2.0]))
    rms = 12.5**0.5
    assert y.tolist() == pytest.approx([3 / rms * 3.5 + 20, 4 / rms * 5 + 41]) and gate.tolist() == [10, 12]
    half, gate = norm(torch.tensor([[[3.0, 4.0]] * 5] * 2, dtype=torch.bfloat16), torch.full((2, 1, 1), 2.0))
    assert half.dtype == gate.dtype == torch.bfloat16 and half.shape == (2, 5, 2) and gate.shape == (2, 1, 2)
    # The sum is rounded once, behind float32 arithmetic.
    assert torch.equal(half[0, 0], y.bfloat16())


def test_a_block_with_open_gates_and_no_modulation_is_a_plain_one():
    torch.manual_seed(0)
    sizes = (8, 12, 2, 1, 4)
    plain, adaptive = Block(*sizes), AdaptiveBlock(*sizes, 6)
    missing, unexpected = adaptive.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 4 and set(unexpected) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    x, past = torch.randn(3, 2, 5, 8), (torch.randn(3, 7, 4), torch.randn(3, 7, 4))
    rope = rotary(torch.arange(7, 17).expand(3, 10), 4, 1e4, torch.float32)
    mask = additive_mask(torch.ones(1, 1, 1, 17, dtype=torch.bool), torch.float32)
    cond = torch.randn(3, 2, 1, 6)
    assert torch.equal(adaptive(x, rope, mask, past, cond), x)  # zero-initialised: every branch is closed
    with torch.no_grad():
        for norm in (adaptive.input_layernorm, adaptive.post_attention_layernorm):
            norm.dense.bias[16:] = 1.0
    expected, _, _ = plain(x.flatten(1, 2), rope, mask, past)
    assert torch.allclose(adaptive(x, rope, mask, past, cond), expected.view_as(x), atol=1e-6)


def test_untrained_expert_passes_actions_on_and_its_gates_learn_first():
    policy = fresh()
    dense = {name: p for name, p in policy.named_parameters() if ".dense." in name}
    assert len(dense) == 2 * (2 * 3 + 1) and not any(p.any() for p in dense.values())
    assert not any(name.startswith("expert") and "norm.weight" in name for name in policy.state_dict())
    inputs = make_inputs(policy)
    v = velocity(policy, inputs)
    assert torch.equal(v, velocity(policy, {**inputs, "tokens": inputs["tokens"].roll(1, 0), "t": 1 - inputs["t"]}))
    action = policy.action_in_proj(inputs["x_t"])
    expected = policy.action_out_proj(action / (action.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.allclose(v, expected, atol=1e-6)
    v.square().sum().backward()
    gate = policy.expert.layers[0].input_layernorm.dense.weight.grad[-policy.config.expert_width :]
    assert gate.any() and not policy.expert.layers[0].self_attn.o_proj.weight.grad.any()


def test_final_norm_ignores_its_gate():
    policy = random_policy()
    inputs, width = make_inputs(policy), policy.config.expert_width
    before = velocity(policy, inputs)
    with torch.no_grad():
        policy.expert.norm.dense.bias[2 * width :] += 1
        assert torch.equal(velocity(policy, inputs), before)
        for part in range(2):  # scale, shift
            policy.expert.norm.dense.bias[part * width] += 1
            assert not torch.allclose(velocity(policy, inputs), before)


# -------------------------------------------------------------------- suffix


def test_state_is_not_read():
    policy = random_policy()
    inputs = make_inputs(policy)
    base = velocity(policy, inputs)
    assert torch.equal(velocity(policy, {**inputs, "state": None}), base)
    assert torch.equal(velocity(policy, {**inputs, "state": inputs["state"] + 1}), base)
    assert policy.sample(encode(policy, inputs), None, num_steps=1).shape == inputs["x_t"].shape
    assert not any("state_proj" in name for name in policy.state_dict())


def test_actions_see_all_actions_of_their_chunk_and_the_valid_prefix():
    policy = random_policy()
    inputs = make_inputs(policy)
    base = velocity(policy, inputs)
    for key, index in (("tokens", (0, 0)), ("x_t", (0, -1, 0)), ("x_t", (0, 0, 0)), ("images", (0, 0, 0, 0, 0)), ("t", (0,))):
        changed = {k: v.clone() for k, v in inputs.items()}
        changed[key][index] += 1
        difference = (velocity(policy, changed) - base).abs().amax(dim=2)  # (B, H)
        assert (difference[0] > 0).all() and (difference[1:] == 0).all(), key
    padding = {**inputs, "tokens": torch.where(inputs["token_mask"], inputs["tokens"], 77)}
    absent = ~inputs["image_mask"][..., None, None, None]
    padding["images"] = torch.where(absent, torch.rand_like(inputs["images"]), inputs["images"])
    assert torch.equal(velocity(policy, padding), base)


def test_points_of_the_flow_that_share_a_prefix_are_as_if_alone():
    policy = random_policy()
    inputs = make_inputs(policy)
    prefix = encode(policy, inputs)
    x_t = torch.randn(4, 3, *inputs["x_t"].shape[1:])
    t = torch.rand(4, 3)  # a condition of its own for every chunk
    together = policy.velocity(prefix, None, x_t, t)
    target = torch.zeros_like(x_t)
    loss = policy.flow_loss(prefix, None, x_t, target, t)
    features = policy.features(prefix, None, x_t, t)
    assert together.shape == x_t.shape and features.shape == (*x_t.shape[:-1], policy.config.expert_width)
    for i in range(3):
        assert torch.allclose(together[:, i], policy.velocity(prefix, None, x_t[:, i], t[:, i]), atol=1e-5)
        assert torch.allclose(loss[:, i], policy.flow_loss(prefix, None, x_t[:, i], target[:, i], t[:, i]), atol=1e-5)
        assert torch.allclose(features[:, i], policy.features(prefix, None, x_t[:, i], t[:, i]), atol=1e-5)


def test_velocity_traces_without_graph_breaks():
    policy = random_policy()
    inputs = make_inputs(policy)
    args = (encode(policy, inputs).detach(), inputs["state"], inputs["x_t"], inputs["t"])
    compiled = torch.compile(policy.velocity, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*args), policy.velocity(*args), atol=1e-6)


# -------------------------------------------------------------------- training and precision


def test_frozen_vlm_gets_no_gradient_and_stays_in_eval_mode():
    policy = random_policy().freeze_vlm().train()
    inputs = make_inputs(policy)
    prefix = encode(policy, inputs)
    assert not prefix.keys.requires_grad
    policy.flow_loss(prefix, None, inputs["x_t"]).mean().backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in with_gradient} == {
        "expert", "action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out",
    }
    assert with_gradient == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {id(p) for p in policy.expert_parameters()} == {id(p) for p in policy.parameters() if p.requires_grad}
    assert policy.expert.training and not any(m.training for m in policy.vlm_modules())


def test_small_policy_learns_to_tell_observations_apart():
    policy = fresh().train()
    inputs = make_inputs(policy)
    actions, optimizer = torch.randn_like(inputs["x_t"]), torch.optim.Adam(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = policy.flow_loss(encode(policy, inputs), None, actions[:, None].expand(-1, 8, -1, -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("model", [Pi0, Pi05])
def test_cast_keeps_the_islands_exact_and_the_velocity_close(model):
    policy = random_policy() if model is Pi05 else Pi0(Pi0Config(**SMALL)).eval()
    inputs = make_inputs(policy)
    exact, original = velocity(policy, inputs), copy.deepcopy(policy.state_dict())
    half = policy.cast(torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    for name in kept:
        assert torch.equal(half.state_dict()[name], original[name]), name
    norms = {name for name in original if ("expert" in name or "language_model" in name) and "norm" in name}
    projections = {name for name in original if name.startswith(("action_", "time_", "state_"))}
    embeddings = {name for name in original if "patch_embedding" in name or "position_embedding" in name}
    assert kept == norms | projections | embeddings
    v = velocity(half, inputs)
    assert v.dtype == torch.float32 and (v - exact).norm() < 0.05 * exact.norm()
    assert encode(half, inputs).keys.dtype == torch.bfloat16
    back = half.cast(torch.float32)
    assert all(p.dtype == torch.float32 for p in back.parameters())


# -------------------------------------------------------------------- configuration and checkpoints


def test_published_and_tiny_sizes():
    with torch.device("meta"):
        sizes = {c: sum(p.numel() for p in Pi05(c).parameters()) for c in (Pi05Config.pi05(), Pi05Config.tiny())}
    published, tiny = sizes.values()
    assert published == pytest.approx(3.353e9, rel=1e-3) and 1e6 < tiny < 2.5e6
    c = Pi05Config.pi05()
    assert (c.max_token_len, c.horizon, c.discrete_state) == (200, 50, True) and c.prefix_len == 3 * 256 + 200
    assert (Pi05Config.type, Pi05Config.normalization) == ("pi05", "quantile")
    assert (Pi0Config.type, Pi0Config.normalization) == ("pi0", "mean_std")
    assert dataclasses.asdict(Pi05Config.tiny(max_token_len=16)) == {**Pi0Config.tiny().to_dict(), "discrete_state": True}
    assert Pi05Config.from_dict(json.loads(json.dumps(Pi05Config.tiny().to_dict()))) == Pi05Config.tiny()


def test_tiny_prompt_has_room_for_the_largest_state():
    numbers = " ".join(["255"] * 42)
    prompt = f"Task: Grasp a red cube and move it to a target goal position., State: {numbers};\nAction: "
    assert len(Tokenizer().encode(prompt)) <= Pi05Config.tiny().max_token_len


def test_discrete_state_is_true_or_false():
    for value in (1, "off", None):
        with pytest.raises(ValueError, match=f"discrete_state is {value!r}; expected true or false"):
            Pi05Config.tiny(discrete_state=value)
    with pytest.raises(ValueError, match="unknown policy option discrete_state"):
        Pi0Config.tiny(discrete_state=True)


def test_saved_and_loaded_policy_acts_identically(tmp_path):
    policy = random_policy(discrete_state=False)
    policy.processor = make_processor(policy.config)
    policies.save(policy, tmp_path)
    loaded = policies.load(tmp_path)
    assert type(loaded) is Pi05 and loaded.config == policy.config
    obs = {"image": np.full((1, 2, 24, 24, 3), 9, np.uint8), "state": np.ones((1, 3), np.float32)}
    noise = torch.randn(1, policy.config.horizon, policy.config.action_dim)
    a, b = (p.act(obs, ["push"], noise=noise) for p in (policy, loaded))
    assert np.array_equal(a, b)
    config = json.loads((tmp_path / "config.json").read_text())
    config["type"] = "pi0"
    del config["model"]["discrete_state"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing: action_time_mlp_in.bias.*unexpected: .*dense.bias"):
        policies.load(tmp_path)
