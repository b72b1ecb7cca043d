"""benchmarks/cost_model.py: what it counts is what the policy computes and keeps."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import cost_model
import cost_paper

sys.path.pop(0)

from pi_stepnft import policies
from pi_stepnft.policies import gemma


@pytest.mark.parametrize("kind", policies.checkpoint.TYPES)
def test_flops_are_those_that_torch_counts(kind):
    Policy, Config = policies.checkpoint.TYPES[kind]
    c = Config.tiny(num_cameras=2, horizon=6)
    policy = Policy(c).eval()
    images, mask = torch.zeros(1, 2, 3, c.image_size, c.image_size), torch.ones(1, 2, dtype=torch.bool)
    tokens = torch.ones(1, c.max_token_len, dtype=torch.int64)
    counted = []
    one_product = mock.patch.object(gemma, "ONEDNN", False)  # the counter knows neither oneDNN nor fused attention
    with one_product, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            prefix = policy.encode_prefix(images, mask, tokens, tokens.bool())
        counted.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            policy.velocity(prefix, torch.zeros(1, c.state_dim), torch.zeros(1, 6, c.action_dim), torch.ones(1))
        counted.append(counter.get_total_flops())
    assert cost_paper.flops(c, 2, 6) == tuple(counted)


def test_a_line_through_batch_sizes():
    found = {f"pass {size}": 0.5 + 0.1 * size for size in (2, 4, 8)} | {"prefix 2": 7.0}
    assert cost_model.line(found, "pass") == pytest.approx((0.5, 0.1))


@pytest.mark.parametrize("train", ["expert", "all"])
def test_more_gpus_and_what_waits_for_the_update(train):
    environment = dict(reset=0.1, step=0.01)
    one, eight, many = (cost_paper.on_paper("libero", name, train, environment) for name in cost_paper.HARDWARE)
    assert one["iteration_s"] > eight["iteration_s"] > many["iteration_s"]
    assert one["prefix_bytes"] == 64 * 8 * 240 // 5 * cost_paper.read("memory")["full_size"][0]["prefix_per_sample"]
    assert eight["prefix_bytes"] == one["prefix_bytes"] / 8
    assert (one["prefix_cache"], eight["prefix_cache"]) == ("off", "device" if train == "expert" else "off")
    assert (one["held_bytes"] > eight["held_bytes"]) == (train == "all")  # --fsdp
