"""Does lerobot act as we do with a policy that `policies.export(…, layout="lerobot")` has written, and does it succeed as often?

    python benchmarks/lerobot_export.py --python python3.12              # tiny policies: actions, then success in its evaluation
    python benchmarks/lerobot_export.py --parts full --types pi0 pi05    # full size, random weights: 23 GB of memory, 15 GB of disk

lerobot's own code, unmodified, with all it imports, in a virtual environment that is made for it (Python 3.12): `from_pretrained`
of both policies, the processors that `make_pre_post_processors` loads, `make_env` on a repository of the hub that lies in the
cache, `eval_policy`. At tiny sizes its table of sizes is patched, which is in its code (lerobot_reference.sizes).

- actions: the largest difference of a chunk in the environment's units, relative to the largest action, from the same pictures,
  state, instruction and noise, over processors and policy.
- evaluation: episodes of the bundled policies on the same seeds by algos/evaluate.py's function and by lerobot's, whose noise is
  drawn once by its own generator, and once put in: that of the episode's seed and the turn, as here.
- full: actions at full size. Each policy alone in memory, in a process of its own.
"""

import importlib
import json
import multiprocessing as mp
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import torch
import tyro
from lerobot_reference import LEROBOT, run_in_venv, sizes, whole_lerobot
from load_full_size import TINY_TOKENIZER, peak_memory, write

from pi_stepnft import envs, harness, policies
from pi_stepnft.envs.envhub import CAMERAS
from pi_stepnft.harness.evaluation import by_ode, evaluate
from pi_stepnft.policies import NormStats, Pi0, Pi0Config, Pi05, Pi05Config, Processor, Tokenizer

PI0 = dict(
    image_size=56, patch_size=14, num_cameras=3, vision_width=96, vision_depth=3, vision_mlp=192, vision_heads=4,
    vlm_width=128, vlm_depth=4, vlm_mlp=256, expert_width=64, expert_mlp=128, heads=8, kv_heads=1, head_dim=32,
    vocab_size=768, max_token_len=40, horizon=10,
)
PI05 = {**PI0, "max_token_len": 80}
CASES = {
    "pi0": (Pi0, Pi0Config(**PI0), ()),
    "pi0, relative actions": (Pi0, Pi0Config(**PI0), (0, 1, 2, 4)),
    "pi05": (Pi05, Pi05Config(**PI05), ()),
    "pi05, no state in the prompt": (Pi05, Pi05Config(**PI05, discrete_state=False), ()),
    "pi05, relative actions": (Pi05, Pi05Config(**PI05), (0, 1, 2, 4)),
}
TEXTS = ["pick up the red cube and move it to the goal position", "open the middle drawer of the cabinet", "push"]


@dataclass
class Args:
    parts: tuple[Literal["actions", "evaluation", "full"], ...] = ("actions", "evaluation")
    """what to compare"""
    types: tuple[Literal["pi0", "pi05"], ...] = ("pi0", "pi05")
    """of the full size"""
    seeds: int = 3
    """random policies and observations per case"""
    limit: float = 1e-5
    """largest relative difference of actions that passes"""
    checkpoints: tuple[str, ...] = ("pi0-tiny-pickcube-rgb", "pi05-tiny-pickcube-rgb")
    """bundled policies that are evaluated"""
    episodes: int = 64
    """of each evaluation"""
    num_envs: int = 32
    """environments side by side"""
    venv: Path = Path(tempfile.gettempdir()) / f"lerobot-{LEROBOT}-whole"
    """virtual environment for lerobot, made if it is not there"""
    python: str = "python3.12"
    """what the environment is made by"""
    out: Path = Path(__file__).parent / "results" / "lerobot_export.json"
    """results file; parts that are not run keep what it has"""


def lerobot_policy(folder: Path, kind: str, config: Pi0Config | None, dtype: str = "float32"):
    """lerobot's policy in a folder and its two processors. config: of ours, whose sizes its code is given; None for its own."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    theirs = {"pi0": "PI0Policy", "pi05": "PI05Policy"}[kind]
    settings = PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--dtype={dtype}"])
    if config is None:
        policy = getattr(module, theirs).from_pretrained(folder, config=settings)
    else:
        with sizes(module, config):
            policy = getattr(module, theirs).from_pretrained(folder, config=settings)
    return policy.eval(), *make_pre_post_processors(policy.config, str(folder))


@torch.no_grad()
def lerobot_actions(policy, before, after, obs: dict, texts: list[str], noise: torch.Tensor, cameras: list[str]) -> np.ndarray:
    """Chunks in the environment's units, from an observation as its environments give it."""
    from lerobot.envs.utils import preprocess_observation

    pixels = {name: obs["image"][:, index] for index, name in enumerate(cameras)}
    prepared = preprocess_observation({"pixels": pixels, "agent_pos": obs["state"]}) | {"task": texts}
    return after(policy.predict_action_chunk(before(prepared), noise=noise)).numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


# ------------------------------------------------------------------------------------------------------------------ tiny policies


def compare_actions(name: str, seed: int) -> float:
    """Relative difference of a random policy's actions, with all cameras and with one that is absent."""
    model, config, relative = CASES[name]
    torch.manual_seed(seed)
    policy = model(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(2, 3, (500, 8)), rng.normal(-1, 2, (500, 7))
    states[:, 7] = 0.5  # a gripper that nothing moved: a deviation of 0.01
    stats = NormStats.from_data(states), NormStats.from_data(actions)
    policy.processor = Processor(config, Tokenizer(), *stats, relative=relative)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        policies.export(policy.eval(), folder, layout="lerobot")
        reference = lerobot_policy(Path(folder), config.type, config)
        for cameras in (3, 2):
            side = config.image_size
            images = rng.integers(0, 256, (len(TEXTS), cameras, side, side, 3), dtype=np.uint8)
            obs = {"image": images, "state": rng.normal(2, 3, (len(TEXTS), 8)).astype(np.float32)}
            noise = torch.from_numpy(rng.standard_normal((len(TEXTS), config.horizon, config.action_dim), np.float32))
            theirs = lerobot_actions(*reference, obs, TEXTS, noise, list(CAMERAS[:cameras]))
            worst = max(worst, difference(policy.act(obs, TEXTS, noise=noise), theirs))
    return worst


def hub_repository(cache: Path, env_id: str, image_size: int) -> str:
    """A repository with an env.py, as the hub's cache holds it after a download; returns its id."""
    snapshot = cache / "models--me--env" / "snapshots" / "0123456789012345678901234567890123456789"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    (snapshot / "env.py").write_text(
        f"from pi_stepnft.envs.envhub import hub\n\nmake_env = hub({env_id!r}, image_size={image_size})\n"
    )
    return "me/env"


def compare_success(name: str, args: Args) -> dict:
    """Success of a bundled policy by our evaluation and by lerobot's, episode by episode."""
    from lerobot.envs.factory import make_env
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.scripts.lerobot_eval import eval_policy

    policy = policies.load(name)
    env_id, steps, execute = (policy.meta[key] for key in ("env_id", "num_steps", "execute"))
    began = time.time()
    venv = envs.make(env_id, args.num_envs, image_size=policy.config.image_size, chunk=1, observe_terminal=False)
    ours = evaluate(venv, by_ode(policy, steps), args.episodes, execute=execute)
    venv.close()
    found = dict(checkpoint=name, episodes=args.episodes, ours=ours.rate, interval=ours.interval, ours_s=time.time() - began)

    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary, "policy"), Path(temporary, "hub")
        policies.export(policy, folder, layout="lerobot")
        theirs, before, after = lerobot_policy(folder, policy.config.type, policy.config)
        repository = hub_repository(cache, env_id, policy.config.image_size)
        made = make_env(repository, args.num_envs, use_async_envs=True, hub_cache_dir=str(cache), trust_remote_code=True)
        (env,) = made[env_id].values()
        begun: dict = {}
        reset = env.reset

        def remember(**options):
            begun.update(seeds=options["seed"], turn=0)
            return reset(**options)

        def noise_of_the_turn(shape, device):
            drawn = [np.random.default_rng([seed, begun["turn"]]).standard_normal(shape[1:], np.float32) for seed in begun["seeds"]]
            begun["turn"] += 1
            return torch.from_numpy(np.stack(drawn)).to(device)

        env.reset = remember
        nothing = PolicyProcessorPipeline(steps=[])
        own_noise = theirs.model.sample_noise
        for title, noise in (("same_noise", noise_of_the_turn), ("own_noise", own_noise)):
            torch.manual_seed(0)
            theirs.model.sample_noise = noise
            began = time.time()
            info = eval_policy(env, theirs, nothing, nothing, before, after, args.episodes, start_seed=envs.EVAL_SEED)
            success = np.array([episode["success"] for episode in info["per_episode"]])
            assert [episode["seed"] for episode in info["per_episode"]] == ours.seeds.tolist()
            found[title] = float(success.mean())
            found[f"{title}_differ"] = int((success != ours.success).sum())
            found[f"{title}_s"] = time.time() - began
        env.close()
    return found


# ---------------------------------------------------------------------------------------------------------------------- full size


def observation(config: Pi0Config) -> tuple[dict, list[str], torch.Tensor]:
    """Of two cameras, with instruction and noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 2, config.image_size, config.image_size, 3), dtype=np.uint8)
    noise = torch.from_numpy(rng.standard_normal((1, config.horizon, config.action_dim), np.float32))
    return {"image": images, "state": rng.uniform(-1, 1, (1, 8)).astype(np.float32)}, TEXTS[:1], noise


def export_full(folder: Path) -> None:
    policy = policies.load(folder / "openpi", dtype=torch.bfloat16, tokenizer=TINY_TOKENIZER)
    policies.export(policy, folder / "lerobot", layout="lerobot", dtype="bfloat16")


def act_full(folder: Path) -> tuple[np.ndarray, float]:
    """Our actions from the exported weights, computed in float32, and the most memory that took, GB."""
    policy = policies.load(folder / "lerobot")
    obs, texts, noise = observation(policy.config)
    return policy.act(obs, texts, noise=noise), peak_memory() / 1e9


def lerobot_full(folder: Path, kind: str) -> tuple[np.ndarray, float]:
    """lerobot's, its code and its sizes as they are."""
    reference = lerobot_policy(folder / "lerobot", kind, None)
    config = policies.checkpoint.TYPES[kind][1]()
    return lerobot_actions(*reference, *observation(config), list(CAMERAS[:2])), peak_memory() / 1e9


def compare_full(kind: str) -> dict:
    """Relative difference of actions at full size, each step in a process of its own."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), []
        (folder / "openpi").mkdir()
        for step, arguments in (
            (write, (kind, folder / "openpi")), (export_full, (folder,)), (act_full, (folder,)), (lerobot_full, (folder, kind))
        ):
            with context.Pool(1) as pool:
                results.append(pool.apply(step, arguments))
            if step is export_full:
                (folder / "openpi" / "model.safetensors").unlink()
    (ours, our_gb), (theirs, their_gb) = results[2:]
    return dict(type=kind, error=difference(ours, theirs), our_peak_gb=our_gb, lerobot_peak_gb=their_gb)


def main(args: Args) -> int:
    run_in_venv(args.venv, whole_lerobot(), args.python)
    os.environ["HF_HUB_OFFLINE"] = "1"
    record = json.loads(args.out.read_text()) if args.out.is_file() else {}
    packages = {name: version(name) for name in ("lerobot", "transformers", "torch", "gymnasium", "mani-skill")}
    record |= dict(python=platform.python_version(), packages=packages)
    failed = []
    if "actions" in args.parts:
        torch.set_num_threads(1)
        errors = record["actions"] = {name: max(compare_actions(name, seed) for seed in range(args.seeds)) for name in CASES}
        failed += [name for name, error in errors.items() if not error <= args.limit]
        print(f"| largest relative difference to lerobot {LEROBOT} | actions |\n| --- | --- |")
        print("\n".join(f"| {name} | {error:.1e} |" for name, error in errors.items()))
    if "evaluation" in args.parts:
        rows = record["evaluation"] = [compare_success(name, args) for name in args.checkpoints]
        failed += [row["checkpoint"] for row in rows if row["same_noise_differ"]]
        print("| success, % | ours | lerobot, same noise | episodes that differ | its own noise |\n| --- | --- | --- | --- | --- |")
        for row in rows:
            rates = {title: f"{100 * row[title]:.1f}" for title in ("ours", "same_noise", "own_noise")}
            unlike = f"{row['same_noise_differ']} of {row['episodes']}"
            print(f"| {row['checkpoint']} | {rates['ours']} | {rates['same_noise']} | {unlike} | {rates['own_noise']} |")
    if "full" in args.parts:
        record["full"] = record.get("full", {}) | {kind: compare_full(kind) for kind in args.types}
        failed += [kind for kind in args.types if not record["full"][kind]["error"] <= args.limit]
        print("\n".join(str(record["full"][kind]) for kind in args.types))
    args.out.write_text(json.dumps(dict(commit=harness.commit()) | record, indent=2) + "\n")
    if failed:
        print(f"beyond the limit, or not equal: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
