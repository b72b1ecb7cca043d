"""Numbers of π0 and π0.5 against lerobot's, in float32 on random weights, relative to the largest value.

    python benchmarks/policy_parity.py          # makes a virtual environment with lerobot's networks, then compares there

Both get the same weights, every parameter far from its initial value, and five observations: with all cameras, with the middle,
the first, the last or two of three absent, and with texts of different lengths. Compared are velocities, the loss of every
action element, and samples of ten steps. Prints a Markdown table and writes it to a JSON file; exits with 1 above the limit.

openpi, from which lerobot's networks are ported, is not on the package index (its entry there is an empty placeholder), so it
is not compared directly.
"""

import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import torch
import tyro
from lerobot_reference import LEROBOT, lerobot_inputs, lerobot_network, run_in_venv

from pi_stepnft.policies import Pi0, Pi0Config, Pi05, Pi05Config

SIZES = dict(
    image_size=56, patch_size=14, num_cameras=3, vision_width=96, vision_depth=3, vision_mlp=192, vision_heads=4,
    vlm_width=128, vlm_depth=4, vlm_mlp=256, expert_width=64, expert_mlp=128, heads=8, kv_heads=1, head_dim=32,
    vocab_size=512, horizon=10,
)


@dataclass
class Args:
    venv: Path = Path(tempfile.gettempdir()) / f"lerobot-{LEROBOT}"
    """virtual environment for lerobot, made if it is not there"""
    seeds: int = 3
    """random policies and inputs per type"""
    limit: float = 1e-5
    """largest relative error that passes"""
    out: Path = Path(__file__).parent / "results" / "policy_parity.json"
    """results file"""


def random_policy(model: type[Pi0], config: Pi0Config, seed: int) -> Pi0:
    torch.manual_seed(seed)
    policy = model(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy.eval()


def random_inputs(c: Pi0Config, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    image_mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 1, 0]]).bool()
    B = len(image_mask)
    images = torch.rand(B, 3, 3, c.image_size, c.image_size, generator=g) * 2 - 1
    lengths = torch.tensor([c.max_token_len, 1, 7, c.max_token_len // 2, 3])
    token_mask = torch.arange(c.max_token_len) < lengths[:, None]
    return dict(
        images=images.where(image_mask[..., None, None, None], torch.tensor(-1.0)),
        image_mask=image_mask,
        tokens=torch.randint(1, c.vocab_size, (B, c.max_token_len), generator=g) * token_mask,
        token_mask=token_mask,
        state=torch.randn(B, c.state_dim, generator=g),
        noise=torch.randn(B, c.horizon, c.action_dim, generator=g),
        actions=torch.randn(B, c.horizon, c.action_dim, generator=g),
        t=torch.tensor([0.001, 0.25, 0.5, 0.9, 1.0]),
    )


@torch.no_grad()
def relative_errors(policy: Pi0, inputs: dict) -> dict[str, float]:
    """Relative error of velocities, losses and ten-step samples."""
    theirs, observation = lerobot_network(policy), lerobot_inputs(policy, inputs)
    actions, noise, t, state = (inputs[k] for k in ("actions", "noise", "t", "state"))
    seen = []  # lerobot's forward returns the loss only
    handle = theirs.action_out_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss = theirs(*observation, actions, noise, t)
    handle.remove()
    sampled = theirs.sample_actions(*observation, noise=noise, num_steps=10)

    prefix = policy.encode_prefix(*(inputs[k] for k in ("images", "image_mask", "tokens", "token_mask")))
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    pairs = dict(
        velocity=(policy.velocity(prefix, state, x_t, t), seen[0]),
        loss=(policy.flow_loss(prefix, state, actions, noise, t), loss),
        samples=(policy.sample(prefix, state, noise, num_steps=10), sampled),
    )
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def main(args: Args) -> int:
    run_in_venv(args.venv)
    torch.set_num_threads(1)
    results = []
    for model, sizes in ((Pi0, Pi0Config), (Pi05, Pi05Config)):
        config = sizes(**SIZES)
        rows = [relative_errors(random_policy(model, config, seed), random_inputs(config, seed)) for seed in range(args.seeds)]
        results.append(dict(type=config.type, errors={name: max(row[name] for row in rows) for name in rows[0]}))
    print(f"| largest relative error to lerobot {LEROBOT} | velocity | loss | 10-step samples |\n| --- | --- | --- | --- |")
    for row in results:
        print(f"| {row['type']} | " + " | ".join(f"{row['errors'][k]:.1e}" for k in ("velocity", "loss", "samples")) + " |")
    packages = {name: version(name) for name in ("lerobot", "transformers", "torch")}
    record = dict(sizes=SIZES, seeds=args.seeds, python=platform.python_version(), packages=packages, results=results)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    worst = max(max(row["errors"].values()) for row in results)
    if not worst <= args.limit:
        print(f"the largest error is {worst:.1e}; expected at most {args.limit:.0e}", file=sys.stderr)
    return int(not worst <= args.limit)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
