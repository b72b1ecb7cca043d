"""SFT and pre-training can be left alone: gone on with to the same end, ended by a signal, validated on what is not trained on."""

import contextlib
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_main import one_thread, only_run, run, same, scalars, told, weights  # noqa: F401

from pi_stepnft import harness, policies
from pi_stepnft.envs import demos, reading
from pi_stepnft.harness import checkpoints

LENGTHS = (4, 5, 3, 6, 4)
SFT = ("--obs-mode state --dataset {data} --eval-episodes 0 --steps 6 --batch-size 4 --draws 2 --val-demos 2 --val-every 4 "
       "--save-every 4 --keep 9 --num-threads 1").split()
PRETRAIN = "--dataset {data} --steps 6 --batch-size 4 --image-size 48 --save-every 4 --keep 9 --num-threads 1 --output out".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Demonstrations in state mode, whose first number is the episode's and whose second counts rows; and scenes in rgb."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for mode, pictures in (("state", (0, 8, 8, 3)), ("rgb", (1, 48, 48, 3))):
        with h5py.File(folder / f"{mode}.h5", "w") as file:
            file.attrs.update(format=demos.FORMAT, env_id="PickCube-v1", obs_mode=mode, instruction="pick up the cube")
            for index, T in enumerate(LENGTHS):
                state = rng.standard_normal((T, 6)).astype(np.float32)
                state[:, 0], state[:, 1] = index, sum(LENGTHS[:index]) + np.arange(T)
                arrays = dict(image=rng.integers(0, 255, (T, *pictures), np.uint8), state=state,
                              action=rng.uniform(-1, 1, (T, 7)).astype(np.float32),
                              objects=rng.standard_normal((T, 1, 3)).astype(np.float32))
                for name, values in arrays.items():
                    file[f"episode_{index}/{name}"] = values
    return dict(sft=folder / "state.h5", pretrain=folder / "rgb.h5")


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """Files are read in a process of their own, which takes longer than these trainings."""
    gather, known = reading.gather, {}

    def remembered(episodes, path, *arguments, **options):
        key = path, path.stat().st_mtime_ns
        if key not in known:
            known[key] = gather(episodes, path, *arguments, **options)
        return dict(known[key])

    with mock.patch.object(reading, "gather", remembered):
        yield


def train(program: str, data: dict[str, Path], cwd: Path, *more) -> Path:
    cwd.mkdir(exist_ok=True)
    options = [word.format(data=data[program]) for word in dict(sft=SFT, pretrain=PRETRAIN)[program]]
    with contextlib.redirect_stdout(None):
        run(program, *options, *more, cwd=cwd)
    return only_run(cwd)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The run of each program that nothing has interrupted, made when it is first asked for."""
    return functools.cache(lambda program: train(program, data, tmp_path_factory.mktemp(program)))


def end(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: weights, moments, generators."""
    last = folder / "checkpoints" / "last"
    files = {path.relative_to(last): load_file(path) for path in last.rglob("*.safetensors")}
    return {f"{file}: {name}": value for file, held in files.items() for name, value in held.items()}


def outcome(folder: Path) -> dict:
    return {name: value for name, value in json.loads((folder / "result.json").read_text()).items()
            if name in ("iterations", "bad_updates", "val_flow", "held_out_mm", "demos", "val_demos")}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("program", ["sft", pytest.param("pretrain", marks=SLOW)])
def test_a_training_that_a_signal_or_a_kill_ended_ends_as_the_one_that_never_was(program, data, straight, tmp_path, capsys):
    calls, step = [], torch.optim.AdamW.step

    def stopped(optimizer, *arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(optimizer, *arguments)

    with mock.patch.object(torch.optim.AdamW, "step", stopped), pytest.raises(SystemExit) as ended:
        train(program, data, tmp_path)
    folder = only_run(tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM and len(calls) == 2
    line = f"stopped by SIGTERM after iteration 2; go on with --resume runs/{folder.name}"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert checkpoints.newest(folder).name == "000002" and not (folder / "result.json").exists()

    killed = shutil.copytree(straight(program), tmp_path / "killed", symlinks=True)  # when the last checkpoint was not yet there
    for path in killed.glob("checkpoints/000006*"):
        shutil.rmtree(path)
    (killed / "result.json").unlink()
    for path in (folder, killed):
        with contextlib.redirect_stdout(None):
            run(program, "--resume", path, cwd=tmp_path)
        assert same(end(path), end(straight(program))) and outcome(path) == outcome(straight(program))
    expected = scalars(straight(program))
    for tag, values in scalars(folder).items():
        if tag.startswith("losses/"):
            assert values == expected[tag]
    assert same(weights(folder / "policy"), weights(straight(program) / "policy"))
    if program == "pretrain":
        assert same(weights(tmp_path / "out"), weights(folder / "policy"))


@SLOW
@pytest.mark.parametrize("how", ["lora", "expert"])
def test_what_is_trained_of_a_base_can_be_gone_on_with(how, data, straight, tmp_path):
    options = "--base", straight("sft") / "policy", "--train", how
    whole = train("sft", data, tmp_path / "whole", *options)
    part = shutil.copytree(whole, tmp_path / "part", symlinks=True)
    for path in part.glob("checkpoints/000006*"):
        shutil.rmtree(path)
    (part / "result.json").unlink()
    with contextlib.redirect_stdout(None):
        run("sft", "--resume", part, "--output", "out", cwd=tmp_path)
    assert same(end(part), end(whole)) and same(weights(tmp_path / "out"), weights(whole / "policy"))
    assert not same(weights(whole / "policy"), weights(straight("sft") / "policy"))


def test_what_cannot_be_gone_on_with_is_told(data, straight, tmp_path):
    folder = shutil.copytree(straight("sft"), tmp_path / "runs" / "x", symlinks=True)
    refused = lambda *options: told("sft", "--resume", folder, *options, cwd=tmp_path)
    assert "has done its 6 iterations: start a new run" in refused()
    message = refused("--steps", 8, "--val-demos", 1)
    assert f"another --steps, --val-demos: leave it out, or start a new run with --base {folder}/policy" in message
    shutil.rmtree(next(folder.glob("checkpoints/000006+")))
    (folder / "result.json").unlink()
    other = shutil.copy(data["sft"], tmp_path / "other.h5")
    with h5py.File(other, "a") as file:
        file["episode_0/state"][0, 2] += 1
    arguments = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(arguments | dict(dataset=str(other))))
    assert f"the demonstrations are not those that {folder} was begun with" in refused()


def test_gradients_of_parts_add_up_to_the_batchs(data, straight, tmp_path):
    whole, parts = (scalars(folder) for folder in (straight("sft"), train("sft", data, tmp_path, "--micro-batch", 3)))
    for tag in ("losses/flow", "losses/grad_norm"):
        assert list(parts[tag].values()) == pytest.approx(list(whole[tag].values()), rel=1e-3)
        assert parts[tag][1] == pytest.approx(whole[tag][1], rel=1e-5) and np.ptp(list(whole[tag].values())) > 0.1


@pytest.mark.parametrize(("sentence", "room"), [("pick up the cube", 16), (" ".join(["pick up the cube"] * 6), 31)])
def test_a_new_policy_has_room_for_the_longest_sentence(sentence, room, data, tmp_path):
    shutil.copy(data["sft"], file := tmp_path / "demos.h5")
    with h5py.File(file, "r+") as demonstrations:
        demonstrations.attrs["instruction"] = sentence
    folder = train("sft", dict(sft=file), tmp_path)
    assert policies.read_json(folder / "policy" / "config.json")["model"]["max_token_len"] == room


def test_a_policy_tells_the_environment_s_options_of_its_last_training(data, tmp_path, capsys):
    first = train("sft", data, tmp_path / "a", "--env-options", "speed=2", "colour=red")
    then = train("sft", data, tmp_path / "b", "--base", first / "policy")
    told = [policies.read_json(folder / "policy" / "config.json")["meta"] for folder in (first, then)]
    assert told[0]["env_options"] == ["speed=2", "colour=red"] and "env_options" not in told[1]
    policy = policies.load(first / "policy")
    for options, note in ((["colour=red", "speed=2"], ""), ([], "note: mine was trained with --env-options speed=2 colour=red\n")):
        capsys.readouterr()
        harness.check_task(policy, "PokeCube-v1", "state", options, "mine")
        assert capsys.readouterr().out == note


def test_the_validation_loss_is_of_whole_demonstrations_that_are_not_trained_on(data, tmp_path):
    seen, flow_loss = {True: [], False: []}, policies.Pi0.flow_loss

    def spy(policy, prefix, state, *arguments):
        stats = policy.processor.state_stats
        rows = state[:, :6].numpy() * stats.std + stats.mean
        seen[policy.training].append(rows[:, :2].round().astype(int))
        return flow_loss(policy, prefix, state, *arguments)

    with mock.patch.object(policies.Pi0, "flow_loss", spy):
        folder = train("sft", data, tmp_path, "--steps", 9, "--batch-size", 32)
    trained, held_out = (np.unique(np.concatenate(seen[training]), axis=0) for training in (True, False))
    assert len(set(held_out[:, 0])) == 2 and len(set(trained[:, 0])) == len(LENGTHS) - 2
    assert sorted([*trained[:, 1], *held_out[:, 1]]) == list(range(sum(LENGTHS)))  # each row on one side, and whole episodes
    assert [len(rows) for rows in seen[False]] == [len(held_out)] * 4  # after 0, 4 and 8 updates, and at the end
    policy = policies.load(folder / "policy")
    assert policy.processor.state_stats.mean[:2] == pytest.approx(trained.mean(0), rel=1e-5)  # nor are they normalised by
    logged, found = scalars(folder)["losses/val_flow"], outcome(folder)
    assert list(logged) == [1, 5, 9] and found["val_flow"] == pytest.approx(logged[9])  # the last one after all updates
    assert (found["demos"], found["val_demos"]) == (3, 2)
    assert policy.meta["sft"]["val_flow"] == found["val_flow"]
