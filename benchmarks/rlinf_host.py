"""Does π-StepNFT train inside RLinf as docs/frameworks.md says, with the numbers of algos/stepnft_pi0.py, and go on after a kill?

    python benchmarks/rlinf_host.py          # two CPU cores, 6 GB of memory, 10 minutes

RLinf's own code, unmodified, with Ray on this machine, in a virtual environment that is made for it: real PickCube-v1 in state
mode, the bundled tiny π0, `python -m pi_stepnft.rlinf --config-name cpu`.

- train: so many iterations of its runner, which SIGKILL ends in the next one.
- resume: the largest difference between θ and θ_old of the run that goes on and those in the killed run's checkpoint; then it does
  one more iteration.
- same_numbers: the chunks and episodes of an iteration of algos/stepnft_pi0.py, given to RLinf's training worker in two parts: the
  relative difference of the loss, and the largest difference of a gradient relative to the largest gradient, at both of its steps.
"""

import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import torch
import tyro
from lerobot_reference import ROOT, own_requirements, run_in_venv

RLINF = "0.3.0"
REQUIREMENTS = (
    "torch==2.13.0", *(each for each in own_requirements() if not re.match("torch|transformers", each)), "transformers<=4.57.6",
    "omegaconf", "hydra-core", "ray[default]", "regex", "accelerate",
)
"""what RLinf imports on the way to its embodied runner, and this project; its own metadata ask for much more"""


@dataclass
class Args:
    iterations: int = 3
    """before the kill"""
    limit: float = 1e-6
    """largest relative difference of loss and gradients that passes"""
    overrides: tuple[str, ...] = ("runner.save_interval=1", "runner.val_check_interval=1")
    """of the configuration"""
    venv: Path = Path(tempfile.gettempdir()) / f"rlinf-{RLINF}"
    """virtual environment for RLinf, made if it is not there"""
    out: Path = Path(__file__).parent / "results" / "rlinf_host.json"
    """results file"""


def train_and_kill(folder: Path, args: Args) -> dict:
    """Train, and SIGKILL in the iteration after the last; what RLinf tells of each iteration."""
    import psutil

    command = [sys.executable, "-m", "pi_stepnft.rlinf", "--config-name", "cpu", *args.overrides]
    log, tables = folder / "log.txt", folder / "runs" / "rlinf" / "metrics.log"
    began = time.time()
    with open(log, "w") as file:
        process = psutil.Popen(command, cwd=folder, stdout=file, stderr=file)
    while not tables.is_file() or tables.read_text().count("╰") < args.iterations:  # the end of an iteration's table
        if process.poll() is not None:
            sys.exit(f"training ended with status {process.returncode}: {log.read_text()[-3000:]}")
        time.sleep(0.1)
    seconds = time.time() - began
    family = process.children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for orphan in psutil.wait_procs([process, *family], timeout=60)[1]:  # or the next run would join their Ray
        orphan.kill()
    text = tables.read_text().split("Metric Table")[1 : args.iterations + 1]
    told = [re.findall(r"│([\w/]+)=([^\s│]+)", table) for table in text]
    success = [[float(value) for name, value in table if name == "success_once"] for table in told]
    names = dict(loss="actor/loss", gradient_norm="actor/grad_norm", signal="signal", seconds="step")
    curves = {name: [float(dict(table)[key]) for table in told] for name, key in names.items()}
    rollouts, evaluations = zip(*success)
    return dict(command=" ".join(["python", *command[1:]]), all_seconds=seconds, rollout_success=rollouts,
                evaluation_success=evaluations, **curves)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "runs" / "rlinf" / "cpu" / "checkpoints" / f"global_step_{step}" / "actor"


def record(file: Path) -> None:
    """An iteration of algos/stepnft_pi0.py with two steps of its optimizer: its chunks and episodes, and θ, loss and gradients of
    each step."""
    from pi_stepnft import envs, harness
    from pi_stepnft.algos import stepnft_pi0 as program

    seen, steps, losses = {}, [], []
    originals = program.Chunks, program.chunk_labels, program.stepnft_loss, harness.Run.clip_gradients

    def remember_chunks(*fields):
        seen["chunks"] = originals[0](*fields)  # the last are all of the iteration
        return seen["chunks"]

    def remember_labels(success, *others, **options):
        seen["success"] = success
        return originals[1](success, *others, **options)

    def remember_loss(*inputs, **options):
        result = originals[2](*inputs, **options)
        losses.append(result[0].item())
        return result

    def remember_gradients(run, *inputs, **parameters):
        trained = {name: p for name, p in run.trained["policy"].named_parameters() if p.requires_grad}
        theta = {name: p.detach().clone() for name, p in trained.items()}
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        steps.append(dict(theta=theta, gradients=gradients, loss=losses[-1]))
        return originals[3](run, *inputs, **parameters)

    args = program.Args(
        env_id="PickCube-v1", obs_mode="state", labels="group", group_size=16, noise_level=0.7, divergence=0.0, iterations=1,
        update_epochs=2, num_minibatches=1, warmup_iterations=0, num_envs=32, rollout_epochs=1, eval_every=0, final_eval_episodes=2,
        num_threads=1, video=False,
    )
    remember = dict(Chunks=remember_chunks, chunk_labels=remember_labels, stepnft_loss=remember_loss)
    with mock.patch.multiple(program, **remember), mock.patch.object(harness.Run, "clip_gradients", remember_gradients):
        program.main(args)
    instruction = envs.simulator(args.env_id).instruction(args.env_id)
    torch.save(dict(chunks=seen["chunks"]._asdict(), success=seen["success"], instruction=instruction, steps=steps), file)


def resume_and_compare(folder: Path, args: Args) -> tuple[dict, dict]:
    """Go on with the killed run; differences between its weights and those saved, and between its worker's numbers and ours."""
    import hydra
    from rlinf.utils.nested_dict_process import split_dict_to_chunk
    from rlinf.utils.utils import materialize_tensor
    from rlinf.workers.actor.fsdp_actor_worker import process_nested_dict_for_train

    from pi_stepnft import policies
    from pi_stepnft.rlinf import StepNFT, launch

    class Probe(StepNFT):
        def weights(self) -> dict[str, dict[str, torch.Tensor]]:
            parts = dict(policy=self.trained(), rollout_policy=self.rollout)
            return {part: {name: materialize_tensor(p).detach().cpu() for name, p in held.items()} for part, held in parts.items()}

        def same_numbers(self, file: Path) -> list[dict]:
            seen = torch.load(file, weights_only=False)
            chunks, success = seen["chunks"], torch.from_numpy(seen["success"])
            turn, episode = chunks.pop("turn"), chunks.pop("episode")

            def laid_out(rows):  # (M, …) as RLinf has it: (T, E, …)
                table = rows.new_zeros(int(turn.max()) + 1, len(success), *rows.shape[1:])
                table[turn, episode] = rows
                return table

            texts = [seen["instruction"]] * len(turn)
            chunks["tokens"], chunks["token_mask"] = self.model.policy.processor.tokenize(texts, chunks["state"])
            ran = laid_out(torch.ones(len(turn), 1, dtype=torch.bool))
            self.rollout_batch = dict(rewards=(ran & success[:, None]).float(), loss_mask=ran, prev_logprobs=torch.zeros(ran.shape),
                                      forward_inputs={name: laid_out(rows) for name, rows in chunks.items()})
            self.compute_advantages_and_returns()
            self.rollout_batch = process_nested_dict_for_train(self.rollout_batch, torch.randperm(ran.numel()))
            self._precompute_nft_training_inputs()
            differences = []
            for step in seen["steps"]:
                self.optimizer.zero_grad()
                for name, parameter in self.trained().items():
                    parameter.detach().to_local().copy_(step["theta"][name.removeprefix("policy.")])
                total = 0.0
                for part in split_dict_to_chunk(self.rollout_batch, 2):
                    loss = self.nft_forward_and_loss(part)[0] / 2
                    loss.backward()
                    total += loss.item()
                ours = {f"policy.{name}": gradient for name, gradient in step["gradients"].items()}
                largest = max(gradient.abs().max() for gradient in ours.values())
                errors = [(p.grad.to_local() - ours[name]).abs().max() for name, p in self.trained().items()]
                differences.append(dict(loss=abs(total / step["loss"] - 1), gradient=float(max(errors) / largest),
                                        our_loss=step["loss"], their_loss=total))
            return differences

    with hydra.initialize_config_module("pi_stepnft.rlinf", version_base="1.3"):
        go_on = [f"runner.resume_dir={checkpoint(folder, args.iterations).parent}", f"runner.max_epochs={args.iterations + 1}"]
        cfg = hydra.compose("cpu", [*args.overrides, *go_on])
    os.chdir(folder)
    runner = launch(cfg, Probe)
    held, differences = runner.actor.weights().wait()[0], {}
    for part, theirs in held.items():
        saved = policies.load(checkpoint(folder, args.iterations) / part).state_dict()
        differences[part] = max(float((saved[name.removeprefix("policy.")] - p).abs().max()) for name, p in theirs.items())
    runner.run()
    differences["went_on_to"] = runner.global_step
    record(folder / "record.pt")
    return differences, runner.actor.same_numbers(folder / "record.pt").wait()[0]


def main(args: Args) -> int:
    run_in_venv(args.venv, REQUIREMENTS, bare=f"rlinf=={RLINF}")
    os.environ |= dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trained = train_and_kill(folder, args)
        resumed, same = resume_and_compare(folder, args)
    packages = {name: version(name) for name in ("rlinf", "ray", "torch", "transformers", "gymnasium", "mani-skill")}
    results = dict(python=platform.python_version(), packages=packages, train=trained, resume=resumed, same_numbers=same)
    from pi_stepnft import harness

    args.out.write_text(json.dumps(dict(commit=harness.commit()) | results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    failed = [name for name in ("policy", "rollout_policy") if resumed[name] != 0]
    failed += [f"step {i + 1}" for i, step in enumerate(same) if not max(step["loss"], step["gradient"]) <= args.limit]
    if failed:
        print(f"beyond the limit, or not equal: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
