"""Checkpoints of a run: whole or not there, whatever operation a kill or a full disk comes at; a damaged one is passed over."""

import copy
import errno
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from pi_stepnft import harness, policies
from pi_stepnft.harness import checkpoints
from pi_stepnft.harness.run import HELD, new_folder


def make_policy(seed: int) -> policies.Pi0:
    torch.manual_seed(seed)
    sizes = dict(num_cameras=0, vlm_width=16, vlm_depth=1, vlm_mlp=16, expert_width=16, expert_mlp=16, heads=1, head_dim=16)
    config = policies.Pi0Config.tiny(**sizes)
    policy = policies.Pi0(config)
    stats = policies.NormStats.identity(3)
    policy.processor = policies.Processor(config, policies.Tokenizer(), stats, stats)
    return policy


class Training:
    """A run of two policies, some tensors beside them, and Adam; `step` changes all of them."""

    def __init__(self, folder: Path):
        self.folder, self.iteration = folder, 0
        self.trained = dict(policy=make_policy(1), rollout_policy=make_policy(2))
        self.unsaved, self.memory = dict(head=[torch.zeros(3)]), deque(maxlen=2)
        self.optimizer = torch.optim.Adam(self.trained["policy"].parameters())
        self.rng = np.random.default_rng(0)

    def step(self) -> "Training":
        self.iteration += 1
        torch.manual_seed(self.iteration)
        for parameter in self.trained["policy"].parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        for old, new in zip(self.trained["rollout_policy"].parameters(), self.trained["policy"].parameters()):
            old.data.lerp_(new.data, 0.5)
        self.unsaved["head"][0] += 1
        self.memory.append([torch.rand(self.iteration, 2), torch.arange(3)])
        self.rng.integers(10)
        return self

    def save(self, **options) -> None:
        lost = dict(rollouts=0, evaluations=0, broken=0)
        progress = dict(iteration=self.iteration, env_steps=0, trained_s=0.0, curve=[], lost=lost, bad_updates=0)
        checkpoints.save(self.folder, self.trained, self.optimizer, self.rng, progress, self.unsaved, self.memory, **options)

    def facts(self) -> list:
        """All that a checkpoint has to bring back."""
        states = self.optimizer.state_dict()["state"]
        moments = [states[index][name] for index in sorted(states) for name in sorted(states[index])]
        weights = [value for policy in self.trained.values() for value in policy.state_dict().values()]
        tensors = [self.unsaved["head"][0], *weights, *moments, *itertools.chain(*self.memory)]
        return [self.iteration, self.rng.bit_generator.state["state"], *(tensor.clone() for tensor in tensors)]

    def resume(self) -> "Training":
        path = checkpoints.newest(self.folder)
        self.trained = {name: policies.load(path / name) for name in self.trained}
        parameters = list(self.trained["policy"].parameters())
        self.optimizer.param_groups[0]["params"] = parameters
        progress, memory = checkpoints.restore(path, self.optimizer, self.rng, self.unsaved)
        self.iteration = progress["iteration"]
        self.memory.clear()
        self.memory.extend(memory)
        return self


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other)
    )


def in_a_fork(work) -> int:
    """The exit status of `work`, run in a process that shares nothing with this one afterwards."""
    child = os.fork()
    if not child:
        gc.disable()  # what other tests have left of SAPIEN waits, when it is freed, for threads that a fork does not have
        try:
            work()
        except policies.CheckpointError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink")


def at_operation(number: int, folder: Path, act):
    """From now on `act` is called at the number-th file operation within the folder."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                act()

    sys.addaudithook(hook)


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("act, status", [(lambda: os._exit(9), 9), (full_disk, 1)], ids=["killed", "disk full"])
def test_at_every_file_operation_of_a_save_the_run_has_the_old_or_the_new_checkpoint(act, status, tmp_path):
    training = Training(tmp_path / "run").step()
    training.save()
    before = training.facts()
    after = training.step().facts()
    start, number, outcomes = shutil.copytree(tmp_path / "run", tmp_path / "start", symlinks=True), 0, []
    while True:
        number += 1
        shutil.rmtree(training.folder)
        shutil.copytree(start, training.folder, symlinks=True)

        def work(number=number):
            at_operation(number, training.folder, act)
            training.save()

        code = in_a_fork(work)
        resumed = Training(training.folder).resume()
        found = [same(resumed.facts(), facts) for facts in (before, after)]
        assert found in ([True, False], [False, True]), number
        assert (training.folder / "policy" / "model.safetensors").is_file()
        outcomes.append((code, found[1]))
        resumed.step().save()  # and the next save works, and clears up
        assert not list((training.folder / "checkpoints").glob(".*"))
        if code == 0 and number > 10 and outcomes[-2][0] == 0:
            break
    codes = [code for code, _ in outcomes]
    assert codes.count(status) > 20 and {done for code, done in outcomes if code == status} == {False, True}
    assert outcomes[-1] == (0, True)


def test_the_last_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    training = Training(tmp_path)
    facts = []
    for _ in range(3):
        facts.append(training.step().facts())
        training.save()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["000002", "000003", "last"]
    assert same(Training(tmp_path).resume().facts(), facts[2])
    weights = tmp_path / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert same(Training(tmp_path).resume().facts(), facts[1])
    assert "000003 is damaged (policy/model.safetensors changed since it was written)" in capsys.readouterr().out
    (tmp_path / "checkpoints" / "000002" / "training.json").unlink()
    with pytest.raises(policies.CheckpointError, match="holds no checkpoint to go on with"):
        checkpoints.newest(tmp_path)


def test_a_second_save_of_an_iteration_does_not_endanger_the_first(tmp_path):
    training = Training(tmp_path).step()
    training.save(keep=1)
    training.save(keep=1)
    assert (tmp_path / "checkpoints" / "last").readlink() == Path("000001+")
    assert same(Training(tmp_path).resume().facts(), training.facts())
    for number in range(2, 5):  # a finished run that is resumed only to be evaluated saves the same iteration again
        training.save(keep=2)
        assert (tmp_path / "policy" / "model.safetensors").is_file()
        assert checkpoints.newest(tmp_path).name == "000001" + number * "+"


def test_a_run_that_went_back_from_a_damaged_checkpoint_keeps_what_it_saves_from_there(tmp_path):
    training = Training(tmp_path).step()
    training.save()
    training.step().step().save()
    (tmp_path / "checkpoints" / "000003" / "manifest.json").unlink()
    again = Training(tmp_path).resume().step()
    again.save(keep=1)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["000002", "last"]
    assert same(Training(tmp_path).resume().facts(), again.facts())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    training = Training(tmp_path).step()
    training.save()
    before = copy.deepcopy(training.facts())
    next(training.step().trained["policy"].parameters()).data.fill_(float("nan"))
    with pytest.raises(policies.CheckpointError, match="NaN"):
        training.save()
    assert same(Training(tmp_path).resume().facts(), before)


@pytest.mark.parametrize("name", ["manifest.json", "training.json", "training.safetensors", "policy/config.json"])
def test_what_is_no_file_is_damage_and_not_waited_for(name, tmp_path, capsys):
    training = Training(tmp_path).step()
    training.save()
    training.step().save()
    file = tmp_path / "checkpoints" / "000002" / name
    file.unlink()
    os.mkfifo(file)
    assert checkpoints.newest(tmp_path).name == "000001"
    assert "000002 is damaged" in capsys.readouterr().out


def test_a_manifest_names_no_file_of_another_folder(tmp_path, capsys):
    Training(tmp_path).step().save()
    manifest = tmp_path / "checkpoints" / "000001" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["sha256"]["../../secret"] = ""
    manifest.write_text(json.dumps(content))
    with pytest.raises(policies.CheckpointError, match="holds no checkpoint to go on with: .*'../../secret', outside its folder"):
        checkpoints.newest(tmp_path)


def test_a_run_without_a_checkpoint(tmp_path):
    with pytest.raises(policies.CheckpointError, match="there is none"):
        checkpoints.newest(tmp_path)



def test_a_run_that_was_copied_with_what_its_links_point_to_can_be_gone_on_with(tmp_path):
    training = Training(tmp_path / "run").step()
    training.save()
    copied = Training(shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)).resume()
    copied.step().save()
    assert (copied.folder / "policy").is_symlink() and same(Training(copied.folder).resume().facts(), copied.facts())


def test_a_run_is_one_process_s_alone(tmp_path):
    run = harness.Run.__new__(harness.Run)
    run.folder = tmp_path
    program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline()
        with pytest.raises(harness.RunError, match="another process is training in"):
            run._alone()
        other.communicate("")
    run._alone()
    run._alone()  # this process may
    os.close(HELD.pop(tmp_path.resolve()))


def test_a_folder_that_cannot_be_made_is_an_error_and_not_another_name(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere" / "disk")  # as where a disk is not mounted
    with pytest.raises(OSError):
        new_folder(tmp_path / "runs" / "x")
    assert new_folder(tmp_path / "y").name == "y" and new_folder(tmp_path / "y").name == "y+2"


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again_ends_as_the_one_that_never_was(tmp_path):
    program, output = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py", tmp_path / "kills.json"
    options = ("--obs-mode state --num-envs 16 --rollout-epochs 1 --iterations 8 --save-every 1 --eval-every 2 --eval-episodes 8 "
               "--final-eval-episodes 8 --num-threads 1 --no-video")
    counts = ["--moments", "2", "--operations", "2", "--full", "0", "--signals", "1"]
    command = [sys.executable, str(program), "--algos", "stepnft_pi0", *counts, f"--options={options}", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(output.read_text())["runs"]["stepnft_pi0"]
    assert sum(found["interruptions"].values()) == 6 and found["statuses"]["SIGTERM"] == [143] and not found["different"]
