"""Several ranks do the work of one process: its episodes, its gradients, its files. Ranks are forks of a process that has imported
what they need; torchrun's own part, which takes a while to start, is in the slow tests."""

import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reinforce
import torch
import toy_simulator
from safetensors.torch import load_file

from pi_stepnft import envs, harness, policies
from pi_stepnft.algos import critic, grpo, nft, ppo, rft, sft, stepnft_pi0
from pi_stepnft.algos import evaluate as evaluate_program
from pi_stepnft.harness import ranks
from pi_stepnft.harness.evaluation import evaluate
from pi_stepnft.policies.weights import whole

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = dict(
    env_id="Point-v0", obs_mode="state", env_options=("num_workers=0", "speed=0.3"), num_envs=8, rollout_epochs=2, rollout_steps=20,
    iterations=1, num_minibatches=1, eval_episodes=8, final_eval_episodes=8, num_threads=1, video=False,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(envs.SIMULATORS, "toy", toy_simulator.Toy())


def tiny_policy() -> policies.Pi0:
    sizes = dict(num_cameras=0, vlm_width=16, vlm_depth=2, vlm_mlp=16, expert_width=16, expert_mlp=16, heads=1, head_dim=16)
    torch.manual_seed(0)
    policy = policies.Pi0(policies.Pi0Config.tiny(**sizes, horizon=4, state_dim=4, action_dim=2))
    statistics = policies.NormStats.identity(4), policies.NormStats.identity(2)
    policy.processor = policies.Processor(policy.config, policies.Tokenizer(), *statistics)
    policy.meta = dict(env_id="Point-v0", obs_mode="state", execute=4, num_steps=4)
    return policy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    policies.save(tiny_policy(), folder)
    return str(folder)


CLEAN = multiprocessing.get_context("forkserver")
"""Ranks are forked from a process that has no threads: in a fork of this one the locks that threads hold would be held for ever."""
CLEAN.set_forkserver_preload(["matplotlib.pyplot", "torch.distributed.fsdp", "torch.utils.tensorboard", "pi_stepnft.algos.ppo"])


def work(rank: int, size: int, end, port: int, environment: dict, function, arguments, options) -> None:
    os.environ |= environment | dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    ranks.RANK, ranks.SIZE = rank, size
    ranks.start(torch.device("cpu"))
    envs.SIMULATORS["toy"] = toy_simulator.Toy()
    end.send(function(*arguments, **options))


def in_ranks(function, *arguments, size: int = 2, **options) -> list:
    """What a function of a module returns in each of `size` ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes = [CLEAN.Pipe(duplex=False) for _ in range(size)]
    common = port, dict(os.environ), function, arguments, options
    processes = [CLEAN.Process(target=work, args=(rank, size, end, *common)) for rank, (_, end) in enumerate(pipes)]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()
    try:
        return [pipe.recv() for pipe, _ in pipes]  # EOFError where one has failed
    finally:
        for process in processes:
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------------------------------ its parts


def step(divide: bool) -> tuple[list[np.ndarray | None], dict[str, float]]:
    """The limited gradients of a mean over ten rows, and what it was and their norm: of all rows, or of this rank's."""
    policy, rows = tiny_policy(), torch.arange(10)
    run = harness.Run.__new__(harness.Run)
    run.args, run.device = harness.RLArgs(num_minibatches=1, micro_batch=2, fsdp=divide, max_grad_norm=0.01), torch.device("cpu")
    run.bad_updates, run._bad = 0, {}
    run.divide(policy)
    keep = np.isin(rows, ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])[ranks.RANK]) if ranks.SIZE > 1 else np.ones(10, bool)
    rng = np.random.default_rng(0)
    state, x, t = (torch.from_numpy(rng.random((10, *shape), np.float32)) for shape in ((4,), (4, 2), ()))
    losses = harness.Averages()
    for minibatch in run.minibatches(keep):
        for row, share in minibatch:
            prefix = policy.encode_prefix(None, None, torch.full((len(row), 16), 3), torch.ones(len(row), 16, dtype=torch.bool))
            loss = policy.velocity(prefix, state[row], x[row], t[row]).square().mean()
            (share * loss).backward()
            losses.add(dict(loss=loss.detach()), share)
    parameters = list(policy.parameters())
    assert run.clip_gradients(losses, norm=parameters)
    grads = [None if p.grad is None else whole(p.grad).numpy() for p in parameters]
    return grads, losses.means()


@pytest.mark.parametrize("divide", [False, True])
def test_gradients_of_two_ranks_are_those_of_one_process(divide):
    """Seven rows at one and three at the other, two at a time; with FSDP2 all compute as often."""
    expected, means = step(False)
    assert sum(grad is None for grad in expected) > 0  # what is never computed stays without
    for grads, told in in_ranks(step, divide):
        for grad, wanted in zip(grads, expected, strict=True):
            assert (grad is None) == (wanted is None)
            if wanted is not None:
                np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-8)
        assert told == pytest.approx(means, rel=1e-6)


class TwoTasks(toy_simulator.Point):
    def __init__(self, spec: toy_simulator.ToySpec, task: str):
        super().__init__(spec)
        self.task = task


def outcomes(size: int) -> list:
    """Of an evaluation of a policy that heads for the goal, not very well, in two tasks with four environments together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_simulator.ToySpec, "create", lambda spec, slot, num_envs: TwoTasks(spec, "ab"[slot * 2 // num_envs]))
        among = 4 // size * ranks.RANK, 4
        venv = envs.make("Point-v0", 4 // size, obs_mode="state", num_workers=0, speed=0.2, chunk=4, among=among)

    def act(obs, instructions, turns):
        noise = np.stack([np.random.default_rng(turn).normal(size=(4, 2)) for turn in turns])
        place, goal = np.split(obs["state"], 2, axis=1)
        return np.float32(np.clip(3 * (goal - place)[:, None], -1, 1) + noise)

    return [venv.tasks, *vars(evaluate(venv, act, 11, execute=4)).values()]


def test_an_evaluation_of_two_ranks_is_that_of_one_process_episode_by_episode():
    tasks, success, steps, *expected = outcomes(1)
    assert tasks == [*"aabb"] and 0 < success.sum() < 11
    first, second = in_ranks(outcomes, 2)
    assert (first[0], second[0]) == ([*"aa"], [*"bb"])
    for _, *told in (first, second):
        for value, wanted in zip(told, (success, steps, *expected), strict=True):
            np.testing.assert_array_equal(value, wanted)


def statistics() -> tuple:
    losses = harness.Averages()
    if ranks.RANK:
        losses.add(dict(loss=4.0), 0.75)
    losses.add(dict(loss=8.0, rare=float(ranks.RANK)), 0.25 * (1 - ranks.RANK))
    values = np.arange(3.0) if ranks.RANK else torch.zeros(0)
    return losses.means(), ranks.mean(values), ranks.total(np.full(2, ranks.RANK + 1)).tolist(), ranks.first(lambda: ranks.RANK)


def test_means_and_sums_are_over_all_ranks():
    assert in_ranks(statistics) == [(dict(loss=5.0, rare=0.0), 1.0, [3, 3], 0)] * 2
    assert np.isnan(ranks.mean(np.zeros(0)))


# ------------------------------------------------------------------------------------------------------------ trainings


def train(program: str, folder: Path, **options) -> None:
    os.chdir(folder)
    module = importlib.import_module(program)
    module.main(module.Args(**OPTIONS | options))


def fine_tune(folder: Path, **options) -> None:
    os.chdir(folder)
    sft.main(sft.Args(**options))


def files(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """result.json, and the tensors of the last checkpoint."""
    (run,) = (folder / "runs").iterdir()
    saved = run / "checkpoints" / "last"
    tensors = {}
    for path in saved.rglob("*.safetensors"):
        tensors |= {f"{path.relative_to(saved)}: {name}": tensor for name, tensor in load_file(path).items()}
    return json.loads((run / "result.json").read_text()), tensors


CASES = {
    "stepnft": (stepnft_pi0, dict(group_size=4)),
    "stepnft --labels predicted": (stepnft_pi0, dict(labels="predicted", group_size=1)),
    "stepnft --fsdp": (stepnft_pi0, dict(group_size=4, train="all", micro_batch=8)),
    "nft --fsdp": (nft, dict(labels="group", noise_level=0.0, group_size=4, train="all")),
    "ppo": (ppo, dict(critic_warmup=0, update_epochs=1, rollout_epochs=5)),
    "grpo": (grpo, dict(group_size=4)),
    "critic": (critic, dict(critic_warmup=0, replay=1, rollout_epochs=4)),
    "reinforce": (reinforce, dict(group_size=4, rollout_epochs=20)),
}


@pytest.mark.parametrize("case", ["stepnft", *(pytest.param(case, marks=pytest.mark.slow) for case in [*CASES][1:])])
def test_two_ranks_do_the_work_of_one_process(case, checkpoint, tmp_path):
    """The same episodes, and with one minibatch the same update, in the same files. NFT draws noise for its updates, each rank its
    own: there FSDP2 is compared with two ranks without it."""
    module, options = CASES[case]
    results = []
    for name, size, fsdp in (("plain", 2 if module is nft else 1, False), ("ranks", 2, "fsdp" in case)):
        folder = tmp_path / name
        folder.mkdir()
        in_ranks(train, module.__name__, folder, size=size, **options, checkpoint=checkpoint, fsdp=fsdp)
        results.append(files(folder))
    (one, expected), (two, found) = results
    for name in ("env_steps", "before", "lost_episodes", "parameters_trained"):
        assert two[name] == one[name]
    assert two["processes"] == 2 and one["env_steps"] > 250
    assert found.keys() == expected.keys()
    moved = 0
    for name, tensor in expected.items():
        if "memory." in name:  # in the ranks' order
            found[name], tensor = found[name].sort(0).values, tensor.sort(0).values
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}")
        moved += name.endswith("exp_avg") and bool(tensor.any())
    assert moved > 5


def test_a_group_of_episodes_has_one_task(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = stepnft_pi0.Args(**OPTIONS | dict(checkpoint=str(checkpoint), labels="group", group_size=4))
    run = harness.Run("stepnft", args, "pi0")
    policy = run.load_policy()
    two = envs.make("Point-v0", 8, obs_mode="state", num_workers=0, chunk=4)
    two.tasks = ["a"] * 2 + ["b"] * 6
    with mock.patch.object(harness.run, "make_envs", return_value=two), \
            pytest.raises(harness.RunError, match="each of 2 tasks needs a multiple of --group-size 4"):
        run.make_envs(policy)
    two.tasks = ["a"] * 4 + ["b"] * 4
    with mock.patch.object(harness.run, "make_envs", return_value=two):
        assert run.make_envs(policy) is two


def test_a_run_with_a_predictor_goes_on_as_if_never_stopped(checkpoint, tmp_path):
    """Its weights and what it remembers of earlier iterations are in the checkpoint."""
    options = dict(checkpoint=checkpoint, labels="predicted", group_size=1, num_minibatches=2, size=1)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    in_ranks(train, stepnft_pi0.__name__, tmp_path / "whole", **options, iterations=3)
    in_ranks(train, stepnft_pi0.__name__, tmp_path / "parts", **options, iterations=1)
    (run,) = (tmp_path / "parts" / "runs").iterdir()
    in_ranks(train, stepnft_pi0.__name__, tmp_path / "parts", **options, iterations=3, resume=str(run))
    (one, expected), (two, found) = (files(tmp_path / name) for name in ("whole", "parts"))
    assert two["env_steps"] == one["env_steps"] and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sum("memory." in name for name in found) == 6 and any("predictor" in name and t.any() for name, t in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(sizes, checkpoint, tmp_path):
    """RFT's replay, which each rank has of its own episodes, goes with it."""
    options = dict(checkpoint=checkpoint, num_minibatches=2, rollout_epochs=5)
    in_ranks(train, rft.__name__, tmp_path, size=sizes[0], **options)
    (run,) = (tmp_path / "runs").iterdir()
    before, held = files(tmp_path)
    replay = {name: tensor for name, tensor in held.items() if "memory.0." in name}
    assert len(replay) == 7 and len({len(tensor) for tensor in replay.values()}) == 1
    in_ranks(train, rft.__name__, tmp_path, size=sizes[1], **options | dict(iterations=2, resume=str(run)))
    after, held = files(tmp_path)
    assert after["iterations"] == 2 and after["env_steps"] > before["env_steps"] and after["before"] == before["before"]
    assert all(torch.equal(held[name], tensor) for name, tensor in replay.items())


@pytest.mark.slow
def test_sft_of_two_ranks_is_the_same_with_fsdp(checkpoint, tmp_path):
    """Rank 0 collects the demonstrations; both evaluate."""
    names = "env_id", "obs_mode", "env_options", "num_threads", "video", "num_envs", "eval_episodes"
    options = {name: OPTIONS[name] for name in names} | dict(base=checkpoint, demos=4, steps=2, batch_size=16, val_demos=1)
    results = []
    for fsdp in (False, True):
        (folder := tmp_path / str(fsdp)).mkdir()
        in_ranks(fine_tune, folder, **options, fsdp=fsdp, output="policy")
        results.append(files(folder))
        assert load_file(folder / "policy" / "model.safetensors").keys() == load_file(Path(checkpoint, "model.safetensors")).keys()
    (one, expected), (two, found) = results
    assert one["processes"] == 2 and (one["episodes"], one["success"]) == (8, two["success"])
    assert one["val_flow"] == pytest.approx(two["val_flow"], rel=1e-5)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_what_does_not_go_together_is_told_in_one_line(monkeypatch):
    args = stepnft_pi0.Args(num_envs=64, group_size=16)
    with pytest.raises(harness.RunError, match="--fsdp divides .* torchrun"):
        harness.check(stepnft_pi0.Args(fsdp=True, train="all"))
    monkeypatch.setattr(ranks, "SIZE", 2)
    harness.check(args)
    with pytest.raises(harness.RunError, match="--fsdp divides .* --train all"):
        harness.check(stepnft_pi0.Args(fsdp=True))
    monkeypatch.setattr(ranks, "SIZE", 3)
    with pytest.raises(harness.RunError, match="--num-envs 64 must be a multiple of 3 .processes. × --group-size 16"):
        harness.check(args)
    with pytest.raises(harness.RunError, match="runs as one process, not 3"):
        harness.check(evaluate_program.Args(checkpoints=("x",)))


# ------------------------------------------------------------------------------------------------------------ under torchrun

PROGRAM = f"""
import sys
sys.path.append({str(ROOT / "tests")!r})
import toy_simulator
from pi_stepnft import envs, harness
from pi_stepnft.algos import stepnft_pi0 as module
envs.SIMULATORS["toy"] = toy_simulator.Toy()
with harness.one_line_errors():
    module.main(harness.parse(module.Args, "", module.PAPER))
"""


def ended(process: subprocess.Popen) -> list[str]:
    """What a program under torchrun has printed, but for progress bars and what torchrun says itself."""
    text = process.communicate(timeout=120)[0].replace("\r", "\n")
    told = re.findall(r"(?:error|before|stopped by SIG\w+|interrupted|SIG\w+)[:; ].*", text)
    return [line for line in told if "it/s" not in line]


@pytest.mark.slow
def test_one_rank_that_is_killed_ends_all_with_one_line_and_one_goes_on(checkpoint, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    more = dict(checkpoint=checkpoint, group_size=4, iterations=1000, save_every=1)
    words = [word for name, value in (OPTIONS | more).items()
             for word in (f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)]))]
    words = [word for word in words if word not in ("--video", "False")] + ["--no-video"]

    def start(*more: str, size: int = 2) -> subprocess.Popen:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
        command = [sys.executable, *torchrun, "program.py", *words, *more]
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def when_saved(process: subprocess.Popen, iteration: int) -> list[int]:
        """The ranks' process ids, once the run has come so far."""
        while max((int(path.name) for path in tmp_path.glob("runs/*/checkpoints/0*")), default=-1) < iteration:
            assert process.poll() is None, ended(process)
            time.sleep(0.1)
        found = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        return [pid for pid in found if b"program.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    assert ended(start("--num-envs", "7")) == ["error: --num-envs 7 must be a multiple of 2 (processes) × --group-size 4"]
    assert ended(start("--checkpoint", "nowhere"))[0].startswith("error: checkpoint 'nowhere'")

    process = start()
    os.kill(when_saved(process, 2)[1], signal.SIGKILL)
    (run,) = tmp_path.glob("runs/*")
    before, error = ended(process)
    assert process.returncode and before.startswith("before: ")
    how = f"go on with --resume {run.relative_to(tmp_path)}"
    assert error == f"error: one of the 2 processes has ended, and with it all of them; {how}"

    words = ["--resume", str(run), "--iterations", "1000"]
    last = max(int(path.name) for path in (run / "checkpoints").glob("0*"))
    process = start(size=1)
    when_saved(process, last + 2)
    process.send_signal(signal.SIGTERM)
    told, stopped = ended(process)
    assert process.returncode == 143 and told.startswith("SIGTERM: ending") and stopped.startswith("stopped by SIGTERM after")

    process = start()
    when_saved(process, last + 6)
    process.send_signal(signal.SIGINT)
    told, stopped = ended(process)
    assert told.startswith("SIGINT: ending") and stopped.startswith("stopped by SIGINT after")
