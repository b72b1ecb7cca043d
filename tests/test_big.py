"""What fits a 3 B policy on one GPU must not change what is computed: each option as an identity, and the program with them."""

import copy
import json

import numpy as np
import pytest
import torch
from test_main import checkpoints, one_thread, run, same, scalars, train, weights  # noqa: F401 (two are fixtures)
from test_pi05 import random_policy
from test_policies import encode, make_inputs, make_policy, velocity

from pi_stepnft import harness, policies
from pi_stepnft.algos import stepnft_pi0 as nft
from pi_stepnft.policies.lora import LoRALinear

BOTH = pytest.mark.parametrize("make", [make_policy, random_policy], ids=["pi0", "pi05"])


def rounded(policy):
    """The policy with weights that bfloat16 can hold, in float32."""
    return policy.cast(torch.bfloat16).cast(torch.float32)


def gradients(policy, inputs, rows=slice(None), scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Accumulated gradients of a mean over observations, prefix included where the VLM is trained."""
    inputs = {name: value[rows] for name, value in inputs.items()}
    (scale * velocity(policy, inputs).float().square().mean()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_close(one: dict, other: dict, tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    for name in one:
        assert (one[name] - other[name]).abs().max() <= tolerance * max(1.0, other[name].abs().max()), name


def identity_processor(policy):
    c = policy.config
    return policies.Processor(c, policies.Tokenizer(), policies.NormStats.identity(c.state_dim), policies.NormStats.identity(3))


# -------------------------------------------------------------------------------------------------------------- bfloat16


@BOTH
@pytest.mark.parametrize("trained", ["expert", "all"])
def test_float32_masters_compute_what_bfloat16_weights_do(make, trained):
    policy = rounded(make())
    inputs = make_inputs(policy)
    masters, low = copy.deepcopy(policy).cast(torch.bfloat16, trained), policy.cast(torch.bfloat16)
    assert torch.equal(velocity(masters, inputs), velocity(low, inputs))
    kept = masters.expert_parameters() if trained == "expert" else list(masters.parameters())
    assert all(p.dtype == torch.float32 for p in kept)
    assert masters.expert.dtype == torch.bfloat16 and encode(masters, inputs).keys.dtype == torch.bfloat16
    assert (masters.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16) == (trained == "expert")


@BOTH
def test_a_tiny_step_is_not_rounded_away(make):
    """A step of 1e-5 on weights of order one: float32 masters take it, bfloat16 weights (resolution 4e-3) do not."""
    moved = {}
    for trained in (None, "expert"):
        policy = make().cast(torch.bfloat16, trained).freeze_vlm()
        matrices = [layer.mlp.up_proj.weight for layer in policy.expert.layers]
        with torch.no_grad():
            for matrix in matrices:
                matrix.add_(matrix.sign())
        before = [m.detach().clone() for m in matrices]
        optimizer = torch.optim.Adam(policy.expert_parameters(), lr=1e-5)
        gradients(policy, make_inputs(policy))
        optimizer.step()
        moved[trained] = np.mean([(m != b).float().mean().item() for m, b in zip(matrices, before)])
    assert moved["expert"] > 0.9 and moved[None] == 0


def test_loading_keeps_what_will_be_trained_in_float32(tmp_path):
    policy = make_policy()
    policy.processor = identity_processor(policy)
    policies.save(policy, tmp_path)
    loaded = policies.load(tmp_path, dtype=torch.bfloat16, trained="expert")
    exact = dict(policy.named_parameters())
    trained = {id(p) for p in loaded.expert_parameters()}
    for name, p in loaded.named_parameters():
        assert id(p) not in trained or (p.dtype == torch.float32 and torch.equal(p, exact[name])), name
    assert loaded.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for p in loaded.expert_parameters():
        p.data.mul_(1 + 1e-5)
    policies.save(loaded, tmp_path)  # and a second sitting starts where the first one ended
    again = policies.load(tmp_path, dtype=torch.bfloat16, trained="expert")
    assert same(again.state_dict(), loaded.state_dict())


# -------------------------------------------------------------------------------------------------------------- checkpointing


@BOTH
@pytest.mark.parametrize("precision", [dict(dtype=torch.float32), dict(dtype=torch.bfloat16, trained="all")], ids=["f32", "bf16"])
def test_checkpointing_gives_equal_gradients_and_keeps_less(make, precision):
    policy = make().cast(**precision).train()
    inputs = make_inputs(policy)
    found, kept = [], []
    for enabled in (False, True):
        policy.checkpoint_gradients(enabled).zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            loss = velocity(policy, inputs).square().mean()
        of_weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        kept.append(sum(size for at, size in storages.items() if at not in of_weights))
        loss.backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert_close(*found)
    assert kept[1] < 0.4 * kept[0]


# -------------------------------------------------------------------------------------------------------------- LoRA


def trained_lora(policy, rank: int = 4):
    """Adapters that do something."""
    policies.add_lora(policy, rank, alpha=8.0)
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, LoRALinear):
                module.lora_b.normal_(std=0.05)
    return policy


@BOTH
def test_new_adapters_change_nothing_and_only_they_and_the_projections_train(make):
    policy = make()
    inputs = make_inputs(policy)
    before, total = velocity(policy, inputs), sum(p.numel() for p in policy.parameters())
    policies.add_lora(policy, 2, 2.0)
    assert torch.equal(velocity(policy, inputs), before)
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    small = ("state_proj.", "action_in_proj.", "action_out_proj.", "action_time_mlp_in.", "action_time_mlp_out.", "time_mlp_")
    assert {name for name in names if ".lora_" not in name} == {n for n, _ in policy.named_parameters() if n.startswith(small)}
    adapted = {name.rpartition(".")[0] for name in names if ".lora_" in name}
    depth = policy.config.vlm_depth
    assert len(adapted) == 2 * 7 * depth and not any("vision" in name for name in adapted)
    assert sum(p.numel() for n, p in policy.named_parameters() if ".lora_" not in n) == total
    gradients(policy, inputs)
    with_gradient = {name.rpartition(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    never_read = {f"language_model.layers.{depth - 1}.{x}" for x in
                  ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert adapted - with_gradient == never_read


@BOTH
def test_a_saved_lora_policy_is_a_plain_one_that_acts_the_same(make, tmp_path):
    policy = trained_lora(make())
    policy.processor = identity_processor(policy)
    policies.save(policy, tmp_path)
    plain = policies.load(tmp_path)
    inputs = make_inputs(policy)
    assert not any(isinstance(m, LoRALinear) for m in plain.modules())
    torch.testing.assert_close(velocity(plain, inputs), velocity(policy, inputs), rtol=1e-4, atol=1e-5)
    policies.export(policy, tmp_path / "served", asset_id="lab", dtype="bfloat16")
    policies.load(tmp_path / "served")


def test_small_additions_to_bfloat16_weights_survive_saving(tmp_path):
    policy = policies.add_lora(make_policy().cast(torch.bfloat16), 2, 2.0)
    policy.processor = identity_processor(policy)
    layer = policy.expert.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_b.fill_(1e-5)
    policies.save(policy, tmp_path)
    stored = policies.load(tmp_path).expert.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(stored - layer.weight.float(), 1e-5 * layer.lora_a.sum(0).expand_as(stored), rtol=0.05, atol=1e-7)


def test_the_rollout_policy_shares_the_base_and_has_its_own_adapters():
    """As the program copies it: see "rollout_policy = copy.deepcopy" there."""
    policy = policies.add_lora(make_policy())
    other = copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})
    pairs = list(zip(policy.parameters(), other.parameters(), strict=True))
    assert all((a is b) != a.requires_grad and a.requires_grad == b.requires_grad for a, b in pairs)
    with torch.no_grad():
        other.expert.layers[0].mlp.up_proj.lora_b.fill_(1.0)
    inputs = make_inputs(policy)
    assert not torch.equal(velocity(policy, inputs), velocity(other, inputs))


@pytest.mark.parametrize("rank, alpha", [(0, 1.0), (4, 0.0)])
def test_lora_refuses_what_cannot_work(rank, alpha):
    with pytest.raises(ValueError, match="expected a rank of at least 1"):
        policies.add_lora(make_policy(), rank, alpha)


# -------------------------------------------------------------------------------------------------------------- prefixes


@torch.no_grad()
def test_rows_are_those_of_the_joined_batches():
    policy = make_policy()
    inputs = make_inputs(policy, batch=11)
    whole = policies.Inputs(*(inputs[name] for name in ("images", "image_mask", "tokens", "token_mask")))
    prefix = policy.encode_prefix(*whole)
    of_prefixes, of_inputs = harness.Rows("cpu"), harness.Rows("cpu")
    for part in torch.arange(11).split([4, 1, 6]):
        of_prefixes.append(prefix[part])
        of_inputs.append(whole[part])
    for rows in (torch.randperm(11), torch.tensor([10, 0, 0, 4]), torch.tensor([3])):
        one, other = of_prefixes[rows], prefix[rows]
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert torch.equal(one.mask, other.mask) and torch.equal(one.n_valid, other.n_valid)
        assert all(torch.equal(a, b) for a, b in zip(of_inputs[rows], whole[rows]))
        again = policy.encode_prefix(*of_inputs[rows])  # --prefix-cache off
        torch.testing.assert_close(again.keys[:, other.mask], other.keys[:, other.mask], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("train", ["expert", "lora", "all"])
def test_gradients_of_micro_batches_add_up(train):
    """What the program does with --micro-batch 3 of a minibatch of 8, the loss included."""
    policy = make_policy().train()
    if train == "expert":
        policy.freeze_vlm()
    elif train == "lora":
        trained_lora(policy)
    inputs, K, found = make_inputs(policy, batch=8), 4, []
    g = torch.Generator().manual_seed(0)
    x_t, x_next, v_old = torch.randn(3, 8, 2, 3, 4, generator=g)
    step, labels = torch.randint(K, (8, 2), generator=g), torch.rand(8, generator=g) * 2 - 1
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2:] = mask[:, 3:] = False
    for size in (8, 3):
        policy.zero_grad()
        for mb in torch.arange(8).split(size):
            prefix = encode(policy, {name: value[mb] for name, value in inputs.items()})
            v = policy.velocity(prefix, inputs["state"][mb], x_t[mb], 1 - step[mb] / K)
            transitions = (v, v_old[mb], x_t[mb], x_next[mb], step[mb], labels[mb, None].expand(-1, 2))
            loss, _ = nft.stepnft_loss(*(x.flatten(0, 1) for x in transitions), num_steps=K, noise_level=0.7, mask=mask)
            (len(mb) / 8 * loss).backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert_close(*found, tolerance=1e-5)  # pieces leave out other padding, and sum in another order


# -------------------------------------------------------------------------------------------------------------- the rest


@BOTH
def test_the_velocity_compiles_as_a_whole_with_everything_on(make):
    """--compile, without the code generation, which takes minutes: one graph, forward and backward, the same numbers."""
    policy = trained_lora(make().cast(torch.bfloat16)).checkpoint_gradients().train()
    inputs = make_inputs(policy)
    prefix = encode(policy, inputs).detach()
    found = []
    for velocity_of in (policy.velocity, torch.compile(policy.velocity, fullgraph=True, backend="aot_eager")):
        policy.zero_grad()
        velocity_of(prefix, inputs["state"], inputs["x_t"], inputs["t"]).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert_close(*found, tolerance=0.02)  # of bfloat16


def test_memory_is_what_the_process_holds():
    before = harness.memory_gb(torch.device("cpu"))
    block = torch.ones(50_000_000)
    assert 0.15 < harness.memory_gb(torch.device("cpu")) - before < 0.35 and before > 0.05
    del block


# -------------------------------------------------------------------------------------------------------------- the program

BRIEF = (
    "--obs-mode state --num-envs 2 --rollout-epochs 2 --group-size 2 --labels binary --eval-episodes 2 --final-eval-episodes 2 "
    "--update-epochs 1 --num-minibatches 2 --num-threads 1 --no-video --rollout-steps 10"
).split()


@pytest.mark.slow
def test_a_lora_run_in_bfloat16_is_resumed_as_if_never_interrupted(checkpoints, tmp_path):  # noqa: F811
    arguments = [*BRIEF, "--checkpoint", checkpoints["state"], "--train", "lora", "--dtype", "bfloat16", "--lora-rank", 4,
                 "--gradient-checkpointing", "--micro-batch", 3]
    straight = train(tmp_path / "straight", *arguments, "--iterations", 2)
    parts = train(tmp_path / "parts", *arguments, "--iterations", 1)
    first = weights(parts / "policy")
    run("stepnft_pi0", "--resume", parts, "--iterations", 2, cwd=tmp_path / "parts")
    for which in ("policy", "rollout_policy"):
        assert same(weights(parts / which), weights(straight / which))
    assert not same(weights(parts / "policy"), first) and not same(first, weights(parts / "rollout_policy"))
    start = weights(checkpoints["state"])
    for name in ("language_model.layers.0.self_attn.k_proj.weight", "expert.layers.1.mlp.down_proj.weight", "state_proj.weight"):
        assert not torch.equal(first[name], start[name].bfloat16().float())
    assert torch.equal(first["language_model.embed_tokens.weight"], start["language_model.embed_tokens.weight"].bfloat16().float())
    logged = scalars(straight)
    assert all(0.05 < logged[f"charts/memory_{phase}_gb"][2] < 50 for phase in ("rollout", "update"))


def test_where_prefixes_wait_and_how_minibatches_are_cut_does_not_matter(checkpoints, tmp_path):  # noqa: F811
    variants = dict(
        device=[], cpu=["--prefix-cache", "cpu"], off=["--prefix-cache", "off", "--micro-batch", 3, "--gradient-checkpointing"]
    )
    runs = {
        name: train(tmp_path / name, *BRIEF, "--checkpoint", checkpoints["state"], "--iterations", 1, *extra)
        for name, extra in variants.items()
    }
    device, cpu, off = (weights(runs[name] / "policy") for name in ("device", "cpu", "off"))
    assert same(device, cpu)
    assert json.loads((runs["off"] / "args.json").read_text())["micro_batch"] == 3
    for tag in ("losses/loss", "losses/grad_norm", "losses/drift"):  # rankings at θ = θ_old are rounding, and so is their accuracy
        assert scalars(runs["off"])[tag][1] == pytest.approx(scalars(runs["device"])[tag][1], rel=1e-4), tag
