"""The programs from end to end, on the real simulator: short runs, resuming, and one line for each mistake."""

import ast
import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_stepnft import harness, policies
from pi_stepnft.algos import pretrain, sft, stepnft_pi0
from pi_stepnft.envs import demos

ROOT = Path(__file__).resolve().parent.parent
STATE_DIMS = dict(rgb=29, state=42)  # of PickCube-v1
SHORT = (
    "--num-envs 2 --rollout-epochs 2 --group-size 2 --plain-every 2 --labels binary --eval-episodes 2 --final-eval-episodes 2 "
    "--update-epochs 1 --num-minibatches 2 --num-threads 1"
).split()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_checkpoint(folder: Path, obs_mode: str, state_dim: int | None = None) -> Path:
    """A tiny policy with random weights for PickCube-v1."""
    torch.manual_seed(0)
    state_dim = state_dim or STATE_DIMS[obs_mode]
    config = policies.Pi0Config.tiny(
        num_cameras=int(obs_mode == "rgb"), image_size=48, vlm_depth=2, vision_depth=1, state_dim=48, horizon=8
    )
    policy = policies.Pi0(config)
    policy.processor = policies.Processor(
        config, policies.Tokenizer(), policies.NormStats.identity(state_dim), policies.NormStats.identity(7)
    )
    policy.meta = dict(env_id="PickCube-v1", obs_mode=obs_mode, execute=5)
    policies.save(policy, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {mode: random_checkpoint(folder / mode, mode) for mode in ("rgb", "state")}


def run(script: str, *arguments, cwd: Path) -> None:
    """What `python algos/<script>.py <arguments>` does, without importing torch once more."""
    before = os.getcwd()
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", [f"algos/{script}.py", *map(str, arguments)]):
            runpy.run_path(str(ROOT / "algos" / f"{script}.py"), run_name="__main__")
    finally:
        os.chdir(before)


def only_run(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def train(cwd: Path, *arguments) -> Path:
    """A run of stepnft_pi0.py in `cwd`; returns its folder."""
    cwd.mkdir(exist_ok=True)
    run("stepnft_pi0", *arguments, cwd=cwd)
    return only_run(cwd)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return policies.load(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of everything in a TensorBoard folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# -------------------------------------------------------------------------------------------------------------- the outside


@pytest.mark.parametrize("module", [stepnft_pi0, sft, pretrain])
def test_help_explains_every_option(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        tyro.cli(module.Args, args=["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    docstrings = {}
    for base in reversed(module.Args.__mro__[:-1]):  # its own options and those that it shares
        source = ast.parse(Path(sys.modules[base.__module__].__file__).read_text())
        (definition,) = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        body = [node for node in definition.body if isinstance(node, ast.AnnAssign | ast.Expr)]
        options = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
        assert [body[i].target.id for i in options] == list(base.__annotations__)
        docstrings |= {body[i].target.id: body[i + 1].value.value for i in options}  # one per field, below it
    assert docstrings.keys() == module.Args.__dataclass_fields__.keys()
    for option, docstring in docstrings.items():
        assert f"--{option.replace('_', '-')}" in text
        assert docstring.splitlines()[0] in text  # as written


def told(script: str, *arguments, cwd: Path) -> str:
    """The one line with which a program ends that cannot do what it is told (tests/test_bad_input.py has the mistakes)."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(printed):
        run(script, *arguments, cwd=cwd)
    message = stop.value.code if isinstance(stop.value.code, str) else printed.getvalue().strip()
    assert stop.value.code and message.startswith("error: ") and "\n" not in message
    return message


def refusal(script: str, *arguments, cwd: Path) -> str:
    """As `told`, of a program that has not begun anything."""
    message = told(script, *arguments, cwd=cwd)
    assert not (cwd / "runs").exists()
    return message


def test_without_a_driver_workers_and_program_end_in_one_line(tmp_path):
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", VK_DRIVER_FILES="/nonexistent")
    command = [sys.executable, ROOT / "algos" / "stepnft_pi0.py", *"--obs-mode state --num-envs 1 --group-size 1".split()]
    command += ["--labels", "binary"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "[svulkan2]" not in line]  # SAPIEN has its own word
    assert len(lines) == 1 and lines[0].startswith("error: no usable Vulkan driver with VK_DRIVER_FILES=/nonexistent")
    assert done.returncode == 1 and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- runs


def test_an_rgb_run_leaves_everything_behind_and_can_be_resumed(checkpoints, tmp_path):
    folder = train(tmp_path, "--checkpoint", checkpoints["rgb"], *SHORT, "--iterations", 2, "--seed", 3)
    initial, policy, rollout_policy = (weights(f) for f in (checkpoints["rgb"], folder / "policy", folder / "rollout_policy"))
    trained = {name for name in initial if not torch.equal(initial[name], policy[name])}
    frozen = ("vision_tower.", "multi_modal_projector.", "language_model.")
    assert trained and not any(name.startswith(frozen) for name in trained)
    assert trained == {name for name in initial if not torch.equal(initial[name], rollout_policy[name])}
    assert policies.load(folder / "policy").meta["execute"] == 5

    assert iio.imread(folder / "curve.png").shape[-1] in (3, 4)
    film = iio.imread(tmp_path / "videos" / f"{folder.name}.mp4")
    assert film.ndim == 4 and len(film) > 50 and film.shape[-1] == 3  # a frame per control step
    assert film.std() > 5 and np.ptp(film.astype(int), axis=0).max() > 50  # of something that moves

    result = json.loads((folder / "result.json").read_text())
    assert (result["env_id"], result["obs_mode"], result["seed"], result["iterations"]) == ("PickCube-v1", "rgb", 3, 2)
    assert result["checkpoint"] == str(checkpoints["rgb"]) and result["args"]["num_envs"] == 2
    assert "algos/stepnft_pi0.py" in result["command"] and "--seed 3" in result["command"]
    assert 0 < result["env_steps"] <= 2 * 4 * 50  # iterations, episodes, their limit
    assert result["algorithm"] == "stepnft_pi0" and result["forward_passes"] == 4  # all K transitions of a chunk
    assert result["parameters_trained"] == sum(initial[name].numel() for name in trained) and result["peak_memory_gb"] > 0.1
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", result["commit"])
    assert result["training_minutes"] > 0 and result["versions"]["torch"] == torch.__version__
    for name in ("before", "after", "after_rollout_policy"):
        low, high = result[name]["interval"]
        assert result[name]["episodes"] == 2 and 0 <= low <= result[name]["success"] <= high <= 1
    assert [point["iteration"] for point in result["curve"]] == [0, 2]

    logged = scalars(folder)
    for tag in (
        "charts/rollout_success",
        "charts/SPS",
        "charts/ema_decay",
        "charts/success_exploring",
        "charts/success_plain",
        "losses/divergence",
        "losses/ranking",
        "losses/pref_acc",
        "losses/grad_norm",
    ):
        assert list(logged[tag]) == [1, 2] and np.isfinite(list(logged[tag].values())).all()
    assert logged["charts/env_steps"][2] == result["env_steps"]
    assert all(0.2 < share < 0.8 for share in logged["charts/signal"].values())  # of two groups one is plain
    level, after = logged["charts/noise_level"].values()
    assert level == 0.5 and after == pytest.approx(0.5 * math.exp(0.05))  # none of them succeeds
    peak = result["args"]["learning_rate"]  # reached in five iterations, and steered by at most 1.3 in each
    first, second = (logged["charts/learning_rate"][i] for i in (1, 2))
    assert first == pytest.approx(peak / 5) and peak / 4 < second < peak / 2 * 1.1 and second != pytest.approx(2 * peak / 5)

    events = set(folder.glob("events*"))
    arguments = folder / "args.json"
    arguments.write_text(json.dumps(json.loads(arguments.read_text()) | {"video": False}))
    run("stepnft_pi0", "--resume", f"runs/{folder.name}", "--iterations", 3, cwd=tmp_path)
    assert only_run(tmp_path) == folder
    result = json.loads((folder / "result.json").read_text())
    assert result["iterations"] == 3 and [point["iteration"] for point in result["curve"]] == [0, 2, 3]
    for old in events:
        old.unlink()
    assert list(scalars(folder)["losses/ranking"]) == [3]  # one iteration more, and no other again
    assert not same(weights(folder / "policy"), policy)


@pytest.fixture(scope="module")
def state_run(checkpoints, tmp_path_factory):
    """(run folder, its arguments): two iterations in state mode, uninterrupted."""
    arguments = ["--obs-mode", "state", "--checkpoint", checkpoints["state"], *SHORT, "--no-video"]
    return train(tmp_path_factory.mktemp("straight"), *arguments, "--iterations", 2), arguments


def test_one_seed_is_one_run_and_resuming_changes_nothing(state_run, checkpoints, tmp_path):
    straight, arguments = state_run
    one, other = (
        train(tmp_path / name, *arguments, "--iterations", 1, "--seed", seed) for name, seed in (("one", 1), ("other", 2))
    )
    policy, first = weights(one / "policy"), scalars(one)
    assert not same(policy, weights(other / "policy"))
    for tag in ("losses/loss", "losses/grad_norm", "losses/drift", "charts/env_steps"):
        assert first[tag][1] == scalars(straight)[tag][1] and (tag == "charts/env_steps" or first[tag] != scalars(other)[tag])

    # θ_old after the first iteration is 0.1 of what it was and 0.9 of θ
    initial, rollout_policy = weights(checkpoints["state"]), weights(one / "rollout_policy")
    for name, value in rollout_policy.items():
        torch.testing.assert_close(value, 0.1 * initial[name] + 0.9 * policy[name], rtol=1e-5, atol=1e-7)
    assert not same(rollout_policy, policy)

    run("stepnft_pi0", "--resume", one, "--iterations", 2, cwd=tmp_path)
    assert same(weights(one / "policy"), weights(straight / "policy"))
    assert same(weights(one / "rollout_policy"), weights(straight / "rollout_policy"))
    assert not same(weights(one / "policy"), policy)


def test_an_iteration_without_contrast_changes_nothing(state_run, checkpoints, tmp_path):
    """Group labels, and a policy that never succeeds: there is nothing to rank, and the run goes on."""
    _, arguments = state_run
    folder = train(tmp_path, *arguments, "--labels", "group", "--iterations", 1)
    assert json.loads((folder / "result.json").read_text())["iterations"] == 1
    logged = scalars(folder)
    assert logged["charts/signal"][1] == 0 and logged["charts/rollout_success"][1] == 0
    assert same(weights(folder / "policy"), weights(checkpoints["state"]))


@pytest.mark.slow
def test_resuming_follows_the_runs_own_arguments(state_run, checkpoints, tmp_path):
    straight, _ = state_run
    folder = shutil.copytree(straight, tmp_path / "runs" / straight.name, symlinks=True)
    before, stored = weights(folder / "policy"), json.loads((folder / "args.json").read_text())

    def refused(*arguments) -> str:
        return told("stepnft_pi0", "--resume", folder, *arguments, cwd=tmp_path)

    # options that are part of what is computed, on their own and together, whatever their form
    message = refused("--learning-rate", 1e-3, "--num-envs=4", "--no-mask_padding", "--iterations", 3)
    assert "have another --learning-rate, --mask-padding, --num-envs" in message and f"--checkpoint {folder}/policy" in message
    assert "another --obs-mode" in refused("--obs-mode", "rgb")

    # a finished run does not train on, nor less
    for iterations in ([], ["--iterations", 2], ["--iterations", 1]):
        assert f"{folder} has done its 2 iterations: to go on, give --iterations above that" in refused(*iterations)
    assert same(weights(folder / "policy"), before) and json.loads((folder / "args.json").read_text()) == stored

    # one that ended while it was being evaluated has its result still to write
    (folder / "result.json").unlink()
    run("stepnft_pi0", "--resume", folder, cwd=tmp_path)
    assert json.loads((folder / "result.json").read_text())["iterations"] == 2 and same(weights(folder / "policy"), before)

    # what may change, and what repeats the run's own arguments
    free = "--iterations 3 --max-minutes 5 --num-threads 2 --no-video --device cpu --num-envs 2 --labels binary".split()
    run("stepnft_pi0", "--resume", folder, *free, cwd=tmp_path)
    changed = dict(iterations=3, max_minutes=5.0, num_threads=2, video=False, device="cpu")
    assert json.loads((folder / "args.json").read_text()) == stored | changed
    result = json.loads((folder / "result.json").read_text())
    assert result["iterations"] == 3 and result["args"]["num_minibatches"] == 2 and not same(weights(folder / "policy"), before)


def test_a_signal_ends_the_iteration_and_resuming_changes_nothing(state_run, tmp_path):
    straight, arguments = state_run
    command = [sys.executable, ROOT / "algos" / "stepnft_pi0.py", *map(str, arguments), "--iterations", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    told = b""
    while b"STEPNFT" not in told:  # the first iteration has begun
        told += (some := process.stderr.read1())
        assert some, told
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told += process.communicate(timeout=300)[1]
    folder = only_run(tmp_path)
    *_, line = told.decode().splitlines()
    assert line == f"stopped by SIGTERM after iteration 1; go on with --resume runs/{folder.name}"
    assert process.returncode == 128 + signal.SIGTERM
    assert not (folder / "result.json").exists()
    run("stepnft_pi0", "--resume", folder, cwd=tmp_path)
    for name in ("policy", "rollout_policy"):
        assert same(weights(folder / name), weights(straight / name))
    assert json.loads((folder / "result.json").read_text())["iterations"] == 2


@pytest.mark.slow
def test_the_ablations_change_what_they_say(state_run, tmp_path):
    """One fixed transition is learnt from, and each target gives a loss of its own."""
    _, arguments = state_run
    times, rankings = [], []
    velocity = policies.Pi0.velocity

    def spy(policy, prefix, state, x_t, t):
        if policy.training:
            times.extend(t.flatten().tolist())
        return velocity(policy, prefix, state, x_t, t)

    for target in ("mean", "x0"):
        with mock.patch.object(policies.Pi0, "velocity", spy):
            folder = train(tmp_path / target, *arguments, "--target", target, "--transitions", 2, "--loss", "wmse",
                           "--iterations", 1)
        rankings.append(scalars(folder)["losses/ranking"][1])
        assert json.loads((folder / "result.json").read_text())["forward_passes"] == 1
    assert set(times) == {0.5}
    assert np.isfinite(rankings).all() and rankings[0] != rankings[1]


@pytest.mark.slow
def test_the_time_limit_is_for_one_sitting(state_run, tmp_path):
    """A run that the clock ended goes on where it stopped, by as much again."""
    _, arguments = state_run
    folder = train(tmp_path, *arguments, "--iterations", 3, "--max-minutes", 1e-6)
    for iteration in (1, 2):
        assert json.loads((folder / "result.json").read_text())["iterations"] == iteration
        run("stepnft_pi0", "--resume", folder, "--max-minutes", 1e-6, "--iterations", 3, cwd=tmp_path)
    assert json.loads((folder / "result.json").read_text())["iterations"] == 3


def test_a_short_sft_writes_a_policy_that_knows_its_data(tmp_path):
    arguments = "--obs-mode state --demos 4 --steps 5 --eval-episodes 4 --num-envs 4 --num-threads 1 --no-video --output out"
    with contextlib.redirect_stdout(None):
        run("sft", *arguments.split(), cwd=tmp_path)
    policy = policies.load(tmp_path / "out")
    data = demos.read(tmp_path / "demos" / "PickCube-v1-state-4-noise0.5.h5")
    assert len(data.start) == 4
    assert policy.processor.state_stats.mean == pytest.approx(data.state.mean(0), rel=1e-4, abs=1e-5)
    assert len(policy.processor.action_stats) == 7
    assert (policy.meta["env_id"], policy.meta["obs_mode"], policy.meta["execute"]) == ("PickCube-v1", "state", 4)
    made = policy.meta["sft"]
    assert (made["demos"], made["steps"], made["episodes"]) == (4, 5, 4)
    assert made["interval"][0] <= made["success"] <= made["interval"][1]
    assert list(scalars(only_run(tmp_path))["losses/flow"]) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_pi05_learns_to_read_and_then_from_demonstrations(tmp_path):
    """The whole way to a π0.5 policy: pre-training that reads numbers, few-shot SFT on it, with the state in the prompt."""
    options = "--obs-mode state --num-threads 1"
    arguments = f"{options} --demos 4 --steps 3 --eval-episodes 2 --num-envs 2 --no-video --output out --base read".split()
    with contextlib.redirect_stdout(None):
        run("pretrain", "--policy", "pi05", *options.split(), "--steps", 2, "--batch-size", 4, "--output", "read", cwd=tmp_path)
        run("sft", *arguments, cwd=tmp_path)  # the base says that it is π0.5
    read, policy = policies.load(tmp_path / "read"), policies.load(tmp_path / "out")
    assert read.meta["pretraining"]["number_error"] > 0
    assert isinstance(policy, policies.Pi05) and policy.processor.reads_state and not same(read.state_dict(), policy.state_dict())
    states = np.stack([policy.processor.state_stats.q01, policy.processor.state_stats.q99])
    prompts, mask = policy.processor.tokenize(["pick up the cube"] * 2, policy.processor.normalize_state(states))
    assert mask.all(dim=1).tolist() == [False, False] and not torch.equal(prompts[0], prompts[1])
    with contextlib.redirect_stdout(None):
        run("stepnft_pi05", "--obs-mode", "state", "--checkpoint", "out", "--iterations", 1, "--no-video", *SHORT, cwd=tmp_path)
    (trained,) = (tmp_path / "runs").glob("stepnft-pi05-*")
    assert not same(policy.state_dict(), weights(trained / "policy"))
    for algorithm, *options in (("stepnft_pi0", "--checkpoint"), ("sft", "--policy", "pi0", "--base")):
        named = refusal(algorithm, "--obs-mode", "state", *options, tmp_path / "out", cwd=trained)
        assert "holds a pi05 policy; expected pi0" in named


def test_an_update_that_is_no_number_is_left_out_and_many_in_a_row_end_the_run():
    training = harness.Run.__new__(harness.Run)
    training.args = SimpleNamespace(max_grad_norm=1.0, max_bad_updates=3)
    training.iteration, training.folder, training.bad_updates, training._bad = 7, Path("runs/x"), 0, {}
    actor, critic = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))

    def updated(*gradients: float) -> bool:
        for parameter, value in zip((actor, critic), gradients):
            parameter.grad = torch.full_like(parameter, value)
        return training.clip_gradients(losses, grad_norm=[actor], value_grad_norm=[critic])

    losses, nan = harness.Averages(), float("nan")
    assert updated(3.0, 4.0) and actor.grad.norm() == pytest.approx(1) and critic.grad.norm() == pytest.approx(1)
    assert [updated(nan, 0.0), updated(0.0, float("inf")), updated(0.0, 0.0), updated(nan, nan)] == [False, False, True, False]
    assert training.bad_updates == 3 and losses.means()["grad_norm"] == pytest.approx(3 * 2**0.5 / 3)
    updated(nan, nan)
    training._sound(True, "another kind")  # as at the end of an iteration
    with pytest.raises(harness.RunError, match="no finite number, 3 times in a row, at iteration 7: lower --learning-rate"):
        updated(nan, nan)


@pytest.mark.parametrize("arguments, line, status", [
    ((), "interrupted; all is there", 130),
    (("go on with --resume runs/x", signal.SIGTERM), "interrupted; go on with --resume runs/x", 143),
])
def test_an_interruption_is_one_line_and_the_conventional_status(arguments, line, status, capsys):
    with pytest.raises(SystemExit) as ended, harness.one_line_errors("all is there"):
        raise KeyboardInterrupt(*arguments)
    assert ended.value.code == status and capsys.readouterr().err == line + "\n"
