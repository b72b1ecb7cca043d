"""Memory of training π0 and π0.5: estimated from the configuration at full size, measured at small size on the CPU.

    python benchmarks/memory.py            # benchmarks/results/memory.json and the tables of docs/notebook/memory.md
    python benchmarks/memory.py --cameras 3 --horizon 50
    python benchmarks/memory.py --cuda     # full-size policies on a GPU: benchmarks/results/memory_cuda.json

The estimate builds the policy without values (fake tensors), runs the forward pass of an update on it, and counts what
autograd keeps. The measurement does the same update for real on a policy of some 30 M parameters, each variant in a process of
its own, and reads the process's resident memory. With --cuda it is made at full size, with random weights, and takes the time too.
"""

import copy
import json
import multiprocessing as mp
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import torch
import tyro
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # as meta, but with a real device's kernels

from pi_stepnft import policies
from pi_stepnft.harness import memory_gb
from pi_stepnft.policies.checkpoint import TYPES

MIDDLE = dict(
    image_size=112, vision_width=384, vision_depth=4, vision_mlp=1536, vision_heads=6, vlm_width=384, vlm_depth=4, vlm_mlp=2048,
    expert_width=384, expert_mlp=1536, heads=6, kv_heads=1, head_dim=64, vocab_size=8192,
)


@dataclass
class Args:
    cameras: int = 2
    """images per observation, as in LIBERO"""
    horizon: int = 10
    """actions per chunk"""
    transitions: int = 4
    """solver transitions per chunk that an update learns from"""
    lora_rank: int = 16
    """rank of the adapters"""
    batch: int = 8
    """observations of the measured update"""
    cuda: bool = False
    """measure at full size on the GPU instead"""
    micro_batch: int = 32
    """--cuda: chunks per forward and backward pass"""
    out: Path | None = None
    """JSON file of the result; default: memory.json, or memory_cuda.json, in benchmarks/results"""


def build(kind: str, train: str, dtype: torch.dtype, sizes: dict, args: Args) -> policies.Pi0:
    """A policy as algos/stepnft_pi0.py prepares it for training."""
    model, config_class = TYPES[kind]
    policy = model(config_class(**sizes, num_cameras=args.cameras, horizon=args.horizon))
    policy.cast(dtype, None if train == "lora" else train)
    if train == "expert":
        policy.freeze_vlm()
    elif train == "lora":
        policies.add_lora(policy, args.lora_rank, float(args.lora_rank))
    return policy.train()


def inputs(policy: policies.Pi0, batch: int, args: Args) -> tuple:
    """Random arguments of encode_prefix, and of velocity after the prefix."""
    c = policy.config
    observation = (
        torch.rand(batch, c.num_cameras, 3, c.image_size, c.image_size), torch.ones(batch, c.num_cameras, dtype=torch.bool),
        torch.ones(batch, c.max_token_len, dtype=torch.int64), torch.ones(batch, c.max_token_len, dtype=torch.bool),
    )
    flow = (
        torch.randn(batch, c.state_dim), torch.randn(batch, args.transitions, c.horizon, c.action_dim),
        torch.rand(batch, args.transitions),
    )
    return observation, flow


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def kept(policy: policies.Pi0, batch: int, args: Args) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of an update, weights and inputs aside."""
    observation, flow = inputs(policy, batch, args)
    saved = []
    prefix = None
    if policy.vlm_frozen:
        with torch.no_grad():
            prefix = policy.encode_prefix(*observation)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        prefix = prefix or policy.encode_prefix(*observation)
        policy.velocity(prefix, *flow)
    given = [*policy.parameters(), *policy.buffers(), *observation, *flow]
    if policy.vlm_frozen:
        given += [prefix.keys, prefix.values, prefix.mask]
    apart = {t.untyped_storage()._cdata for t in given}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return sum(size for at, size in storages.items() if at not in apart)


def without_values(*arguments) -> policies.Pi0:
    """As `build`; call it within FakeTensorMode. Built on the meta device, as initial values cannot be faked."""
    with unset_fake_temporarily(), torch.device("meta"):
        policy = build(*arguments)
    for module in policy.modules():
        for name, tensor in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad)
        for name, tensor in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return policy


def estimate(kind: str, train: str, dtype: torch.dtype, sizes: dict, args: Args) -> dict[str, float]:
    """Bytes of each component. What an update keeps is fixed + per_sample · micro-batch, without and with checkpointing."""
    policy = without_values(kind, train, dtype, sizes, args)
    c = policy.config
    trained = [p for p in policy.parameters() if p.requires_grad]
    prefix = 2 * c.vlm_depth * c.prefix_len * c.kv_heads * c.head_dim * torch.finfo(policy.language_model.dtype).bits // 8
    result = dict(
        parameters=sum(p.numel() for p in policy.parameters()), trained=sum(p.numel() for p in trained),
        weights=nbytes(policy.parameters()), gradients=nbytes(trained), adam=2 * nbytes(trained), rollout_policy=nbytes(trained),
        prefix_per_sample=prefix, inputs_per_sample=nbytes(inputs(policy, 1, args)[0]),
    )
    for name, checkpointing in (("", False), ("checkpointed_", True)):
        policy.checkpoint_gradients(checkpointing)
        one, two = kept(policy, 1, args), kept(policy, 2, args)
        result |= {f"{name}fixed": 2 * one - two, f"{name}per_sample": two - one}
    # the backward pass computes one layer of each stack at a time again
    result["layer_per_sample"] = (result["per_sample"] - result["checkpointed_per_sample"]) // c.vlm_depth
    return result


# -------------------------------------------------------------------------------------------------------- measurement


def resident() -> int:
    return int(memory_gb(torch.device("cpu")) * 1e9)


def measure(kind: str, train: str, dtype: torch.dtype, checkpointing: bool, args: Args) -> dict[str, int]:
    """Resident bytes of the same components in a real update. Runs in a process of its own."""
    torch.set_num_threads(1)
    for sizes in ({**MIDDLE, "vlm_depth": 1, "vision_depth": 1}, MIDDLE):  # the first round brings libraries into memory
        start = resident()
        policy = build(kind, train, dtype, sizes, args).checkpoint_gradients(checkpointing)
        weights = resident()
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-6)
        for batch in (1, args.batch):
            observation, flow = inputs(policy, batch, args)
            before = with_prefix = resident()
            with torch.set_grad_enabled(not policy.vlm_frozen):
                prefix = policy.encode_prefix(*observation)
            if policy.vlm_frozen:
                with_prefix = resident()
            loss = policy.velocity(prefix, *flow).square().mean()
            after = resident()
            if batch == 1:
                loss.backward()
                optimizer.step()
                del prefix, loss
                trained_state = resident()
        del policy, trained, optimizer, prefix, loss
    return dict(
        weights=weights - start, gradients_and_adam=trained_state - weights, activations=after - with_prefix,
        prefix=with_prefix - before,
    )


def measured(*arguments) -> dict[str, int]:
    """`measure` in a fork of this process, which holds nothing but imported modules."""
    with mp.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, arguments)


def measure_cuda(kind: str, train: str, checkpointing: bool, compiled: bool, args: Args) -> dict[str, float]:
    """Bytes and seconds of algos/stepnft_pi0.py's parts at full size in bfloat16: what is held, the peak, and how long it takes."""

    def timed(function, repeat: int = 5) -> float:
        """Median seconds of a call, after one that warms up."""
        seconds = []
        for _ in range(repeat + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return sorted(seconds[1:])[repeat // 2]

    torch.manual_seed(0)
    held = torch.cuda.memory_allocated
    with torch.device("cuda"):
        policy = build(kind, train, torch.bfloat16, {}, args).checkpoint_gradients(checkpointing)
        (observation, flow), (one, one_flow) = (inputs(policy, batch, args) for batch in (args.micro_batch, 1))
        noise = torch.randn_like(flow[1][:, 0])
    base = held() - nbytes([*observation, *flow, *one, *one_flow, noise])
    rollout_policy = copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad}).eval()
    result = dict(weights=base, rollout_policy=held() - base - nbytes([*observation, *flow, *one, *one_flow, noise]))
    with torch.inference_mode():
        torch.cuda.reset_peak_memory_stats()
        prefix = rollout_policy.encode_prefix(*observation)
        first = rollout_policy.encode_prefix(*one)
        result["encode_s"] = timed(lambda: rollout_policy.encode_prefix(*observation))
        result["sample_s"] = timed(lambda: rollout_policy.sample(prefix, flow[0], noise, 4))
        result["act_one_s"] = timed(lambda: rollout_policy.sample(rollout_policy.encode_prefix(*one), one_flow[0], noise[:1], 4))
        result["rollout_peak"] = torch.cuda.max_memory_allocated()
        del first
    prefix = prefix.to("cuda") if train != "expert" else type(prefix).cat([prefix])  # a copy that autograd may keep
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-6, betas=(0.9, 0.95), eps=1e-5, fused=True)
    velocity = torch.compile(policy.velocity) if compiled else policy.velocity
    if train != "expert":
        del prefix

    def update() -> None:
        optimizer.zero_grad()
        given = prefix if train == "expert" else policy.encode_prefix(*observation)
        velocity(given, *flow).square().mean().backward()
        optimizer.step()

    before = held()
    torch.cuda.reset_peak_memory_stats()
    result["update_s"] = timed(update)
    optimizer_bytes = nbytes(
        t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1
    )
    gradients = nbytes(p.grad for p in trained if p.grad is not None)
    result |= dict(gradients=gradients, adam=optimizer_bytes, update_peak=torch.cuda.max_memory_allocated())
    result["activations"] = result["update_peak"] - before - gradients - optimizer_bytes
    return result


def main_cuda(args: Args) -> None:
    """Each variant in a process of its own; what does not fit is reported so."""
    rows = []
    for kind, train, checkpointing, compiled in (
        ("pi0", "expert", False, False), ("pi0", "expert", True, False), ("pi0", "expert", False, True),
        ("pi0", "lora", True, False), ("pi05", "expert", False, False), ("pi05", "lora", True, False),
        ("pi0", "all", True, False), ("pi05", "all", True, False),
    ):
        row = dict(policy=kind, train=train, checkpointing=checkpointing, compile=compiled)
        with mp.get_context("spawn").Pool(1) as pool:
            try:
                row |= pool.apply(measure_cuda, (kind, train, checkpointing, compiled, args))
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
        rows.append(row)
        print(row, flush=True)
        machine = dict(torch=torch.__version__, python=platform.python_version(), gpu=torch.cuda.get_device_name())
        given = {name: value for name, value in asdict(args).items() if name not in ("out", "cuda", "batch")}
        args.out.write_text(json.dumps(dict(arguments=given, machine=machine, full_size=rows), indent=1) + "\n")


def table(heads: str, rows) -> None:
    """Print Markdown; `heads` are separated by semicolons."""
    heads = heads.split("; ")
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    print()


def tables(full: list[dict], small: list[dict]) -> None:
    """Print the results as Markdown."""
    which = lambda r: (r["policy"], r["train"], r["dtype"])
    gb = lambda value: f"{value / 1e9:.2f}"
    mb = lambda value: f"{value / 1e6:.1f}"
    held = ("weights", "gradients", "adam", "rollout_policy")
    table(
        "policy; trained; dtype; trained parameters; weights; gradients; Adam; θ_old; sum",
        ((*which(r), f"{r['trained'] / 1e6:.0f} M", *(gb(r[n]) for n in held), gb(sum(r[n] for n in held))) for r in full),
    )
    kept = ("prefix_per_sample", "inputs_per_sample", "fixed", "per_sample", "checkpointed_fixed", "checkpointed_per_sample",
            "layer_per_sample")
    table(
        "policy; trained; dtype; prefix; inputs; fixed; per chunk; fixed, checkpointed; per chunk, checkpointed; one layer",
        ((*which(r), *(mb(r[n]) for n in kept)) for r in full),
    )
    table(
        "policy; trained; dtype; checkpointing; component; estimated; measured; ratio",
        (
            (*which(r), "yes" if r["checkpointing"] else "no", name.replace("_", " "), mb(e), mb(m), f"{m / e:.2f}")
            for r in small
            for name, e, m in ((name, r["estimated"][name], r["measured"][name]) for name in r["estimated"])
            if e
        ),
    )


def main(args: Args) -> None:
    args.out = args.out or Path(__file__).parent / "results" / ("memory_cuda.json" if args.cuda else "memory.json")
    args.out.parent.mkdir(exist_ok=True)
    if args.cuda:
        return main_cuda(args) if torch.cuda.is_available() else sys.exit("error: --cuda needs a GPU that PyTorch finds")
    full, small = [], []
    for kind in TYPES:
        for train in ("expert", "lora", "all"):
            with FakeTensorMode():
                row = estimate(kind, train, torch.bfloat16, {}, args)
            full.append(dict(policy=kind, train=train, dtype="bfloat16", **row))
            print(full[-1], flush=True)
    for kind, train, dtype, checkpointing in (
        ("pi0", "expert", torch.float32, False), ("pi0", "lora", torch.float32, False), ("pi0", "all", torch.float32, False),
        ("pi0", "all", torch.float32, True), ("pi05", "expert", torch.bfloat16, False),
    ):
        with FakeTensorMode():
            e = estimate(kind, train, dtype, MIDDLE, args)
        found = measured(kind, train, dtype, checkpointing, args)
        name = "checkpointed_" if checkpointing else ""
        expected = dict(
            weights=e["weights"], gradients_and_adam=e["gradients"] + e["adam"],
            activations=e[f"{name}fixed"] + e[f"{name}per_sample"] * args.batch,
            prefix=e["prefix_per_sample"] * args.batch if train == "expert" else 0,
        )
        small.append(dict(policy=kind, train=train, dtype=str(dtype)[6:], checkpointing=checkpointing, batch=args.batch,
                          parameters=e["parameters"], estimated=expected, measured=found))
        print(small[-1], flush=True)
    tables(full, small)
    machine = dict(torch=torch.__version__, python=platform.python_version(), processor=platform.machine())
    given = {name: value for name, value in asdict(args).items() if name not in ("out", "cuda", "micro_batch")}
    args.out.write_text(json.dumps(dict(arguments=given, machine=machine, full_size=full, small_size=small), indent=1) + "\n")


if __name__ == "__main__":
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:  # so that freed memory goes back to the system, and is seen to
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"})
    main(tyro.cli(Args, description=__doc__))
