"""docs/notebook/walkthrough.md: what it quotes stands in the algorithm file, its numbers are its script's, and its claims hold."""

import inspect
import math
import re
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import walkthrough as toy
from pi_stepnft.algos import stepnft_pi0 as nft

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebook"
PAGE = (FOLDER / "walkthrough.md").read_text()
TEXT = " ".join(PAGE.split())  # wherever its lines break
QUOTES = re.findall(r"From `(\w+)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
RUNS = re.findall(r"\| `learn\((.*?)\)` \| (\d+)(?: to (\d+))? \|", PAGE)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------------- the page


def test_every_quoted_line_stands_in_the_function_that_is_named():
    assert len(QUOTES) == PAGE.count("```python") >= 6
    for function, quote in QUOTES:
        lines, n = inspect.getsource(getattr(nft, function)).splitlines(), len(quote.splitlines())
        places = [dedent("\n".join(lines[i : i + n])) for i in range(len(lines) - n + 1)]
        assert quote.rstrip("\n") in places, f"{function} no longer reads\n{quote}"


def test_pictures_and_links_exist_and_pictures_are_small():
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    pictures = [target for target in targets if target.endswith(".png")]
    assert len(pictures) == 6 and all((FOLDER / target).is_file() for target in targets)
    assert all((FOLDER / picture).stat().st_size <= 150_000 for picture in pictures)


def test_numbers_of_the_first_picture():
    assert ", ".join(f"{std:.3f}" for std in toy.step_stds()) in TEXT
    n = toy.endpoints()
    ode, sde, fine, loud = (n[f"{name}: distance"] for name in ("ODE, K = 4", "SDE, K = 4", "SDE, K = 32", "SDE, K = 4, noise 0.7"))
    assert f"ODE {ode:.3f}, SDE {sde:.3f}, with K = 32 steps {fine:.3f}" in TEXT and f"the distance is {loud:.3f}" in TEXT
    assert f"success {100 * n['ODE, K = 4: success']:.1f} % and {100 * n['SDE, K = 4: success']:.1f} %" in TEXT
    assert f"RMS distance {n['spread from one noise']:.2f} from its centre" in TEXT
    assert f"{100 * toy.success_rate(toy.Flow()):.0f} % of its actions succeed" in TEXT


def test_numbers_of_the_transition():
    tr = toy.transition()
    assert f"E⁺ = {tr.energy_plus:.2f} and E⁻ = {tr.energy_minus:.2f}" in TEXT
    assert f"{tr.loss[1]:.2f} for y = +1 and {tr.loss[-1]:.2f} for y = −1" in TEXT
    for y in (1, -1):  # the distances drawn are those of the loss
        margin = torch.tensor(0.5 * y * (tr.energy_plus - tr.energy_minus))
        assert tr.loss[y] == pytest.approx(F.softplus(margin).item(), rel=1e-4)


def test_numbers_of_the_targets():
    for step in range(toy.K):
        s = toy.statistics(toy.residuals(step))
        (a, b), (c, d) = s["xnext"], s["x0"]
        assert f"| {step} | {a:.2f} | {c:.2f} | {b:.2f} | {d:.2f} |" in PAGE


@pytest.mark.parametrize(
    "options, low, high",
    [pytest.param(*run, marks=[pytest.mark.slow] if number > 2 else []) for number, run in enumerate(dict.fromkeys(RUNS))],
)
def test_success_of_every_run_on_the_page(options, low, high):
    percent = 100 * eval(f"toy.learn({options})", dict(toy=toy, seed=0)).success[-1]
    assert int(low) - 2 <= percent <= int(high or low) + 2  # other machines round otherwise


def test_all_runs_of_the_page_are_found():
    assert len(RUNS) == PAGE.count("| `learn(") == 17


# -------------------------------------------------------------------------------------------------------------- its claims


def test_the_start_velocity_is_the_expected_noise_minus_action():
    """Nothing that x_t tells is left in the error: E[(noise − action − v)·f(x_t)] = 0 for any f."""
    g = torch.Generator().manual_seed(0)
    n = 200_000
    action = toy.MODES[torch.randint(3, (n,), generator=g)][:, None] + toy.WIDTH * torch.randn(n, 1, 2, generator=g)
    noise = torch.randn(n, 1, 2, generator=g)
    t = torch.full((n,), 0.6)
    x_t = 0.6 * noise + 0.4 * action
    with torch.no_grad():
        v = toy.Flow().velocity(None, None, x_t, t)
    for f in (torch.ones_like(x_t), x_t, x_t.flip(-1), x_t**2, v):
        assert ((noise - action - v) * f).mean((0, 1)).abs().max() < 0.02
    assert ((noise - action - 1.3 * v) * v).mean((0, 1)).abs().max() > 0.04  # a velocity too fast is found out


def test_walking_on_is_the_samplers_path():
    policy = toy.Flow()
    torch.nn.init.normal_(policy.net[-1].weight)
    path = toy.sample(policy, 16, seed=3)
    torch.manual_seed(3)
    start = torch.randn(16, 1, 2)
    torch.testing.assert_close(toy.walk_on(policy, start), path)


def test_at_the_rollout_policy_the_gradient_is_reinforces():
    g = torch.Generator().manual_seed(0)
    x_t, v_old, noise = (torch.randn(32, 1, 2, generator=g) for _ in range(3))
    step, y = torch.arange(32) % toy.K, torch.rand(32, generator=g) * 2 - 1
    kwargs = dict(num_steps=toy.K, noise_level=toy.NOISE)
    mean, std = nft.flow_sde_step(x_t, v_old, step, **kwargs)
    x_next = mean + std * noise
    v = v_old.clone().requires_grad_()
    (ours,) = torch.autograd.grad(nft.stepnft_loss(v, v_old, x_t, x_next, step, y, **kwargs)[0], v)
    mean, std = nft.flow_sde_step(x_t, v, step, **kwargs)
    log_probability = torch.distributions.Normal(mean, (std**2 + 1e-4).sqrt()).log_prob(x_next).sum((1, 2))
    (reinforce,) = torch.autograd.grad(-(y * log_probability).mean(), v)
    torch.testing.assert_close(ours, reinforce)


def test_success_pulls_the_mean_towards_x_next_and_failure_pushes_it_away():
    tr = toy.transition()
    torch.manual_seed(0)
    x_next = tr.mean + tr.std * torch.randn(64, 1, 2)
    for y in (1.0, -1.0):
        push = toy.pushes(tr, x_next, torch.full((64,), y))
        torch.testing.assert_close(F.cosine_similarity(push, y * (x_next - tr.mean)[:, 0]), torch.ones(64), atol=1e-3, rtol=0)


def test_the_loss_is_log_2_at_the_rollout_policy_and_flat_beyond_the_drift_limit():
    tr = toy.transition()
    drifts = torch.tensor([-1.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.0])
    for y in (1.0, -1.0):
        loss = y * toy.loss_along(tr, drifts, y)
        assert loss[3].item() == pytest.approx(y * math.log(2))
        assert (loss[1:6].diff() < 0).all()  # falls with the way towards x_next for success, rises for failure
        assert loss[[0, 6]].numpy() == pytest.approx(loss[[1, 5]].numpy(), abs=1e-3)  # but for the trust region


def test_without_the_mirror_nothing_is_learned(monkeypatch):
    """Exercise 7: both branches become the first."""
    step, branches = nft.flow_sde_step, []

    def without_mirror(x_t, v, i, **kwargs):
        if v.requires_grad:  # called by the loss, twice
            branches.append(v)
            v = branches[(len(branches) - 1) // 2 * 2]
        return step(x_t, v, i, **kwargs)

    monkeypatch.setattr(nft, "flow_sde_step", without_mirror)
    success = toy.learn(0, iterations=4).success
    assert len(branches) == 2 * 4 * 8 and np.ptp(success) < 1e-3


def test_the_script_is_deterministic():
    first, second = toy.learn(3, iterations=3), toy.learn(3, iterations=3)
    assert first.success == second.success and first.drift == second.drift
