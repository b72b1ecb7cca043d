"""Fixtures that the tests of several algorithms share."""

import pytest
import torch

from pi_stepnft import policies


@pytest.fixture(scope="module")
def policy() -> policies.Pi0:
    torch.manual_seed(0)
    policy = policies.Pi0(policies.Pi0Config.tiny(num_cameras=0)).eval()
    torch.nn.init.normal_(policy.action_out_proj.weight, std=0.1)  # velocities of order one
    return policy
