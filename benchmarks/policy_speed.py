"""Speed of π0 against lerobot's, float32 on the CPU, at equal sizes, weights, inputs and threads.

    python benchmarks/policy_speed.py                                # the figures of the docs
    python benchmarks/policy_speed.py --sizes tiny --rounds 3        # quick

- sampling: observations to action chunks, prefix included, at 4 and at 10 solver steps; samples per second.
- update: one step of training the expert alone (flow loss forward and backward, no optimizer step). The frozen VLM's prefix of an
  observation does not change over the epochs of an RL update, so ours is cached, as in our algorithms; lerobot's network
  encodes it each time. The same step without our cache is listed too.

Observations are as in LIBERO unless told otherwise: two of three cameras are present, the instruction has twelve tokens. Both
take turns within one run, and the medians of their rounds are compared. The virtual environment is the one of policy_parity.py.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import torch
import tyro
from lerobot_reference import LEROBOT, lerobot_inputs, lerobot_network, run_in_venv

from pi_stepnft.policies import Pi0, Pi0Config, Pi05, Pi05Config

# lerobot's networks have 8 heads fixed in the code; tiny has 4 of 32 otherwise.
SIZES = dict(
    tiny=dict(Pi0Config.tiny(num_cameras=3, heads=8, head_dim=16).to_dict()),
    middle=dict(
        image_size=112, patch_size=14, num_cameras=3, vision_width=512, vision_depth=12, vision_mlp=2048, vision_heads=8,
        vlm_width=640, vlm_depth=8, vlm_mlp=2560, expert_width=384, expert_mlp=1536, heads=8, kv_heads=1, head_dim=64,
        vocab_size=8192, horizon=50,
    ),
)


@dataclass
class Args:
    type: Literal["pi0", "pi05"] = "pi0"
    """the policy"""
    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    """of tiny (1.6 M parameters) and middle (about 100 M)"""
    batch: dict[str, int] = field(default_factory=lambda: dict(tiny=16, middle=2))
    """observations per call"""
    cameras: int = 2
    """cameras present, of three"""
    tokens: int = 12
    """tokens of the instruction; the rest of the prompt is padding"""
    steps: list[int] = field(default_factory=lambda: [4, 10])
    """solver steps"""
    rounds: int = 15
    """rounds of each contestant, after one that does not count"""
    threads: int = 1
    """threads of both"""
    cpu_time: bool = False
    """count the process's CPU time instead of the wall's: steadier on a busy machine, meaningful with one thread"""
    venv: Path = Path(tempfile.gettempdir()) / f"lerobot-{LEROBOT}"
    """virtual environment for lerobot, made if it is not there"""
    out: Path = Path(__file__).parent / "results" / "policy_speed.json"
    """results file"""


def make_inputs(c: Pi0Config, batch: int, cameras: int, tokens: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(batch, c.num_cameras, 3, c.image_size, c.image_size, generator=g) * 2 - 1
    image_mask = (torch.arange(c.num_cameras) < cameras).expand(batch, -1)
    token_mask = (torch.arange(c.max_token_len) < tokens).expand(batch, -1)
    return dict(
        images=images.where(image_mask[..., None, None, None], torch.tensor(-1.0)),
        image_mask=image_mask,
        tokens=torch.randint(3, c.vocab_size, (batch, c.max_token_len), generator=g) * token_mask,
        token_mask=token_mask,
        state=torch.randn(batch, c.state_dim, generator=g),
        noise=torch.randn(batch, c.horizon, c.action_dim, generator=g),
        actions=torch.randn(batch, c.horizon, c.action_dim, generator=g),
        t=torch.rand(batch, generator=g),
    )


def contests(policy: Pi0, inputs: dict[str, torch.Tensor], steps: list[int]) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (ours, lerobot's), functions without arguments."""
    state, noise, actions, t = (inputs[k] for k in ("state", "noise", "actions", "t"))
    theirs, observation = lerobot_network(policy, train_expert_only=True).train(), lerobot_inputs(policy, inputs)
    policy.freeze_vlm().train()

    @torch.no_grad()
    def encode():
        return policy.encode_prefix(*(inputs[k] for k in ("images", "image_mask", "tokens", "token_mask")))

    cache = encode()

    def ours_update(prefix):
        policy.zero_grad()
        policy.flow_loss(prefix, state, actions, noise, t).mean().backward()

    def their_update():
        theirs.zero_grad()
        theirs(*observation, actions, noise, t).mean().backward()

    sampling = {
        f"sampling, {n} steps": (
            lambda n=n: policy.sample(encode(), state, noise, n),
            lambda n=n: theirs.sample_actions(*observation, noise=noise, num_steps=n),
        )
        for n in steps
    }
    updates = {
        "update, prefix cached": (lambda: ours_update(cache), their_update),
        "update, prefix encoded": (lambda: ours_update(encode()), their_update),
    }
    return sampling | updates


def main(args: Args) -> None:
    run_in_venv(args.venv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    model, sizes = {"pi0": (Pi0, Pi0Config), "pi05": (Pi05, Pi05Config)}[args.type]
    results = []
    print("| size | parameters | what | ours, observations / s | lerobot | ratio |\n|" + " --- |" * 6, flush=True)
    for name in args.sizes:
        torch.manual_seed(0)
        policy = model(sizes(**SIZES[name]))
        with torch.no_grad():
            for parameter in policy.expert.parameters():  # gates open
                parameter.add_(torch.randn_like(parameter) * 0.01)
        parameters = sum(p.numel() for p in policy.parameters())
        inputs = make_inputs(policy.config, args.batch[name], args.cameras, args.tokens)
        for what, contestants in contests(policy, inputs, args.steps).items():
            seconds = ([], [])
            for round in range(args.rounds + 1):
                for times, run in zip(seconds, contestants):
                    start = clock()
                    run()
                    if round:
                        times.append(clock() - start)
            ours, lerobot = (args.batch[name] / statistics.median(times) for times in seconds)
            print(f"| {name} | {parameters / 1e6:.1f} M | {what} | {ours:.2f} | {lerobot:.2f} | {ours / lerobot:.2f} |", flush=True)
            results.append(
                dict(size=name, parameters=parameters, what=what, ours_seconds=seconds[0], lerobot_seconds=seconds[1],
                     ratio=ours / lerobot)
            )
    packages = {package: version(package) for package in ("lerobot", "transformers", "torch")}
    record = dict(
        args=asdict(args) | dict(venv=args.venv.name, out=args.out.name), config={n: SIZES[n] for n in args.sizes},
        cores=os.cpu_count(), python=platform.python_version(), packages=packages, results=results,
    )
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
