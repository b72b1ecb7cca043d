"""`Training` and `Run`: the records of one training, which an algorithm calls and which never call back.

`Training` is what each of them has: folder and arguments, seeds, device and threads, TensorBoard and Weights & Biases, signals,
updates that are no numbers, checkpoints, result.json. `Run`, of reinforcement learning, adds the start, environments, evaluations
and the learning curve. What is learned, and how, is the algorithm's file alone.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import json
import math
import netrc
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import pi_stepnft
from pi_stepnft import envs, policies
from pi_stepnft.harness import checkpoints, ranks
from pi_stepnft.harness.args import RLArgs, RunArgs, RunError, TaskArgs, TrainArgs, env_options
from pi_stepnft.harness.charts import plot_curve
from pi_stepnft.harness.evaluation import Evaluation, by_ode, evaluate
from pi_stepnft.harness.films import record
from pi_stepnft.harness.rollout import Rollout
from pi_stepnft.harness.storage import Prefixes, memory_gb
from pi_stepnft.policies import sharded

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ITERATIONS = {"pi0": 120, "pi05": 200}
"""Rounds where --iterations is not given: what half an hour on two cores about allows."""
CUT = 0.64
"""Where --rollout-steps is not given: the share of a task's limit after which a training episode is cut off."""
NAMES = {"pi0": "π0", "pi05": "π0.5"}
HELD: dict[Path, int] = {}
"""Folders of runs that are this process's alone, and the descriptors by which they are locked."""
OUTCOME = "success", "interval", "episodes"
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Averages(dict):
    """Weighted means of what the updates of an iteration report."""

    def add(self, values: dict[str, float | torch.Tensor], weight: float = 1.0) -> None:
        for name, value in values.items():
            if not (weight and math.isfinite(value)):  # of an update that is left out, and counted
                continue
            total, weights = self.get(name, (0.0, 0.0))
            self[name] = total + weight * float(value), weights + weight

    def means(self) -> dict[str, float]:
        """Over all ranks."""
        every = ranks.gather(dict(self))
        sums = {name: np.sum([each[name] for each in every if name in each], 0) for name in dict.fromkeys(itertools.chain(*every))}
        return {name: float(total / weights) for name, (total, weights) in sums.items()}


class Training:
    """One training of any kind. An algorithm reads its args, device and rng and, with --resume, `resumed`: the folder of the
    checkpoint to go on from, whose policies it loads.

    algorithm: its name in folders, in results and in the meta of its policies.
    Raises RunError or CheckpointError, in one line, for a run that cannot be gone on with.
    """

    Progress = checkpoints.Progress

    def __init__(self, algorithm: str, args: RunArgs):
        self.device = set_up(args)
        self.algorithm, self.args = algorithm, replace(args)
        self.rng = np.random.default_rng(args.seed)
        self.iteration, self.trained_s, self.peak_gb = 0, 0.0, 0.0
        self.bad_updates, self._bad = 0, {}  # in all, and in a row by what was bad
        self._asked = self._stopped = 0  # by a signal of this number: this process, and all ranks
        self._in_iteration = False
        self.resumed: Path | None = None
        if args.resume:
            self.folder = Path(args.resume) if Path(args.resume).name else Path(args.resume).resolve()  # --resume .
            self._alone()
            self.resumed = ranks.first(lambda: checkpoints.newest(self.folder))

    def divide(self, *divided: policies.Pi0) -> None:
        """With --fsdp, divide policies among the ranks, in place: before anybody asks for their parameters."""
        for policy in divided if self.args.fsdp else ():
            sharded.shard(policy)

    @contextlib.contextmanager
    def acting(self, policy: policies.Pi0) -> Iterator[policies.Pi0]:
        """The policy as it is to act, without gradients; where its weights are divided among the ranks, a whole copy."""
        with sharded.together(policy) as whole, torch.inference_mode():
            yield whole.eval()

    # ------------------------------------------------------------------------------------------------ from start to end

    def begin(
        self,
        trained: dict[str, policies.Pi0],
        optimizer: torch.optim.Optimizer,
        unsaved: dict[str, list[torch.Tensor]] | None = None,
        memory: deque[list[torch.Tensor]] | None = None,
        *,
        total: int,
        **facts: Any,
    ) -> None:
        """Open the run's folder and logs; with --resume go back to where the run stood.

        trained: policies by the name of their folder, the one to report first; unsaved: tensors by name that no policy's checkpoint
        holds, such as a value head's; memory: what later iterations learn from; total: iterations of the whole training; facts:
        what the meta of its policies tells of it.
        """
        args = self.args
        self.trained, self.optimizer, self.unsaved = trained, optimizer, dict(unsaved or {})
        self.memory, self.total, self.facts = deque() if memory is None else memory, total, facts
        lora = getattr(args, "train", "all") == "lora"
        if lora:
            self.unsaved |= {name: [p for p in policy.parameters() if p.requires_grad] for name, policy in trained.items()}
        for policy in trained.values():
            policy.meta = {name: told for name, told in policy.meta.items() if name != "env_options"}  # its start's
            if args.env_options:
                policy.meta["env_options"] = list(args.env_options)
        first, *others = trained
        self.policy_type, self.origin = trained[first].config.type, origin()
        if self.resumed:
            for name in () if lora else others:
                policies.load_weights(trained[name], self.resumed / name / "model.safetensors")
            progress, kept = checkpoints.restore(self.resumed, optimizer, self.rng, self.unsaved)
            self.memory.extend(kept)
            pointer = self.resumed.parent / checkpoints.POINTER
            ranks.first(lambda: checkpoints.link(pointer, self.resumed.name))  # a damaged one was passed over
            vars(self).update(progress)
            result = self.folder / "result.json"
            done = policies.read_json(result).get("iterations") if result.is_file() else None
            if self.iteration >= total and done == self.iteration:
                more = "to go on, give --iterations above that" if hasattr(args, "iterations") else "start a new run"
                raise RunError(f"{self.folder} has done its {self.iteration} iterations: {more}")
            known = policies.read_json(self.resumed / first / "config.json")["meta"].get(self.algorithm)
            self.origin |= {name: known[name] for name in self.origin if isinstance(known, dict) and name in known}
        else:
            self.folder = ranks.first(lambda: new_folder(Path("runs", run_name(self.algorithm, self.policy_type, args))))
            self._alone()
        ranks.first(lambda: write_json(self.folder / "args.json", asdict(args) | {"resume": None}))
        self.writer = open_logs(self.folder, args, purge_step=self.iteration + 1 if self.resumed else None)
        ranks.advice = self._how_to_go_on()
        self._saved, self._saved_at = self.iteration if self.resumed else None, time.time()

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are left, from 0 on, until they are done, the time is up or a signal asks to stop.

        What they have come to is saved then. A training that a signal has stopped has nothing to report yet: the program ends with
        how to go on.
        """
        if self._saved is None:  # a disk that is full is told now
            self.save()
        limit, before = 60 * getattr(self.args, "max_minutes", 0.0), self.trained_s
        self._start = time.time() - self.trained_s
        for name in SIGNALS:
            if signal.getsignal(name) != signal.SIG_IGN:  # as nohup has it
                signal.signal(name, self._stop)
        bar = dict(desc=self.algorithm.upper(), smoothing=0.1, disable=ranks.RANK > 0)
        self._bar = tqdm(total=self.total, initial=self.iteration, **bar)
        self._in_iteration = True
        while self.iteration < self.total and not 0 < limit < self.trained_s - before and not self._stopped:
            torch.manual_seed(ranks.seed(self.args.seed, self.iteration))
            self._began, self._laps = time.time(), {}
            yield self.iteration
            self._stopped = max(ranks.gather(self._asked))  # who is signalled while it waits for the others stops one later
        self._in_iteration = False
        self._bar.close()
        if self._saved != self.iteration:  # the time was up
            self.save()
        if self._stopped:
            self.writer.close()
            name, status = signal.Signals(self._stopped).name, 128 + self._stopped  # as a shell tells of a signal
            ranks.tell(f"stopped by {name} after iteration {self.iteration}; {self._how_to_go_on()}")
            sys.exit(status)

    def lap(self, name: str) -> None:
        """The part of the iteration that is called `name` ("rollout", "update") ends here."""
        seconds, gb = time.time() - self._began - sum(s for s, _ in self._laps.values()), memory_gb(self.device)
        self._laps[name] = seconds, gb
        self.peak_gb = max(self.peak_gb, gb)

    def clip_gradients(self, losses: Averages, **parameters: Iterable[torch.Tensor]) -> bool:
        """Add up the ranks' gradients, limit their norms to --max-grad-norm, each by itself, and add what they were to losses.

        False, which is counted, where one is not finite: the update is to be left out. Raises RunError after --max-bad-updates such
        in a row; the last checkpoint is as it was.
        """
        ranks.add_gradients(itertools.chain(*parameters.values()))
        norms = {name: ranks.clip_gradients(each, self.args.max_grad_norm) for name, each in parameters.items()}
        losses.add(norms)
        return self._sound(all(torch.isfinite(norm) for norm in norms.values()), "the gradient is no finite number")

    def log(self, losses: Averages, **charts: float | np.ndarray | torch.Tensor) -> None:
        """Count the iteration and tell TensorBoard and the progress bar of it. charts: numbers, or arrays, of which the mean over
        all ranks is told."""
        self.lap("update")
        self.iteration += 1
        self.trained_s = ranks.gather(time.time() - self._start)[0]
        charts = {name: ranks.mean(value) if np.ndim(value) else value for name, value in charts.items()}
        for name, (seconds, gb) in self._laps.items():
            charts |= {f"{name}_s": seconds, f"memory_{name}_gb": gb}
        charts |= dict(bad_updates=self.bad_updates, learning_rate=self.optimizer.param_groups[0]["lr"])
        means = losses.means()
        scalars = {f"charts/{name}": value for name, value in charts.items()}
        for name, value in (scalars | {f"losses/{name}": value for name, value in means.items()}).items():
            if not math.isnan(value):  # the mean of nothing
                self.writer.add_scalar(name, value, self.iteration)
        self._bar.update()
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()}, refresh=False)

    def save_when_due(self) -> None:
        """A checkpoint every --save-every iterations or --save-minutes, and at the end."""
        waited = ranks.gather(time.time() - self._saved_at)[0] > 60 * self.args.save_minutes
        if self.iteration % self.args.save_every == 0 or waited or self.iteration == self.total:
            self.save()

    def save(self, **outcome: Any) -> None:
        """Write all that --resume needs. outcome: how well the first policy does as it is now, for its meta."""
        made = self.facts | dict(iteration=self.iteration, seed=self.args.seed, **self.origin)
        for index, policy in enumerate(self.trained.values()):
            others = {name: value for name, value in policy.meta.items() if name != self.algorithm}  # the newest comes last
            policy.meta = others | {self.algorithm: made if index else made | outcome}
        progress = {field.name: getattr(self, field.name) for field in fields(self.Progress)}
        checkpoints.save(self.folder, self.trained, self.optimizer, self.rng, progress, self.unsaved, self.memory, self.args.keep)
        self._saved, self._saved_at = self.iteration, time.time()

    def finish(self, **outcome: Any) -> None:
        """Save the end, with how well its policy does, and write result.json."""
        self.save(**outcome)
        self._close(**self.facts, **outcome)

    def _close(self, **facts: Any) -> None:
        """Write result.json, and let go of the folder. facts: more entries of it."""
        args = self.args
        self.writer.close()
        ranks.first(lambda: write_json(self.folder / "result.json", dict(
            command=command_line(), commit=commit(), algorithm=f"{self.algorithm}_{self.policy_type}",
            env_id=args.env_id, obs_mode=args.obs_mode, seed=args.seed, iterations=self.iteration,
            training_minutes=self.trained_s / 60, peak_memory_gb=self.peak_gb, bad_updates=self.bad_updates,
            parameters_trained=sum(p.numel() for group in self.optimizer.param_groups for p in group["params"]),
            **facts, processes=ranks.SIZE, machine=machine(), versions=dict(torch=torch.__version__, python=sys.version.split()[0]),
            args=asdict(args),
        )))
        if ranks.RANK == 0:
            os.close(HELD.pop(self.folder.resolve()))

    # ------------------------------------------------------------------------------------------------ what may go wrong

    def _sound(self, sound: bool, what: str) -> bool:
        """Count what is not sound, and end the run where that is all there is."""
        self._bad[what] = 0 if sound else self._bad.get(what, 0) + 1
        self.bad_updates += not sound
        if self._bad[what] >= self.args.max_bad_updates:
            raise RunError(f"{what}, {self._bad[what]} times in a row, at iteration {self.iteration}: lower --learning-rate; the "
                           f"last checkpoint in {self.folder} is from before")
        return sound

    def _how_to_go_on(self) -> str:
        return f"go on with --resume {shlex.quote(str(self.folder))}"

    def _alone(self) -> None:
        """Hold the run's folder until the program ends. Raises RunError where another one does, whose files this would remove."""
        if (folder := self.folder.resolve()) in HELD or ranks.RANK:  # by this very process
            return
        HELD[folder] = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(HELD.pop(folder))
            raise RunError(f"another process is training in {self.folder}: wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass

    def _stop(self, number: int, frame: Any) -> None:
        """The first signal ends the run after the iteration that it comes in; a second one, or one outside of them, ends it now."""
        if ranks.others_are_gone():  # as torchrun ends all where one has failed
            raise RunError(ranks.gone())
        if not self._in_iteration or self._asked:
            raise KeyboardInterrupt(self._how_to_go_on(), number)
        self._asked = number
        tqdm.write(f"{signal.Signals(number).name}: ending this iteration, then saving (once more: stop at once)")


class Run(Training):
    """A training by reinforcement learning. An algorithm reads its args, device, execute (actions executed of a chunk), mask
    ((H, A) bool: what of a chunk is executed) and rng (of the initial states).

    policy_type: "pi0" or "pi05", None where the checkpoint says which.
    Raises RunError or EnvError, in one line, for arguments that cannot work.
    """

    Progress, mean = checkpoints.RLProgress, staticmethod(ranks.mean)

    def __init__(self, algorithm: str, args: RLArgs, policy_type: str | None = None):
        super().__init__(algorithm, args)
        start = policy_type or getattr(args, "policy", None) or "pi0"
        self.checkpoint = args.checkpoint or bundled_start(args.env_id, args.obs_mode, start)
        self._expect = policy_type
        self.prefix_cache = args.prefix_cache or ("device" if args.train == "expert" else "off")
        self.env_steps, self.curve = 0, []
        # Episodes whose worker died, left out there, played again here; those that failed as their actions were no finite numbers
        self.lost = dict(rollouts=0, evaluations=0, broken=0)

    # ------------------------------------------------------------------------------------------------ policy and environments

    def load_policy(self) -> policies.Pi0:
        """The policy to train, frozen and adapted as --train says; with --resume the run's own."""
        args, lora = self.args, self.args.train == "lora"
        source = self.resumed / "policy" if self.resumed and not lora else self.checkpoint  # saved policies have adapters merged
        dtype, trained = getattr(torch, args.dtype), None if lora else args.train
        policy = policies.load(source, self.device, dtype, expect=self._expect, trained=trained)
        if hasattr(args, "policy"):
            if args.policy not in (None, policy.config.type):
                raise RunError(f"{self.checkpoint} holds a {policy.config.type} policy, not --policy {args.policy}: leave that out")
            args.policy = policy.config.type
        trained_on = policy.meta.get("obs_mode", args.obs_mode)
        if trained_on != args.obs_mode:
            raise RunError(f"{self.checkpoint} acts in {trained_on} mode: add --obs-mode {trained_on}, or another --checkpoint")
        adapt(policy, args)
        args.iterations = args.iterations or ITERATIONS[policy.config.type]
        H, A = policy.config.horizon, policy.config.action_dim
        self.execute = args.execute or policy.meta.get("execute", H)
        if self.execute > H:
            raise RunError(f"--execute {self.execute} is longer than the {H} actions that {self.checkpoint} predicts")
        self.mask = torch.zeros(H, A, dtype=torch.bool, device=self.device)
        self.mask[: self.execute, : len(policy.processor.action_stats.mean)] = True
        return policy

    def make_envs(self, policy: policies.Pi0):
        """The training's environments, which evaluate it too. Raises EnvError or RunError where task and policy do not fit."""
        check_task(policy, self.args.env_id, self.args.obs_mode, self.args.env_options, self.checkpoint)
        self.venv = make_envs(self.args, **ranks.share(self.args.num_envs), chunk=self.execute, image_size=policy.config.image_size,
                              observe_terminal=False)
        check_fit(policy, self.venv, self.checkpoint)
        tasks, G = self.venv.tasks, getattr(self.args, "group_size", 1)
        if any(len(set(tasks[i : i + G])) > 1 for i in range(0, len(tasks), G)):
            raise RunError(f"--num-envs {self.args.num_envs}: each of {len(set(tasks))} tasks needs a multiple of --group-size {G}")
        if self.args.rollout_steps is None:
            self.args.rollout_steps = round(CUT * self.venv.max_episode_steps)
        if self.args.overlap and not self.venv.overlaps:
            raise RunError("--overlap: this simulator steps all environments at once: leave it out")
        return self.venv

    def rollout(self, seeds: np.ndarray, observe_cut: bool = False) -> Rollout:
        """The episodes of this iteration; each rank plays those of its environments. seeds: (num_envs × rollout_epochs,) of all
        initial states; observe_cut: whether episodes that are cut off have a last turn, to look at."""
        args = self.args
        mine = np.arange(len(seeds)).reshape(-1, ranks.SIZE, self.venv.num_envs)[:, ranks.RANK].flatten()
        return Rollout(self.venv, seeds[mine], execute=self.execute, max_steps=args.rollout_steps, shape=tuple(self.mask.shape),
                       device=self.device, key=(args.seed, self.iteration), overlap=args.overlap, observe_cut=observe_cut,
                       among_all=mine)

    def minibatches(self, keep: np.ndarray) -> Iterator[list[tuple[torch.Tensor, float]]]:
        """--num-minibatches random parts of the chunks to learn from, keep (M,) bool; nothing where no rank has any.

        Each is a list of micro-batches: rows (b,) int64 on the device, and their share of the minibatch of all ranks together.
        """
        args, own = self.args, torch.from_numpy(np.flatnonzero(keep)).to(self.device)
        parts = own[torch.randperm(len(own), device=self.device)].tensor_split(args.num_minibatches)
        for part, lengths in zip(parts, zip(*ranks.gather([len(part) for part in parts]))):
            micro, total = args.micro_batch or max(lengths), sum(lengths)
            if total:
                batches = [(rows, len(rows) / total) for rows in part.split(micro) if len(rows)]
                if args.fsdp:  # all ranks compute as often, if only for the others
                    idle = torch.zeros(1, dtype=torch.int64, device=self.device), 0.0
                    batches += [idle] * (-(-max(lengths) // micro) - len(batches))
                yield batches

    def prefixes(self) -> Prefixes:
        """An empty store for the prefixes of an iteration's chunks, as --prefix-cache says."""
        return Prefixes(self.prefix_cache, self.device)

    # ------------------------------------------------------------------------------------------------ from start to end

    def begin(self, trained: dict[str, policies.Pi0], optimizer: torch.optim.Optimizer, **kept: Any) -> None:
        """As every training's; the start is evaluated. kept: its unsaved and memory."""
        task = dict(env_id=self.args.env_id, obs_mode=self.args.obs_mode)
        for policy in trained.values():
            policy.meta = policy.meta | task | dict(execute=self.execute, num_steps=self.args.num_steps)
        base = self.checkpoint if policies.layouts.is_hub_id(self.checkpoint) else Path(self.checkpoint).name
        super().begin(trained, optimizer, **kept, total=self.args.iterations, base=base)
        if not self.curve:
            print(f"before: {self.evaluate('before')}")

    def log(self, rollout: Rollout, losses: Averages, **charts: float) -> None:
        """As every training's, and of the iteration's episodes."""
        every = zip(*ranks.gather((rollout.success, rollout.lost, [rollout.env_steps])))
        success, lost, steps = map(np.concatenate, every)
        self.env_steps += int(steps.sum())
        SPS = self.env_steps / (time.time() - self._start)
        self.lost["rollouts"] += int(lost.sum())
        self._sound(not lost.all(), "every episode of the rollout was lost, by workers that died or actions that are no numbers")
        charts = dict(SPS=SPS, env_steps=self.env_steps, lost_episodes=sum(self.lost.values())) | charts
        if not lost.all():
            charts["rollout_success"] = success[~lost].mean()
        if not (self.iteration or success.any()):
            limit = self.args.rollout_steps or self.venv.max_episode_steps
            tqdm.write(f"note: none of {len(success)} episodes succeeded within --rollout-steps {limit}: while that is so, little "
                       "can be learned")
        super().log(losses, **charts)
        self._bar.set_postfix(success=f"{100 * success.mean():.0f}%", SPS=f"{SPS:.0f}", refresh=False)

    def evaluate_and_save_when_due(self) -> None:
        """An evaluation every --eval-every iterations, which does not count as training time; a checkpoint as in every training."""
        args = self.args
        if args.eval_every and self.iteration % args.eval_every == 0 and self.iteration != self.total:
            result = self.evaluate()
            tqdm.write(f"iteration {self.iteration}, {self.env_steps} environment steps, {self.trained_s / 60:.1f} min: {result}")
            self._start = time.time() - self.trained_s
        self.save_when_due()

    def finish(self, **facts: Any) -> None:
        """Evaluate and save the end, write result.json, and film the end. facts: more entries of result.json."""
        args = self.args
        _, *others = self.trained
        result = self.evaluate("after")
        more = {name: self.success_rate(self.trained[name], args.final_eval_episodes, f"evaluation of {name}") for name in others}
        for name, evaluation in more.items():
            self.writer.add_scalar(f"eval/success_{name}", evaluation.rate, self.iteration)
        self.save()
        self._close(
            checkpoint=self.checkpoint, env_steps=self.env_steps, lost_episodes=self.lost, **facts,
            before={name: self.curve[0][name] for name in OUTCOME}, after={name: self.curve[-1][name] for name in OUTCOME},
            **{f"after_{name}": evaluation.outcome for name, evaluation in more.items()}, curve=self.curve,
        )
        made, film = f"checkpoints, curve.png and result.json in {self.folder}", f"videos/{self.folder.name}.mp4"
        if args.video and ranks.RANK == 0:
            try:
                record(self.venv, result, film, f"{args.env_id}, after {self.iteration} iterations")
                made += f", video in {film}"
            except envs.EnvError as error:  # what has been measured stands
                made += f"; no video: {error}"
        self.venv.close()
        print(made)
        also = "".join(f"; {name}: {evaluation}" for name, evaluation in more.items())
        before, (low, high) = 100 * self.curve[0]["success"], self.curve[0]["interval"]
        print(f"{args.env_id} ({args.obs_mode}): {before:.1f} % [{100 * low:.1f}, {100 * high:.1f}] → {result}{also}; "
              f"{self.env_steps} environment steps in {self.trained_s / 60:.1f} min of training")

    # ------------------------------------------------------------------------------------------------ records

    def success_rate(self, policy: policies.Pi0, episodes: int, label: str) -> Evaluation:
        """Success by the ODE on held-out seeds, the same ones and the same noise every time."""
        with self.acting(policy) as acting:
            act, seed = by_ode(acting, self.args.num_steps), self.args.eval_seed
            result = evaluate(self.venv, act, episodes, execute=self.execute, seed=seed, progress=label)
        self.lost["evaluations"] += result.repeated
        self.lost["broken"] += result.broken
        return result

    def evaluate(self, when: str = "") -> Evaluation:
        """Evaluate the policy and add the result to the learning curve. when: "before" or "after", with more episodes."""
        episodes = self.args.final_eval_episodes if when else self.args.eval_episodes
        result = self.success_rate(next(iter(self.trained.values())), episodes, f"evaluation {when}".strip())
        again = self.iteration, len(result.success)  # of a run that was stopped before it told of its result
        self.curve = [point for point in self.curve if (point["iteration"], point["episodes"]) != again]
        self.curve.append(dict(iteration=self.iteration, env_steps=self.env_steps, minutes=self.trained_s / 60, **result.outcome))
        self.writer.add_scalar("eval/success", result.rate, self.iteration)
        return result

    def save(self) -> None:
        """As every training's, and the curve's picture."""
        self.facts["env_steps"] = self.env_steps
        point = self.curve[-1]
        super().save(**({name: point[name] for name in OUTCOME} if point["iteration"] == self.iteration else {}))
        if ranks.RANK == 0:
            plot_curve(self.curve, self.folder / "curve.png", f"{self.args.env_id} ({self.args.obs_mode}), seed {self.args.seed}")


# --------------------------------------------------------------------------------------------------- what others need of this


def set_up(args: TaskArgs) -> torch.device:
    """Seed everything random and set torch's threads; returns the device to compute on."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or envs.num_cores())
    ranks.choose_gpu()
    device = choose_device(args.device)
    ranks.start(device)
    return device


def new_folder(path: Path) -> Path:
    """Create a folder that was not there: of this name, or with a number behind it where another run has just taken that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
        path = path.with_name(f"{path.name.rsplit('+', 1)[0]}+{number}")


def choose_device(name: str) -> torch.device:
    """"cpu", "cuda", or for "auto" whichever there is. Raises RunError where there is no such thing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch finds no GPU here; give auto or cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def adapt(policy: policies.Pi0, args: TrainArgs) -> policies.Pi0:
    """Set, in place, the precision, what of the policy is trained, and what its backward pass keeps, as the arguments say."""
    policy.cast(getattr(torch, args.dtype), trained=None if args.train == "lora" else args.train)
    if args.train == "expert":
        policy.freeze_vlm()
    elif args.train == "lora":
        policies.add_lora(policy, args.lora_rank, args.lora_alpha)
    return policy.checkpoint_gradients(args.gradient_checkpointing)


def make_envs(args: TaskArgs, **fixed: Any):
    """`envs.make` with --env-options, closed when the program ends, however it does. fixed: what the program decides itself."""
    fixed |= dict(env_id=args.env_id, obs_mode=args.obs_mode, seed=args.seed, step_timeout=args.step_timeout)
    venv = envs.make(**fixed, **env_options(args.env_options, fixed))
    atexit.register(venv.close)
    return venv


def check_fit(policy: policies.Pi0, venv, name: str) -> None:
    """Raise RunError where a policy called `name` takes other states or actions, or fewer cameras, than the environments have."""
    if 0 < policy.config.num_cameras < len(venv.cameras):
        raise RunError(f"{name} takes {policy.config.num_cameras} cameras, {venv.spec.env_id} has {', '.join(venv.cameras)}: "
                       "choose by --env-options cameras=…, or use its policy")
    _compare(policy, venv.single_observation_space["state"].shape[0], venv.action_dim, venv.spec.env_id, name)


def check_task(policy: policies.Pi0, env_id: str, obs_mode: str, options: Iterable[str], name: str) -> None:
    """As `check_fit`, as far as it can be told before a simulator starts: from where the policy was trained and, where one for the
    task is bundled, from the sizes of that one, which options of the environment may change. Tells of options unlike its own."""
    trained_on = policy.meta.get("env_id") or env_id
    if sorted(options) != sorted(known := policy.meta.get("env_options", [])):
        print(f"note: {name} was trained with {' '.join(['--env-options', *known]) if known else 'no --env-options'}")
    if ":" not in trained_on and envs.simulator(trained_on) is not envs.simulator(env_id):
        raise RunError(f"{name} was trained on {trained_on}, in another simulator than {env_id}: use its policy")
    for _, config in () if options else bundled_for(env_id, obs_mode):
        _compare(policy, *(len(config["processor"][what]["mean"]) for what in ("state", "actions")), env_id, name)


def _compare(policy: policies.Pi0, state: int, action: int, env_id: str, name: str) -> None:
    processor = policy.processor
    for what, given, expected in (("state", state, processor.state_stats), ("action", action, processor.action_stats)):
        if given != len(expected.mean):
            raise RunError(f"{name} takes {len(expected.mean)} {what} dimensions, {env_id} has {given}: use its policy")


def bundled_for(env_id: str, obs_mode: str) -> Iterator[tuple[str, dict]]:
    """The checkpoints that ship for a task: their names, and their config.json."""
    task = envs.simulator(env_id).task_of(env_id)
    for name in policies.bundled():
        config = policies.read_json(policies.checkpoint.BUNDLED / name / "config.json")
        if (config["meta"].get("env_id"), config["meta"].get("obs_mode")) == (task, obs_mode):
            yield name, config


def bundled_start(env_id: str, obs_mode: str, policy_type: str) -> str:
    """Name of the checkpoint that ships as a task's start. Raises RunError with the command that makes one where there is none."""
    for name, config in bundled_for(env_id, obs_mode):
        learned = any("env_steps" in entry for entry in config["meta"].values() if isinstance(entry, dict))  # from rollouts
        if config["type"] == policy_type and not learned:
            return name
    envs.check(env_id)
    where = f"{'--policy pi05 ' if policy_type == 'pi05' else ''}--env-id {env_id} --obs-mode {obs_mode}"
    how, also = f"{command('sft')} {where}", ""
    try:
        envs.simulator(env_id).expert(env_id)
        expert = True
    except envs.EnvError:
        expert = False
    # What a tiny policy learns first: to see, from an expert's scenes, and π0.5 to read, which takes no scene in state mode.
    if expert and obs_mode == "rgb" or policy_type == "pi05" and obs_mode == "state":
        how = f"{command('pretrain')} {where} --output runs/pretrained, then {how} --base runs/pretrained --train expert"
    if not expert:
        how += " --dataset DEMONSTRATIONS"
        if obs_mode == "rgb":
            also = " (this tiny policy learns to see from them alone; --base takes a checkpoint that can)"
    raise RunError(f"no bundled {NAMES[policy_type]} checkpoint for {env_id} in {obs_mode} mode; make one with: {how} --output "
                   f"runs/sft{also}, then add --checkpoint runs/sft")


def task_name(args: TaskArgs) -> str:
    """The task and its options as a part of a file's name."""
    return slug("-".join((args.env_id, *args.env_options)))


def slug(text: str) -> str:
    """The text as a part of a file's name: "my_tasks:MyTask-v1" → "my_tasks-MyTask-v1"."""
    return re.sub(r"[^\w.=-]+", "-", text)


def run_name(algorithm: str, policy_type: str, args: TaskArgs) -> str:
    """The name of a run's folder: what is run with which policy on what, its seed and the time."""
    label = algorithm if policy_type == "pi0" else f"{algorithm}-{policy_type}"
    return f"{label}-{task_name(args)}-{args.obs_mode}-{args.seed}-{int(time.time())}"


def open_logs(folder: Path, args: RunArgs, purge_step: int | None = None) -> SummaryWriter:
    """TensorBoard's log in a run's folder, and with --track Weights & Biases beside it, the arguments in both.

    purge_step: the first step that this run logs, where it goes on with one that came further than its last checkpoint.
    Rank 0 logs.
    """
    if ranks.RANK:
        return SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
    from torch.utils.tensorboard import SummaryWriter

    if args.track:
        import wandb

        # The run's name is its id, so that a run that goes on stays one run.
        options = dict(project="pi-stepnft", id=folder.name, name=folder.name, resume="allow", config=asdict(args))
        options["sync_tensorboard"] = True
        known = {"WANDB_MODE", "WANDB_API_KEY"} & set(os.environ) or has_login("wandb")
        try:
            wandb.init(**options, mode=None if known else "offline", settings=wandb.Settings(init_timeout=30))
        except wandb.Error as error:
            print(f"Weights & Biases cannot be reached ({str(error).splitlines()[0]}): logging offline, for `wandb sync`")
            wandb.teardown()  # the first attempt holds the id
            wandb.init(**options, mode="offline")
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    writer.add_text("hyperparameters", json.dumps(asdict(args), indent=2))
    return writer


def has_login(name: str) -> bool:
    """Whether the user's .netrc holds a login at a host of this name."""
    try:
        return any(name in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def command(program: str) -> str:
    """How a user calls one of the programs: by its file in a checkout, by its console command in an installation."""
    name = program.replace("_", "-")
    installed = name if name.startswith("stepnft") else f"pi-stepnft-{name}"
    return f"python algos/{program}.py" if pi_stepnft.CHECKOUT else installed


def command_line() -> str:
    """The command that this program was called by, as it can be given again."""
    program = [sys.argv[0]] if pi_stepnft.CHECKOUT else [command(Path(sys.argv[0]).stem)]
    by = ["python"] if pi_stepnft.CHECKOUT else []
    if ranks.SIZE > 1:
        by = ["torchrun", "--nproc-per-node", str(ranks.SIZE), *["--no-python"] * (pi_stepnft.CHECKOUT is None)]
    return shlex.join([*by, *program, *sys.argv[1:]])


def origin() -> dict[str, str | None]:
    """How a checkpoint came about, for its meta and its card."""
    return dict(command=command_line(), commit=commit())


def commit() -> str | None:
    """The commit that the code is at, with "-dirty" where files differ from it; None where that is not known."""
    if pi_stepnft.CHECKOUT is None:
        return None
    git = ["git", "-C", str(pi_stepnft.CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Where a result was made, which its minutes, pictures and last digits depend on. renderer: the Vulkan driver, where one was
    chosen; load: how many processes wanted a core, this program's among them, mean of the last 15 minutes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = facts.get("model name") or platform.processor() or platform.machine()
    identity = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts)
    return dict(processor=f"{name} ({identity}), {torch.backends.cpu.get_cpu_capability()}", cores=envs.num_cores(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                renderer=Path(os.environ.get("VK_DRIVER_FILES", "")).stem or None, load=os.getloadavg()[2])


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that the old one or the new one is there, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, path)


@contextlib.contextmanager
def one_line_errors(hint: str = "") -> Iterator[None]:
    """End the program with one line, not a traceback, for what a user can put right. hint: what an interruption leaves."""
    try:
        yield
    except BrokenPipeError:  # who reads this has seen enough, as `head` has
        sys.stdout = open(os.devnull, "w")
        sys.exit(128 + signal.SIGPIPE)
    except (RunError, envs.EnvError, policies.CheckpointError, OSError) as error:  # OSError: a full disk, a folder that is not ours
        ranks.tell(f"error: {' '.join(str(error).splitlines())}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # PyTorch's are of the second kind, on a GPU and without one
        if ranks.is_gone(error):
            ranks.tell(f"error: {ranks.gone()}")
            sys.exit(1)
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        reason = (str(error).splitlines() or [""])[0]
        ranks.tell("error: out of memory: give --micro-batch, or a smaller one, for the update, fewer --num-envs for the rollout; "
                   f"docs/memory.md has more ({reason})")
        sys.exit(1)
    except KeyboardInterrupt as error:  # of a Run: what goes on, and the signal
        told, number = error.args if len(error.args) == 2 else (hint, signal.SIGINT)
        ranks.tell("; ".join(["interrupted", *filter(None, [told])]))
        sys.exit(128 + number)
