"""A 3 B π0 on GPUs, on paper: seconds of an iteration by phase, and bytes on each GPU; cost_model.py calls this and prints it.

A GPU's pass takes its FLOPs at a share of the peak, or the launches of its layers, whichever is longer. The settings are those of
--paper; every episode lasts until it is cut off, which is the most that it can take, and a chunk has ten actions. A core is as fast
as those that measured the environments: PickCube-v1's by cost_model.py, pictures of 224 px drawn on the core, LIBERO's in
libero_throughput.json. Memory is docs/notebook/memory.md's, by the estimates of memory.json. On 64 GPUs all episodes of an
iteration are played side by side, and RLinf keeps no prefixes.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

from pi_stepnft import policies
from pi_stepnft.algos import stepnft_pi0

K = 4
"""solver steps"""

# A machine of NVIDIA's DGX H100 kind, by its data sheets: eight GPUs with 80 GB, 112 cores, 2 TB, eight adapters of 400 Gbit/s.
CORES, HOST = 14, 256e9
"""cores and bytes of host memory for each GPU"""
GPU, PEAK, HBM = 80e9, 989e12, 3.35e12
"""bytes; bfloat16 FLOP/s without sparsity; bytes/s of its memory"""
NVLINK, NETWORK, PCIE = 450e9, 50e9, 50e9
"""bytes/s each way of a GPU: within a machine, between machines, to host memory (64e9 less its overhead)"""
# Assumed, after memory_cuda.json (an H100 that other programs used as well): the checks beside the tables say how well they fit.
SHARE = 0.45
"""share of PEAK that large matrix products reach: 32 observations of 2.7 TFLOP encoded in 186 ms"""
LAYER = 0.8e-3
"""s that a layer takes however little it computes: 4 passes of 18 layers for 32 chunks in 58 ms"""
FULL = 0.9
"""share of a memory that may be planned with; the rest is PyTorch's and fragmentation"""
ADAM = 28
"""bytes that a step of the optimizer moves for a parameter: four float32 read, three written"""
MICRO = dict(expert=256, all=16)
"""chunks per micro-batch, those of docs/scaling.md; `all` checkpoints gradients"""
HARDWARE = {"1 GPU": 1, "8 GPUs": 8, "64 GPUs, RLinf": 64}


def read(name: str) -> dict:
    return json.loads((Path(__file__).parent / "results" / f"{name}.json").read_text())


def flops(c: policies.Pi0Config, cameras: int, horizon: int) -> tuple[float, float]:
    """Of encoding an observation, and of a pass of the expert for one chunk: of the matrix products, which are nearly all."""
    seen, depth, inner, shared = cameras * c.tokens_per_image, c.vlm_depth, c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim
    pi0, P, V, W = c.type == "pi0", seen + c.max_token_len, c.vision_width, c.expert_width
    T = horizon + pi0  # π0's state is a token
    layer = lambda width, mlp, past: width * (2 * inner + shared + 3 * mlp) + 2 * inner * past  # multiplications for a token
    vision = c.vision_depth * 2 * V * (2 * V + c.vision_mlp + c.tokens_per_image) + V * (c.vlm_width + 3 * c.patch_size**2)
    prefix = (depth - 1) * layer(c.vlm_width, c.vlm_mlp, P) + c.vlm_width * shared  # of the last layer only keys and values
    # Projections of actions, time and state; of π0.5 time goes once, and then into each norm
    ends = 2 * horizon * W * c.action_dim + (3 * horizon * W**2 + W * c.state_dim if pi0 else (2 + 3 * (2 * depth + 1)) * W**2)
    return 2 * (seen * vision + P * prefix), 2 * (T * depth * layer(W, c.expert_mlp, P + T) + ends)


def gpu(work: float, layers: int) -> float:
    """Seconds."""
    return max(work / (PEAK * SHARE), layers * LAYER)


def checks() -> dict[str, list[float]]:
    """Seconds of parts of the 3 B policy, computed and measured (memory_cuda.json)."""
    c, measured = policies.Pi0Config(), read("memory_cuda")["full_size"][0]
    measured["trained"] = measured["gradients"] / 4
    (encode, act), (_, update) = flops(c, 2, 10), flops(c, 2, 40)
    look, passes = c.vision_depth + c.vlm_depth, c.vlm_depth
    computed = dict(encode_s=gpu(32 * encode, look), sample_s=4 * gpu(32 * act, passes),
                    act_one_s=gpu(encode, look) + 4 * gpu(act, passes),
                    update_s=gpu(3 * 32 * update, 3 * passes) + ADAM * measured["trained"] / HBM)
    return {name: [value, measured[name]] for name, value in computed.items()}


def on_paper(setting: str, hardware: str, train: str, environment: dict[str, float], program=stepnft_pi0, **changes: int) -> dict:
    """Seconds of an iteration by phase, bytes on a GPU, and what takes longest. environment: seconds of a reset and of a step;
    program: that of π0 or of π0.5; changes: to the authors' settings."""
    args, N = program.PAPER[setting] | changes, HARDWARE[hardware]
    c = policies.checkpoint.TYPES[program.POLICY][1]()
    rlinf, cameras = N > 8, dict(maniskill=1, libero=2)[setting]
    memory = next(row for row in read("memory")["full_size"] if (row["policy"], row["train"]) == (program.POLICY, train))
    E = args["num_envs"] * args["rollout_epochs"]
    B = E if rlinf else args["num_envs"]  # with so many GPUs, all episodes of an iteration side by side
    turns = args["rollout_steps"] // args["execute"]
    M, T, micro, epochs = E * turns / N, memory["trained"], MICRO[train], args["update_epochs"]
    encode, velocity = flops(c, cameras, 10)
    look, depth = c.vision_depth + c.vlm_depth, c.vlm_depth

    fsdp = train == "all" and N > 1
    held = sum(memory[name] for name in ("weights", "gradients", "adam", "rollout_policy")) / (N if fsdp else 1)
    held += fsdp * 4 * memory["parameters"]  # a whole copy acts
    kept = ("fixed", "per_sample") if train == "expert" else ("checkpointed_fixed", "checkpointed_per_sample", "layer_per_sample")
    held += memory[kept[0]] + micro * sum(memory[name] for name in kept[1:])
    prefixes = M * 2 * depth * (cameras * c.tokens_per_image + c.max_token_len) * c.kv_heads * c.head_dim * 2
    fits = dict(device=held + prefixes <= FULL * GPU, cpu=prefixes <= FULL * HOST, off=True)
    cache = "off" if rlinf or train == "all" else next(name for name, fit in fits.items() if fit)

    # A turn of the environments at once, and in two halves; those of a core are simulated one after another
    calls, b, episode = E // B * turns, B / N, environment["reset"] + args["rollout_steps"] * environment["step"]
    simulate = lambda b, cores: math.ceil(b / cores) * episode / turns
    act = lambda b: gpu(b * encode, look) + K * gpu(b * velocity, depth)
    whole, half = (simulate(b, CORES), act(b)), (simulate(b / 2, min(b, CORES)), act(b / 2))
    overlapped = max(whole[0], 2 * half[1], sum(half))

    times = 1 if train == "expert" else 4  # forward, again for what checkpoints left out, and twice that backward
    minibatches, m = epochs * args["num_minibatches"], M / args["num_minibatches"]
    micros = minibatches * math.ceil(m / micro)
    micro = epochs * M / micros
    again = micros * gpu(times * micro * encode, times * look) if cache == "off" else 0.0
    sent = (3 * micros if fsdp else 2 * minibatches) * 4 * T * (N - 1) / N  # weights twice, and gradients; or gradients twice
    phase = dict(
        simulation=calls * whole[0], policy=calls * whole[1], weights=4 * T / NETWORK if rlinf else 0.0,
        prefixes=again + (cache == "cpu") * prefixes * (1 + epochs) / PCIE,
        update=micros * gpu(max(3, times) * micro * velocity, max(3, times) * depth)
        + minibatches * ADAM * T / HBM / (N if fsdp else 1),
        gradients=sent / (NETWORK if rlinf else NVLINK),
    )
    longest, expert = max(phase, key=phase.get), "`--train expert`"
    helps = dict(
        simulation="more cores" if b > CORES else "environments on the GPU",  # a core for each is there
        policy="more environments side by side" if rlinf or overlapped > sum(whole) else "`--overlap`", weights=expert,
        prefixes=expert if train == "all" else "more GPUs" if rlinf else f"`--prefix-cache cpu`, {prefixes / FULL / 1e9:.0f} GB",
        update="more GPUs", gradients=expert if train == "all" else "fewer `--num-minibatches`",
    )
    total = sum(phase.values())
    return dict(setting=setting, hardware=hardware, train=train, phases=phase, iteration_s=total,
                overlapped_s=None if rlinf else total - calls * (sum(whole) - overlapped), held_bytes=held, prefix_bytes=prefixes,
                prefix_cache=cache, longest=longest, helps=helps[longest])


def everything(maniskill: dict[str, float]) -> dict:
    """What the result file holds of this. maniskill: core-seconds of a reset and of a step."""
    libero = read("libero_throughput")
    per_step = libero["args"]["workers"] / libero["median"]["ours"]["episodes"]  # resets included
    environments = dict(maniskill=maniskill, libero=dict(reset=0.0, step=per_step))
    names = "CORES HOST GPU PEAK HBM NVLINK NETWORK PCIE SHARE LAYER FULL ADAM MICRO".split()
    rows = [on_paper(*which, environments[which[0]]) for which in itertools.product(stepnft_pi0.PAPER, HARDWARE, MICRO)]
    return dict(environments=environments, constants={name: globals()[name] for name in names}, checks=checks(), paper=rows)
