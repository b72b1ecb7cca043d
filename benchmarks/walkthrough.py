"""The pictures and numbers of docs/notebook/walkthrough.md: π-StepNFT on a two-dimensional flow, by the functions of stepnft_pi0.

    python benchmarks/walkthrough.py                  # docs/images/walkthrough_1_paths.png to walkthrough_6_rollout_policy.png
    python -c "from benchmarks.walkthrough import learn; print(learn(beta=5.0).success[-1])"                # an exercise

An action chunk is two numbers, there is no observation, and an episode is one chunk that succeeds within a disc. The start policy
is the exact flow to three Gaussians. What learns is a small network added to its velocity. One thread, about a minute.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from pi_stepnft.algos import stepnft_pi0 as nft

K, NOISE = 4, 0.2  # the authors' solver
MODES = torch.tensor([[0.0, 1.2], [-1.04, -0.6], [1.04, -0.6]])  # the three ways to act that the start policy knows
WIDTH = 0.35  # their standard deviation
GOAL, RADIUS = (1.2, -0.4), 0.5  # actions in this disc succeed

SUCCESS, FAILURE = "#0072B2", "#D55E00"  # colours that stay apart for colour-blind readers (Okabe and Ito)
THETA, OLD, MIRROR = "#009E73", "#444444", "#CC79A7"  # v_θ and its branch, v_old, the mirrored branch
SDE, X0 = "#E69F00", "#7B3294"


@dataclass
class Args:
    out: Path = Path(__file__).resolve().parents[1] / "docs" / "images"
    """folder of the pictures"""
    seed: int = 0
    """seed of everything random; the page shows 0"""


# ------------------------------------------------------------------------------------------------------------- the toy


class Flow(torch.nn.Module):
    """A policy as `flow_sde_sample` takes it: the exact velocity of a flow to three Gaussians, plus a network that starts at 0."""

    config = SimpleNamespace(horizon=1, action_dim=2)

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def velocity(self, prefix, state, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[noise − action | x_t] for x_t = t·noise + (1 − t)·action, plus the network. x_t: (B, 1, 2), t: (B,)."""
        t = t.view(-1, 1, 1)
        variance = t**2 + (1 - t) ** 2 * WIDTH**2  # of x_t, given the mode of its action
        offset = x_t - (1 - t) * MODES  # (B, 3, 2)
        mode = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # (B, 3, 1) probability, given x_t
        exact = (mode * (t / variance * offset - MODES - (1 - t) * WIDTH**2 / variance * offset)).sum(1, keepdim=True)
        return exact + self.net(torch.cat((x_t, t.expand(-1, 1, 1)), -1))


def succeeded(action: torch.Tensor) -> torch.Tensor:
    """(B, 1, 2) -> (B,) bool."""
    return (action[:, 0] - torch.tensor(GOAL)).norm(dim=-1) < RADIUS


def sample(policy: Flow, n: int, *, seed: int, noise_level: float = NOISE, num_steps: int = K) -> torch.Tensor:
    """n whole paths (n, num_steps + 1, 1, 2). The same seed gives the same starting noises; noise level 0 is the ODE."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        noise = draw(n, num_steps)
        return nft.flow_sde_sample(policy, None, torch.zeros(n, 0), noise, num_steps=num_steps, noise_level=noise_level)[0]


def draw(n: int, num_steps: int = K) -> torch.Tensor:
    """What n paths begin at, and what their steps add: (n, num_steps + 1, 1, 2)."""
    return torch.stack([torch.randn(n, 1, 2) for _ in range(num_steps + 1)], 1)


@torch.no_grad()
def walk_on(policy: Flow, x: torch.Tensor, first: int = 0, *, noise_level: float = NOISE, num_steps: int = K) -> torch.Tensor:
    """Go on from states x (B, 1, 2) of solver step `first` as `flow_sde_sample` does: (B, num_steps − first + 1, 1, 2)."""
    path = [x]
    for i in range(first, num_steps):
        step = torch.full((len(x),), i)
        v = policy.velocity(None, None, path[-1], 1 - step / num_steps)
        mean, std = nft.flow_sde_step(path[-1], v, step, num_steps=num_steps, noise_level=noise_level)
        path.append(mean + std * torch.randn_like(mean))
    return torch.stack(path, 1)


def step_stds(num_steps: int = K, noise_level: float = NOISE) -> list[float]:
    """Standard deviation of each solver step."""
    x = torch.zeros(num_steps, 1, 1)
    return nft.flow_sde_step(x, x, torch.arange(num_steps), num_steps=num_steps, noise_level=noise_level)[1].flatten().tolist()


# ------------------------------------------------------------------------------------------------------------- learning


@dataclass
class Run:
    """Success by the ODE before the first and after every iteration; drift and α of every iteration; the policy in the end."""

    success: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    policy: Flow | None = None


def success_rate(policy: Flow) -> float:
    return succeeded(sample(policy, 2000, seed=1, noise_level=0.0)[:, -1]).float().mean().item()


def learn(
    seed: int = 0,
    *,
    iterations: int = 40,
    episodes: int = 512,
    noise_level: float = NOISE,
    transitions: str = "all",
    label_sign: float = 1.0,
    random_labels: bool = False,
    ema_start: float = 0.1,
    ema_end: float = 0.5,
    ema_horizon: int = 10,
    learning_rate: float = 3e-3,
    target: str = "xnext",
    **loss_options,
) -> Run:
    """π-StepNFT on the toy; loss_options go to `stepnft_loss`. random_labels: +1 as often as at the start, whatever happened."""
    torch.manual_seed(seed)
    policy = Flow()
    rollout_policy = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-5)
    kwargs = dict(num_steps=K, noise_level=noise_level)
    run = Run(success=[success_rate(policy)], policy=policy)
    index, zeros = np.arange(episodes), np.zeros(episodes, int)
    for iteration in range(iterations):
        with torch.no_grad():
            nothing = torch.zeros(episodes, 0)
            xs, vs = nft.flow_sde_sample(rollout_policy, None, nothing, draw(episodes), **kwargs)  # (B, K(+1), 1, 2)
        success = succeeded(xs[:, -1])
        if random_labels:
            success = torch.rand(episodes) < run.success[0]
        labels = torch.from_numpy(nft.chunk_labels(success.numpy(), zeros, index, zeros, "binary")[0]).float() * label_sign
        drifts = []
        for mb in torch.randperm(episodes).repeat(2).chunk(8):  # two passes, four minibatches each
            row, step = mb.repeat_interleave(K), torch.arange(K).repeat(len(mb))
            if transitions == "random":
                row, step = mb, torch.randint(K, (len(mb),))
            x_t, x_next, v_old = xs[row, step], xs[row, step + 1 if target == "xnext" else -1], vs[row, step]
            v_theta = policy.velocity(None, None, x_t, 1 - step / K)
            loss, metrics = nft.stepnft_loss(
                v_theta, v_old, x_t, x_next, step, labels[row], target=target, granularity="chunk", **kwargs, **loss_options
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            drifts.append(metrics["drift"].item())
        alpha = float(nft.ema_decay(iteration, ema_start, ema_end, ema_horizon))
        nft.update_rollout_policy(rollout_policy.parameters(), policy.parameters(), alpha)
        run.drift.append(float(np.mean(drifts)))
        run.alpha.append(alpha)
        run.success.append(success_rate(policy))
    return run


# ------------------------------------------------------------------------------------------------------------- what is drawn


def endpoints(seed: int = 0) -> dict[str, float]:
    """Share of success and RMS distance to the nearest mode, of 20 000 endpoints by solver; and the spread from a single noise."""
    policy, numbers = Flow(), {}
    for name, num_steps, noise in (("ODE, K = 4", K, 0.0), ("SDE, K = 4", K, NOISE), ("SDE, K = 32", 32, NOISE),
                                   ("SDE, K = 4, noise 0.7", K, 0.7)):
        end = sample(policy, 20_000, seed=seed, num_steps=num_steps, noise_level=noise)[:, -1]
        numbers[f"{name}: success"] = succeeded(end).float().mean().item()
        numbers[f"{name}: distance"] = (end - MODES).norm(dim=-1).amin(1).square().mean().sqrt().item()
    numbers["spread from one noise"] = fan(seed)[0][:, -1, 0].var(0).sum().sqrt().item()
    return numbers


def fan(seed: int = 0, paths: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """SDE paths (paths, K + 1, 1, 2) and the ODE's path (1, K + 1, 1, 2) from one noise."""
    torch.manual_seed(seed)
    start = torch.tensor([[[1.3, 0.5]]])
    return walk_on(Flow(), start.repeat(paths, 1, 1)), walk_on(Flow(), start, noise_level=0.0)


@dataclass
class Residuals:
    """Continuations from states x_t (S, 1, 2) of one solver step: M per state, their misses of both targets, and success."""

    x_t: torch.Tensor
    x0_hat: torch.Tensor  # (S, 1, 2)
    xnext: torch.Tensor  # (S, M, 2) x_next − μ(v_old)
    x0: torch.Tensor  # (S, M, 2) x0 − x0_hat
    success: torch.Tensor  # (S, M) bool


def residuals(step: int, seed: int = 0, states: int = 300, continuations: int = 500) -> Residuals:
    policy = Flow()
    x_t = sample(policy, states, seed=seed)[:, step]
    torch.manual_seed(seed)
    path = walk_on(policy, x_t.repeat_interleave(continuations, 0), step)
    steps = torch.full((states,), step)
    with torch.no_grad():
        v = policy.velocity(None, None, x_t, 1 - steps / K)
    mean, _ = nft.flow_sde_step(x_t, v, steps, num_steps=K, noise_level=NOISE)
    x0_hat = x_t - (1 - step / K) * v
    x_next, x0 = (path[:, i, 0].view(states, continuations, 2) for i in (1, -1))
    return Residuals(x_t, x0_hat, x_next - mean, x0 - x0_hat, succeeded(path[:, -1]).view(states, continuations))


def most_open(r: Residuals) -> int:
    """The state whose success is nearest to 50 %."""
    return int((r.success.float().mean(1) - 0.5).abs().argmin())


@dataclass
class Transition:
    """One remembered transition of solver step 1, a v_θ that has moved by Δv, and what the loss makes of them."""

    path: torch.Tensor  # (K + 1, 1, 2)
    x_t: torch.Tensor  # this and the following: (1, 1, 2)
    x_next: torch.Tensor
    v_old: torch.Tensor
    dv: torch.Tensor
    step: torch.Tensor  # (1,)
    mean: torch.Tensor
    mean_plus: torch.Tensor
    mean_minus: torch.Tensor
    std: float
    energy_plus: float
    energy_minus: float
    loss: dict[int, float]  # by label


def transition(seed: int = 0) -> Transition:
    """From the state of step 1 whose success is most open, a step of 1 to 1.3 std after which the action succeeded."""
    r = residuals(1, seed)
    start = sample(Flow(), len(r.x_t), seed=seed)[most_open(r), :2]  # (2, 1, 2) its noise and itself
    kwargs = dict(num_steps=K, noise_level=NOISE)
    step, x_t = torch.tensor([1]), start[None, 1]
    with torch.no_grad():
        v_old = Flow().velocity(None, None, x_t, 1 - step / K)
        mean, std = nft.flow_sde_step(x_t, v_old, step, **kwargs)
        torch.manual_seed(seed)
        paths = walk_on(Flow(), x_t.repeat(500, 1, 1), 1)
        size = ((paths[:, 1] - mean) / std)[:, 0].norm(dim=-1)
        path = torch.cat((start, paths[succeeded(paths[:, -1]) & (size > 1) & (size < 1.3)][0, 1:]))
        x_next = path[None, 2]
        towards = (mean - x_next) / (mean - x_next).norm()  # in v: the mean moves against the velocity
        turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # by 37°
        dv = 0.45 * towards @ turn
        mean_plus, mean_minus = (nft.flow_sde_step(x_t, v, step, **kwargs)[0] for v in (v_old + dv, v_old - dv))
        plus, minus = (((x_next - m) ** 2 / (std**2 + 1e-4)).sum().item() for m in (mean_plus, mean_minus))
        loss = {
            y: nft.stepnft_loss(v_old + dv, v_old, x_t, x_next, step, torch.tensor([float(y)]), tr_coef=0.0, **kwargs)[0].item()
            for y in (1, -1)
        }
    return Transition(path, x_t, x_next, v_old, dv, step, mean, mean_plus, mean_minus, std.item(), plus, minus, loss)


def pushes(tr: Transition, x_next: torch.Tensor, labels: torch.Tensor, rate: float = 0.25) -> torch.Tensor:
    """How far one step of gradient descent on v_θ, from θ_old, moves the solver step's mean, per sample: (B, 2).

    x_next: (B, 1, 2) samples of the transition's step; labels: (B,).
    """
    B = len(x_next)
    x_t, v_old, step = tr.x_t.expand(B, 1, 2), tr.v_old.expand(B, 1, 2), tr.step.expand(B)
    kwargs = dict(num_steps=K, noise_level=NOISE)
    v_theta = v_old.clone().requires_grad_()
    loss, _ = nft.stepnft_loss(v_theta, v_old, x_t, x_next, step, labels, **kwargs)
    loss.backward()
    moved = v_old - rate * B * v_theta.grad  # B: the loss is a mean over samples
    return (nft.flow_sde_step(x_t, moved, step, **kwargs)[0] - tr.mean)[:, 0]


def loss_along(tr: Transition, drifts: torch.Tensor, label: float) -> torch.Tensor:
    """The loss when v_θ lies `drifts` (D,) away from v_old, in the direction that takes the mean to x_next (negative: away)."""
    towards = (tr.mean - tr.x_next) / (tr.mean - tr.x_next).norm()
    return torch.stack([
        nft.stepnft_loss(tr.v_old + d * towards, tr.v_old, tr.x_t, tr.x_next, tr.step, torch.tensor([label]), num_steps=K,
                         noise_level=NOISE)[0]
        for d in drifts
    ])


def statistics(r: Residuals) -> dict[str, tuple[float, float]]:
    """Offset and label signal of both targets, in standard deviations of the miss around its own mean.

    Offset: length of the mean miss, whatever the label. Signal: length of the covariance of label and miss. Both are means over the
    states whose success is open (10 to 90 %).
    """
    y = 2.0 * r.success - 1
    chance = r.success.float().mean(1)
    opens = (chance > 0.1) & (chance < 0.9)
    numbers = {}
    for name in ("xnext", "x0"):
        miss = getattr(r, name)
        std = miss.var(1).sum(-1).sqrt()
        signal = ((y - y.mean(1, keepdim=True))[..., None] * miss).mean(1).norm(dim=-1)
        numbers[name] = tuple((q / std)[opens].mean().item() for q in (miss.mean(1).norm(dim=-1), signal))
    return numbers


# ------------------------------------------------------------------------------------------------------------- pictures


def disc(axis) -> None:
    axis.text(GOAL[0], GOAL[1] - RADIUS - 0.08, "success", color=SUCCESS, ha="center", va="top", fontsize=9, zorder=1.5,
              bbox=dict(facecolor="white", alpha=0.7, linewidth=0, pad=1))
    axis.add_patch(Circle(GOAL, RADIUS, facecolor=SUCCESS, alpha=0.12, linewidth=0))
    axis.add_patch(Circle(GOAL, RADIUS, fill=False, edgecolor=SUCCESS, linewidth=1.2))


def plane(axis, title: str, limit: float = 2.1) -> None:
    axis.set(aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit), title=title)
    axis.tick_params(labelsize=8)


def cloud(axis, points: torch.Tensor, color, **options) -> None:
    axis.scatter(*points.reshape(-1, 2).T, s=options.pop("s", 5), color=color, linewidths=0, **options)


def by_outcome(axis, points: torch.Tensor, success: torch.Tensor, **options) -> None:
    cloud(axis, points[~success], FAILURE, label="failure, y = −1", **options)
    cloud(axis, points[success], SUCCESS, label="success, y = +1", **options)


def arrow(axis, start, end, color, width: float = 1.8) -> None:
    style = dict(arrowstyle="-|>", color=color, linewidth=width, shrinkA=0, shrinkB=0, mutation_scale=6 + 4 * width)
    axis.annotate("", np.asarray(end).reshape(2), np.asarray(start).reshape(2), arrowprops=style)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a palette: half the bytes


def draw_paths(out: Path, seed: int) -> None:
    policy = Flow()
    starts = torch.tensor([[-1.4, 0.9], [-1.6, -1.3], [-0.1, -1.7], [0.5, 1.7], [1.3, 0.5], [1.7, -1.3]])[:, None]
    figure, axes = plt.subplots(2, 3, figsize=(11, 7.6), layout="constrained")
    for axis, num_steps in zip(axes[0], (K, 32)):
        torch.manual_seed(seed)
        ode, sde = (walk_on(policy, starts, num_steps=num_steps, noise_level=noise)[:, :, 0] for noise in (0.0, NOISE))
        disc(axis)
        for b in range(6):
            dots = dict(marker="o", markersize=4 if num_steps == K else 0, linewidth=1.3)
            axis.plot(*sde[b].T, color=SDE, label="" if b else "SDE", **dots)
            axis.plot(*ode[b].T, color=OLD, label="" if b else "ODE", **dots)
        axis.plot(*ode[:, 0].T, "o", markerfacecolor="white", color="black", markersize=7, label="noise, t = 1")
        plane(axis, f"six noises, K = {num_steps} steps")
        axis.legend(loc="upper left", fontsize=8)
    sde, ode = fan(seed, 400)
    disc(axes[0, 2])
    cloud(axes[0, 2], sde[:, -1], SDE, label="SDE: 400 actions")
    axes[0, 2].plot(*ode[0, :, 0].T, color=OLD, marker="o", markersize=4, label="ODE: one action")
    axes[0, 2].plot(*ode[0, 0, 0], "o", markerfacecolor="white", color="black", markersize=7)
    plane(axes[0, 2], "one noise, K = 4")
    axes[0, 2].legend(loc="upper left", fontsize=8)
    for axis, name, noise, color in ((axes[1, 0], "ODE", 0.0, OLD), (axes[1, 1], "SDE", NOISE, SDE)):
        end = sample(policy, 1000, seed=seed, noise_level=noise)[:, -1]
        disc(axis)
        cloud(axis, end, color, s=3)
        plane(axis, f"1000 noises, {name}, K = 4: actions")
    bars = axes[1, 2].bar(range(K), step_stds(), color=SDE, width=0.6)
    axes[1, 2].bar_label(bars, [f"{s:.3f}" for s in step_stds()], padding=2)
    axes[1, 2].set(title="std of each solver step, noise level 0.2", xticks=range(K), ylim=(0, 0.23))
    axes[1, 2].set_xlabel("solver step i  (t = 1, 0.75, 0.5, 0.25)")
    save(figure, out / "walkthrough_1_paths.png")


def draw_transition(out: Path, seed: int) -> None:
    tr = transition(seed)
    x_t, x_next, mean, plus, minus = (x.flatten().numpy() for x in (tr.x_t, tr.x_next, tr.mean, tr.mean_plus, tr.mean_minus))
    figure, (whole, zoom) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained", width_ratios=(1, 1.25))
    disc(whole)
    cloud(whole, sample(Flow(), 800, seed=seed, noise_level=0.0)[:, -1], "#BBBBBB", s=4)
    whole.plot(*tr.path[:, 0].T, color=SDE, marker="o", linewidth=1.8)
    for i, name in ((0, "noise, t = 1"), (K, "action, t = 0")):
        whole.annotate(name, tr.path[i, 0], xytext=(-60, 28 - 14 * i), textcoords="offset points", ha="right",
                       arrowprops=dict(arrowstyle="-", color=SDE, shrinkB=4))
    centre, half = mean + 0.3 * (x_t - mean), 0.48
    whole.add_patch(Rectangle(centre - half, 2 * half, 2 * half, fill=False, linewidth=1))
    plane(whole, "an SDE path; in the box: its step 1")

    for radius, style in ((tr.std, "-"), (2 * tr.std, ":")):
        zoom.add_patch(Circle(mean, radius, fill=False, color=SDE, linestyle=style, linewidth=1.5))
    for end, color in ((mean, OLD), (plus, THETA), (minus, MIRROR)):
        arrow(zoom, x_t, end, color)
    for end, color in ((plus, THETA), (minus, MIRROR)):
        zoom.plot(*np.stack((end, x_next)).T, color=color, linestyle="--", linewidth=1.5)
    zoom.plot(*x_t, "o", color="black", markersize=8)
    zoom.plot(*x_next, "*", color="black", markersize=16)
    zoom.text(0.02, 0.02, f"E⁺ = {tr.energy_plus:.2f}   E⁻ = {tr.energy_minus:.2f}\nloss: {tr.loss[1]:.2f} if y = +1,  "
              f"{tr.loss[-1]:.2f} if y = −1", transform=zoom.transAxes, fontsize=11)
    for point, name, color in ((x_t, "x_t", "black"), (x_next, "x_next", "black"), (mean, "μ(v_old)", OLD), (plus, "μ⁺", THETA),
                               (minus, "μ⁻", MIRROR)):
        away = mean - x_next if name == "μ(v_old)" else point - mean
        away *= (26 + 2 * len(name)) / np.linalg.norm(away)
        zoom.annotate(name, point, xytext=away, textcoords="offset points", ha="center", va="center", color=color, fontsize=12,
                      weight="bold")
    zoom.set(aspect="equal", xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    zoom.set_title("the step and its two mirrored branches (circles: 1 and 2 std)")
    save(figure, out / "walkthrough_2_transition.png")


def draw_push(out: Path, seed: int) -> None:
    tr = transition(seed)
    mean = tr.mean.flatten().numpy()
    torch.manual_seed(seed)
    near = tr.mean + tr.std * torch.randn(8, 1, 2)
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.8), layout="constrained")
    for axis, y, color, title in ((axes[0, 0], 1.0, SUCCESS, "success, y = +1: towards x_next"),
                                  (axes[0, 1], -1.0, FAILURE, "failure, y = −1: away from x_next")):
        axis.add_patch(Circle(mean, tr.std, fill=False, color=SDE, linewidth=1.5))
        for x, push in zip(near[:, 0], pushes(tr, near, torch.full((8,), y))):
            axis.plot(*np.stack((mean, x)).T, color="#999999", linestyle=":", linewidth=1.2)
            axis.plot(*x, "*", color="black", markersize=11)
            arrow(axis, mean, mean + push.numpy(), color)
        axis.set_title(title)
    path = walk_on(Flow(), tr.x_t.repeat(4000, 1, 1), 1)
    success = succeeded(path[:, -1])
    push = pushes(tr, path[:, 1], 2.0 * success - 1)
    axis = axes[1, 0]
    axis.add_patch(Circle(mean, tr.std, fill=False, color=SDE, linewidth=1.5))
    by_outcome(axis, path[:700, 1], success[:700], alpha=0.5, s=9)
    arrow(axis, mean, mean + 4 * push.mean(0).numpy(), "black", 3)
    axis.set_title("samples of this step by outcome; mean push × 4")
    axis.legend(loc="lower left", fontsize=9)
    for axis in axes.flat[:3]:
        axis.plot(*mean, "o", color=OLD, markersize=7)
        axis.set(aspect="equal", xlim=(mean[0] - 0.5, mean[0] + 0.5), ylim=(mean[1] - 0.5, mean[1] + 0.5))
        axis.tick_params(labelsize=8)
    drifts = torch.linspace(-1, 1, 81)
    axis = axes[1, 1]
    for y, color, name in ((1.0, SUCCESS, "success, y = +1"), (-1.0, FAILURE, "failure, y = −1")):
        axis.plot(drifts, loss_along(tr, drifts, y), color=color, linewidth=2.2, label=name)
    axis.plot(0, np.log(2), "o", color=OLD, markersize=8)
    axis.annotate("θ = θ_old: log 2", (0, np.log(2)), xytext=(0, 1.25), ha="center", arrowprops=dict(arrowstyle="-", color=OLD))
    for limit in (-0.5, 0.5):
        axis.axvline(limit, color="#999999", linestyle=":", linewidth=1.2)
    axis.set(title="the loss of one sample; dotted: drift limit", ylabel="loss")
    axis.set_xlabel("drift of v_θ: < 0 away from x_next, > 0 towards it")
    axis.legend(loc="lower center", fontsize=9)
    axis.set_ylim(0, None)
    save(figure, out / "walkthrough_3_push_and_pull.png")


def draw_targets(out: Path, seed: int, curves: dict[tuple[str, bool], np.ndarray]) -> None:
    r = residuals(1, seed)
    s = most_open(r)
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 7.8), layout="constrained")
    x_t, x0_hat, mine = r.x_t[s, 0], r.x0_hat[s, 0], slice(0, 400)
    axis = axes[0, 0]
    disc(axis)
    by_outcome(axis, (r.x0[s] + x0_hat)[mine], r.success[s, mine], alpha=0.5)
    axis.plot(*torch.stack((x_t, x0_hat)).T, color=X0, linestyle="--", linewidth=1.6)
    axis.plot(*x_t, "o", color="black", markersize=7)
    axis.plot(*x0_hat, "s", color=X0, markersize=8)
    axis.annotate("x_t", x_t, xytext=(4, 8), textcoords="offset points", fontsize=11)
    axis.annotate("x0_hat", x0_hat, xytext=(-48, -4), textcoords="offset points", fontsize=11, color=X0)
    plane(axis, "one x_t (step 1): where v_old points,\nand where its SDE paths end")
    for axis, miss, name in ((axes[0, 1], r.xnext[s], "x_next − μ(v_old)"), (axes[0, 2], r.x0[s], "x0 − x0_hat")):
        by_outcome(axis, miss[mine], r.success[s, mine], alpha=0.5)
        axis.axhline(0, color="#999999", linewidth=0.8)
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.plot(*miss.mean(0), "P", color="black", markeredgecolor="white", markersize=13, label="mean of all")
        plane(axis, f"the target's miss:\n{name}", 1.6)
        axis.legend(loc="upper left", fontsize=8)
    numbers = [statistics(residuals(i, seed)) for i in range(K)]
    for axis, which, title in zip(axes[1], (0, 1), ("offset that no label caused, in std", "what the label explains, in std")):
        for target, color, shift, name in (("xnext", "black", -0.2, "x_next"), ("x0", X0, 0.2, "x0")):
            bars = axis.bar(np.arange(K) + shift, [n[target][which] for n in numbers], 0.38, color=color, label=f"target {name}")
            axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
        axis.set(title=title, xticks=range(K), xlabel="solver step i")
        axis.margins(y=0.1)
    axes[1, 0].legend(fontsize=9)
    for (target, random), curve in curves.items():
        name = ("x_next" if target == "xnext" else "x0") + (", random labels" if random else "")
        color = "black" if target == "xnext" else X0
        axes[1, 2].plot(100 * curve.mean(0), color=color, linestyle=":" if random else "-", linewidth=2, label=f"target {name}")
    axes[1, 2].set(title="success learned, % (mean of five seeds)", xlabel="iteration", ylim=(0, 102))
    axes[1, 2].grid(alpha=0.3)
    axes[1, 2].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.42))
    save(figure, out / "walkthrough_4_targets.png")


def draw_learning(out: Path, runs: list[Run]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.2), layout="constrained")
    for axis, policy, name, rate in zip(axes, (Flow(), runs[0].policy), ("before", "after"), np.take(runs[0].success, (0, -1))):
        end = sample(policy, 1200, seed=1, noise_level=0.0)[:, -1]
        disc(axis)
        by_outcome(axis, end, succeeded(end))
        plane(axis, f"{name}: actions by the ODE, {100 * rate:.0f} % succeed")
        axis.legend(loc="upper left", fontsize=8)
    for run in runs:
        axes[2].plot(100 * np.array(run.success), color=THETA, linewidth=1.2, alpha=0.8)
    axes[2].set(title=f"success of θ by the ODE, %; {len(runs)} seeds", xlabel="iteration (512 episodes each)", ylim=(0, 102))
    axes[2].grid(alpha=0.3)
    save(figure, out / "walkthrough_5_learning.png")


def draw_rollout_policy(out: Path, by_end: dict[float, list[Run]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4), layout="constrained")
    for (end, runs), color, style in zip(by_end.items(), ("#56B4E9", THETA, X0), ("--", "-", "-.")):
        look = dict(color=color, linestyle=style, linewidth=2.2, label=f"α {'stays' if end == 0.1 else 'ends'} at {end:g}")
        axes[0].plot(runs[0].alpha, **look)
        axes[1].plot(np.mean([run.drift for run in runs], 0), **look)
        axes[2].plot(100 * np.mean([run.success for run in runs], 0), **look)
    axes[0].set(title="α, the share of θ_old that stays", ylim=(0, 1.05))
    axes[1].set(title="distance to θ_old: mean ‖v_θ − v_old‖", ylim=(0, None))
    axes[2].set(title="success of θ by the ODE, % (five seeds)", ylim=(0, 102))
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9, loc=(0.42, 0.56))
    save(figure, out / "walkthrough_6_rollout_policy.png")


def main(args: Args) -> None:
    torch.set_num_threads(1)  # the same numbers on every machine
    args.out.mkdir(parents=True, exist_ok=True)
    print("std per step:", ", ".join(f"{s:.3f}" for s in step_stds()))
    for name, value in endpoints(args.seed).items():
        print(f"{name}: {value:.3f}")
    draw_paths(args.out, args.seed)
    tr = transition(args.seed)
    print(f"transition: std {tr.std:.3f}, E+ {tr.energy_plus:.2f}, E- {tr.energy_minus:.2f}, losses {tr.loss}")
    draw_transition(args.out, args.seed)
    draw_push(args.out, args.seed)
    for i in range(K):
        print(f"step {i}, offset and label signal:", statistics(residuals(i, args.seed)))
    seeds = range(args.seed, args.seed + 5)
    by_end = {end: [learn(seed, ema_end=end) for seed in seeds] for end in (0.1, 0.5, 0.995)}
    curves = {("xnext", False): np.array([run.success for run in by_end[0.5]])}
    for target, random in (("x0", False), ("xnext", True), ("x0", True)):
        curves[target, random] = np.array([learn(seed, target=target, random_labels=random).success for seed in seeds])
    draw_targets(args.out, args.seed, curves)
    draw_learning(args.out, by_end[0.5])
    draw_rollout_policy(args.out, by_end)
    for (target, random), curve in curves.items():
        print(f"target {target}, random labels: {random}: success after 0, 10, 20, 40 iterations", curve[:, [0, 10, 20, 40]])
    for end, runs in by_end.items():
        print(f"alpha to {end}:", [f"success {run.success[-1]:.3f}, drift {run.drift[-1]:.3f}" for run in runs])


if __name__ == "__main__":
    main(tyro.cli(Args))
