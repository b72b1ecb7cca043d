"""Numbers of π0 and π0.5 against openpi's and lerobot's, in float32 on random weights, relative to the largest value.

    python benchmarks/policy_parity.py --reference openpi     # makes a virtual environment with openpi's networks, then compares
    python benchmarks/policy_parity.py --reference lerobot    # there; their releases of transformers exclude each other

Both get the same weights, every parameter far from its initial value, and five observations: with all cameras, with the middle,
the first, the last or two of three absent, and with texts of different lengths. Compared are velocities, the loss of every
action element, and samples of ten steps. Prints a Markdown table and writes it to a JSON file; exits with 1 above the limit.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import lerobot_reference as lerobot
import openpi_reference as openpi
import torch
import tyro

from pi_stepnft import harness
from pi_stepnft.policies import NormStats, Pi0, Pi0Config, Pi05, Pi05Config, Processor, Tokenizer

SIZES = dict(
    image_size=56, patch_size=14, num_cameras=3, vision_width=96, vision_depth=3, vision_mlp=192, vision_heads=4,
    vlm_width=128, vlm_depth=4, vlm_mlp=256, expert_width=64, expert_mlp=128, heads=8, kv_heads=1, head_dim=32,
    vocab_size=768, horizon=10,
)
COMPARED = ("velocity", "loss", "samples")
"""errors that the limit is for"""


class Reference(NamedTuple):
    package: str
    release: str
    requirements: tuple[str, ...]
    network: Callable
    inputs: Callable


REFERENCES = dict(
    openpi=Reference("rlinf-openpi", openpi.OPENPI, openpi.REQUIREMENTS, openpi.openpi_network, openpi.openpi_inputs),
    lerobot=Reference("lerobot", lerobot.LEROBOT, lerobot.REQUIREMENTS, lerobot.lerobot_network, lerobot.lerobot_inputs),
)


@dataclass
class Args:
    reference: Literal["openpi", "lerobot"]
    """compared with"""
    venv: Path | None = None
    """virtual environment for the reference, made if it is not there; default: in the folder for temporary files"""
    seeds: int = 3
    """random policies and inputs per type"""
    limit: float = 1e-5
    """largest relative error that passes"""
    out: Path | None = None
    """results file; default: benchmarks/results/policy_parity_<reference>.json"""


def random_policy(model: type[Pi0], config: Pi0Config, seed: int) -> Pi0:
    torch.manual_seed(seed)
    policy = model(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.processor = Processor(config, Tokenizer(), NormStats.identity(config.state_dim), NormStats.identity(config.action_dim))
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
def relative_errors(reference: Reference, policy: Pi0, inputs: dict) -> dict[str, float]:
    """Relative error of velocities, losses and ten-step samples; of openpi also of the samples at its solver's own times."""
    theirs, observation = reference.network(policy), reference.inputs(policy, inputs)
    actions, noise, t, state = (inputs[k] for k in ("actions", "noise", "t", "state"))
    seen = []  # their forward returns the loss only
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
    if reference.package == "rlinf-openpi":
        pairs["own_times"] = pairs["samples"][0], theirs.sample_actions(*observation, noise=noise, num_steps=10, own_times=True)
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def main(args: Args) -> int:
    reference = REFERENCES[args.reference]
    compared = f"{reference.package} {reference.release}"
    venv = args.venv or Path(tempfile.gettempdir()) / compared.replace(" ", "-")
    lerobot.run_in_venv(venv, reference.requirements, bare=compared.replace(" ", "=="))
    torch.set_num_threads(1)
    results = []
    for model, sizes in ((Pi0, Pi0Config), (Pi05, Pi05Config)):
        config = sizes(**SIZES)
        rows = [
            relative_errors(reference, random_policy(model, config, seed), random_inputs(config, seed))
            for seed in range(args.seeds)
        ]
        results.append(dict(type=config.type, errors={name: max(row[name] for row in rows) for name in rows[0]}))
    print(f"| largest relative error to {compared} | velocity | loss | 10-step samples |\n| --- | --- | --- | --- |")
    for row in results:
        print(f"| {row['type']} | " + " | ".join(f"{row['errors'][k]:.1e}" for k in COMPARED) + " |")
    pinned = [requirement.split("==")[0] for requirement in reference.requirements if "==" in requirement]
    packages = {name: version(name) for name in (reference.package, *pinned)}
    record = dict(
        commit=harness.commit(), sizes=SIZES, seeds=args.seeds, python=platform.python_version(), packages=packages, results=results
    )
    out = args.out or Path(__file__).parent / "results" / f"policy_parity_{args.reference}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    worst = max(row["errors"][k] for row in results for k in COMPARED)
    if not worst <= args.limit:
        print(f"the largest error is {worst:.1e}; expected at most {args.limit:.0e}", file=sys.stderr)
    return int(not worst <= args.limit)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
