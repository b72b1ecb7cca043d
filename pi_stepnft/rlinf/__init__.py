"""π-StepNFT inside RLinf 0.3.0, which distributes it over GPUs and nodes by Ray. Docs: docs/frameworks.md.

`RLINF_EXT_MODULE=pi_stepnft.rlinf` makes each of RLinf's workers call `register()`: our policies are its model "pi_stepnft", our
environments stand in its table. `StepNFT` is the training worker; its labels, loss and schedule are the functions of
algos/stepnft_pi0.py. `python -m pi_stepnft.rlinf --config-name cpu` trains, by one of the YAML files beside this one.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from rlinf.config import validate_cfg
from rlinf.models import register_model
from rlinf.runners.embodied_runner import EmbodiedRunner
from rlinf.scheduler import AcceleratorType, AcceleratorUtil, Cluster, Worker
from rlinf.utils.metric_utils import compute_rollout_metrics
from rlinf.utils.placement import HybridComponentPlacement
from rlinf.utils.utils import materialize_tensor
from rlinf.workers.actor.fsdp_nft_policy_worker import EmbodiedNFTFSDPPolicy
from rlinf.workers.env.env_worker import EnvWorker
from rlinf.workers.rollout.hf.huggingface_worker import MultiStepRolloutWorker

from pi_stepnft import envs, policies
from pi_stepnft.algos.stepnft_pi0 import chunk_labels, ema_decay, flow_sde_sample, stepnft_loss, update_rollout_policy

NAME = "pi_stepnft"


def register() -> None:
    """Make our policies and environments known to RLinf, in this process. May be called again."""
    from rlinf.envs.isaaclab import REGISTER_ISAACLAB_ENVS  # of its tables of environments the one that can be added to

    register_model(NAME, FlowPolicy, force=True)
    REGISTER_ISAACLAB_ENVS[NAME] = Environments


def stand_in_for_cuda() -> None:
    """Without an accelerator RLinf's torch platform (`torch.cuda`) and device type are None, and are used all the same."""
    nothing = dict.fromkeys(("set_device", "synchronize", "empty_cache", "ipc_collect"), lambda *_: None)
    cpu = SimpleNamespace(
        **nothing, is_available=lambda: False, is_initialized=lambda: True, device_count=lambda: 0, current_device=lambda: "cpu",
        current_stream=lambda *_: cpu,
    )

    def instead_of_none(function, stand_in):
        return staticmethod(lambda kind: stand_in if kind == AcceleratorType.NO_ACCEL else function(kind))

    AcceleratorUtil.get_torch_platform = instead_of_none(AcceleratorUtil.get_torch_platform, cpu)
    AcceleratorUtil.get_device_type = instead_of_none(AcceleratorUtil.get_device_type, "cpu")
    if Worker.torch_platform is None:
        Worker.torch_platform, Worker.torch_device_type = cpu, "cpu"


stand_in_for_cuda()


# ----------------------------------------------------------------------------------------------------------------- the policy


def load(cfg: DictConfig, dtype: torch.dtype | None, device: torch.device | str) -> policies.Pi0:
    """The policy that `actor.model` names, with what is not trained frozen."""
    policy = policies.load(cfg.model_path, device, dtype or torch.float32, trained=cfg.train)
    return policy.freeze_vlm() if cfg.train == "expert" else policy


class FlowPolicy(torch.nn.Module):
    """A policy of ours in the form that RLinf's rollout and training workers call. cfg: `actor.model`."""

    _no_split_modules = [""]  # FSDP2 takes it as a whole: a prefix and a suffix pass go through its layers in different ways

    def __init__(self, cfg: DictConfig, dtype: torch.dtype | None):
        super().__init__()
        self.cfg, self.policy = cfg, load(cfg, dtype, Worker.torch_device_type)
        self.config = SimpleNamespace(num_steps=cfg.num_steps, tie_word_embeddings=True)  # True: the embedding is no unit of FSDP2

    def predict_action_batch(self, env_obs: dict[str, Any], do_sample: bool = True, **_) -> tuple[torch.Tensor, dict[str, Any]]:
        """Chunks (B, execute, A) in the environment's units: by the Flow-SDE with what an update needs, or by the ODE."""
        policy, raw = self.policy, env_obs["states"]
        pixels = {"image": env_obs["extra_view_images"]} if policy.config.num_cameras else {}
        *inputs, state = policy.processor({"state": raw, **pixels}, env_obs["task_descriptions"])
        prefix, K = policy.encode_prefix(*inputs), self.cfg.num_steps
        noise = torch.randn(len(state), K + 1, policy.config.horizon, policy.config.action_dim, device=state.device)
        if do_sample:
            x, v = flow_sde_sample(policy, prefix, state, noise, num_steps=K, noise_level=self.cfg.noise_level)
        else:
            x, v = policy.sample(prefix, state, noise[:, 0], K)[:, None], None
        actions = policy.processor.unnormalize_actions(x[:, -1, : self.cfg.num_action_chunks].cpu(), raw)
        remembered = dict(tokens=inputs[2], token_mask=inputs[3], state=state, x=x, v=v, action=actions, **pixels)
        nothing = torch.zeros(len(state), 1)  # no likelihood, no critic
        return actions, dict(prev_logprobs=nothing, prev_values=nothing, forward_inputs=remembered)

    def forward(self, inputs: dict[str, torch.Tensor], x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Velocities (B, n, H, A) at n points of the flow x_t (B, n, H, A), t (B, n) per remembered chunk."""
        policy = self.policy
        pictures = policy.processor.prepare_images(inputs.get("image"), len(x_t))
        with torch.set_grad_enabled(not policy.vlm_frozen):
            prefix = policy.encode_prefix(*pictures, inputs["tokens"], inputs["token_mask"])
        return policy.velocity(prefix, inputs["state"], x_t, t)

    def gradient_checkpointing_enable(self, **_) -> None:
        self.policy.checkpoint_gradients()


# ----------------------------------------------------------------------------------------------------------- the environments


class Environments:
    """`envs.make` in the form that RLinf's environment worker steps. cfg: `env.train` or `env.eval`.

    An episode that has ended is left alone until the reset, and has no rewards any more. Rewards (N, C): 1 at the step of success,
    −1 where an episode was lost (a worker process died) and is to be dropped.
    """

    def __init__(self, cfg: DictConfig, num_envs: int, seed_offset: int, total_num_processes: int, worker_info: Any):
        options = OmegaConf.to_container(cfg.init_params, resolve=True)
        options.pop("id")
        self.cfg, self.num_envs, self.offset = cfg, num_envs, seed_offset
        self.venv = envs.make(options.pop("env_id"), num_envs, max_episode_steps=cfg.max_episode_steps, **options)
        self.rng = np.random.default_rng([cfg.seed, seed_offset])

    def reset(self) -> tuple[dict[str, Any], dict]:
        """New initial states, equal ones in a group; an evaluation has the same ones every time."""
        n, size = self.num_envs, self.cfg.group_size
        seeds = self.rng.integers(envs.TRAIN_SEEDS, size=n // size).repeat(size)
        if self.cfg.is_eval:
            seeds = envs.EVAL_SEED + self.offset * n + np.arange(n)
        obs, _ = self.venv.reset(seed=seeds)
        self.over, self.length = np.zeros(n, bool), np.zeros(n, int)
        return self.shown(obs), {}

    def update_reset_state_ids(self) -> None:
        """Nothing to do: every reset draws seeds."""

    def chunk_step(self, chunk: torch.Tensor) -> tuple[list, torch.Tensor, torch.Tensor, torch.Tensor, list]:
        """Execute chunks (N, C, A): observations after them, rewards, terminations and truncations (N, C), and infos."""
        obs, _, terminated, truncated, info = self.venv.step(np.asarray(chunk))
        places, ends = np.arange(chunk.shape[1]), np.maximum(info["steps"] - 1, 0)[:, None]  # (C,), (N, 1) the last step of each
        outcome = np.where(info["lost"], -1.0, info["success"])[:, None] * ~self.over[:, None]
        rewards = np.where(places == ends, outcome, 0.0)
        self.over, self.length = self.over | terminated | truncated, self.length + info["steps"]
        terminations, truncations = ((places >= ends) & flag[:, None] for flag in (terminated, truncated & ~terminated))
        episode = dict(success_once=info["success"], episode_len=self.length.astype(np.float32))
        infos = {"episode": {name: torch.from_numpy(value.copy()) for name, value in episode.items()}}
        rewards = torch.from_numpy(rewards.astype(np.float32))
        return [self.shown(obs)], rewards, torch.from_numpy(terminations), torch.from_numpy(truncations), [infos]

    def shown(self, obs: dict[str, np.ndarray]) -> dict[str, Any]:
        """An observation by RLinf's names; all cameras are "extra views"."""
        pixels = {"extra_view_images": torch.from_numpy(obs["image"].copy())} if obs["image"].shape[1] else {}
        return dict(states=torch.from_numpy(obs["state"].copy()), task_descriptions=list(self.venv.instructions), **pixels)


# ---------------------------------------------------------------------------------------------------------------- the workers


class Rollout(MultiStepRolloutWorker):
    """RLinf's own. As a class of this module it brings the module along, before RLinf asks for an accelerator."""


class StepNFT(EmbodiedNFTFSDPPolicy):
    """RLinf's NFT worker with the labels, the loss and θ_old of algos/stepnft_pi0.py; `algorithm` has their arguments.

    θ_old is held in float32, of the trained parameters only, sharded as they are, and is part of a checkpoint.
    """

    def __init__(self, cfg: DictConfig):
        if os.environ.get("RLINF_EXT_MODULE") != __name__:
            raise RuntimeError(f"RLINF_EXT_MODULE is not {__name__}: set it before Ray starts, so that all workers load it")
        super().__init__(cfg)
        os.environ["LOCAL_RANK"] = str(max(0, int(os.environ["LOCAL_RANK"])))  # −1 without an accelerator
        places, group_size = self._component_placement.get_world_size, cfg.algorithm.group_size
        share = cfg.env.train.total_num_envs // max(places("env") * self.stage_num, places("actor"))
        if share % group_size:
            raise ValueError(f"a training worker gets {share} environments of each environment worker, which cuts groups of "
                             f"{group_size} apart: change env.train.total_num_envs or the placement")

    # ------------------------------------------------------------------------------------------------------------- θ_old

    def trained(self) -> dict[str, torch.Tensor]:
        """θ: the trained parameters by name, sharded."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def init_rollout_model(self) -> None:
        self.rollout = {name: parameter.detach().float().clone() for name, parameter in self.trained().items()}

    def get_rollout_state_dict(self) -> dict[str, torch.Tensor]:
        return self.rollout

    def soft_update_rollout_model(self) -> None:
        update_rollout_policy(self.rollout.values(), self.trained().values(), ema_decay(self.version, **self.cfg.algorithm.ema))

    def save_checkpoint(self, save_path: str, step: int = 0) -> None:
        """RLinf's checkpoint, with θ_old, and both policies as folders that `policies.load` reads."""
        super().save_checkpoint(save_path, step)
        dcp.save(self.rollout, checkpoint_id=os.path.join(save_path, "rollout"))
        weights = self.get_model_state_dict(cpu_offload=True, full_state_dict=True)
        rollout = {name: materialize_tensor(tensor).cpu() for name, tensor in self.rollout.items()}
        if self._rank == 0:
            policy = load(self.cfg.actor.model, self.torch_dtype, "cpu")
            for name, part in (("policy", weights), ("rollout_policy", weights | rollout)):
                policy.load_state_dict({key.removeprefix("policy."): tensor for key, tensor in part.items()})
                policies.save(policy, os.path.join(save_path, name))

    def load_checkpoint(self, load_path: str) -> None:
        super().load_checkpoint(load_path)
        dcp.load(self.rollout, checkpoint_id=os.path.join(load_path, "rollout"))

    # ------------------------------------------------------------------------------------------------------------- labels

    def compute_advantages_and_returns(self) -> dict[str, Any]:
        """Labels (T, E, 1) of T chunks of E episodes, in place of advantages; the mask says which are learned from."""
        batch, cfg = self.rollout_batch, self.cfg.algorithm
        rewards, ran = batch["rewards"], batch["loss_mask"].any(-1)  # (T, E, C), (T, E): chunks that began before the end
        success, lost = ((rewards == value).any(-1).any(0).numpy() for value in (1, -1))  # (E,)
        group = np.arange(len(success)) // cfg.group_size
        group[lost] = -1 - np.flatnonzero(lost)  # nobody is compared with a lost episode
        turn, episode = (index.numpy() for index in ran.nonzero(as_tuple=True))  # (M,)
        y, keep = chunk_labels(success, group, episode, turn, **cfg.labels)
        batch["advantages"] = torch.zeros(*ran.shape, 1)
        batch["loss_mask"] = torch.zeros(*ran.shape, 1, dtype=torch.bool)
        batch["advantages"][turn, episode, 0] = torch.from_numpy(y).float()
        batch["loss_mask"][turn, episode, 0] = torch.from_numpy(keep & ~lost[episode])
        signal = batch["loss_mask"].float().mean().to(self.device)
        torch.distributed.all_reduce(signal)
        self.signal = signal.item() / self._world_size  # share of what all workers hold that is learned from
        return compute_rollout_metrics(batch) | dict(signal=self.signal)

    # ------------------------------------------------------------------------------------------------------------- update

    def run_training(self) -> dict[str, float]:
        if self.signal:
            return super().run_training()
        self.lr_scheduler.step()  # no group has contrast: there is nothing to learn from
        self.soft_update_rollout_model()
        return {}

    def _precompute_nft_training_inputs(self) -> None:
        """Which of its K transitions are learned from, (M, n), of each chunk."""
        inputs, transitions = self.rollout_batch["forward_inputs"], self.cfg.algorithm.transitions
        M, K = inputs["v"].shape[:2]
        steps = torch.arange(K).expand(M, K)
        inputs["step"] = (
            steps if transitions == "all" else torch.randint(K, (M, 1)) if transitions == "random" else steps[:, transitions, None]
        )

    def nft_forward_and_loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a micro-batch of B chunks, so weighted that each that is learned from counts the same wherever it is."""
        inputs, keep, model = batch["forward_inputs"], batch["loss_mask"].flatten(), self.cfg.actor.model
        row, step = torch.arange(len(keep), device=keep.device)[:, None], inputs["step"]  # (B, 1), (B, n)
        x_t, x_next, v_old = inputs["x"][row, step], inputs["x"][row, step + 1], inputs["v"][row, step]  # (B, n, H, A)
        v_theta = self.model(inputs, x_t, 1 - step / model.num_steps).float()
        share = keep.float().mean() / self.signal
        keep = keep if keep.any() else ~keep  # of weight zero: all workers have to take part
        transitions = v_theta, v_old, x_t, x_next, step, batch["advantages"].expand_as(step)
        mask = torch.ones_like(x_t[0, 0], dtype=torch.bool)
        if self.cfg.algorithm.mask_padding:
            mask[model.num_action_chunks :], mask[:, model.action_dim :] = False, False
        loss, metrics = stepnft_loss(
            *(each[keep].flatten(0, 1) for each in transitions), num_steps=model.num_steps, noise_level=model.noise_level,
            mask=mask, **self.cfg.algorithm.loss,
        )
        return share * loss, {f"actor/{name}": value.item() for name, value in {**metrics, "loss": loss.detach()}.items()}


# --------------------------------------------------------------------------------------------------------------- the launcher


def launch(cfg: DictConfig, actor: type[StepNFT] = StepNFT) -> EmbodiedRunner:
    """RLinf's runner with its workers, on the Ray cluster that this machine belongs to, or on a new one of this machine."""
    os.environ["RLINF_EXT_MODULE"] = __name__  # the workers inherit it
    if cfg.runner.resume_dir:  # or the initial states of the first iterations would come again
        cfg.env.train.seed += int(cfg.runner.resume_dir.split("global_step_")[-1])
    register()
    cfg = validate_cfg(cfg)
    cluster = Cluster(cluster_cfg=cfg.cluster)
    placement = HybridComponentPlacement(cfg, cluster)
    groups = {
        name: worker.create_group(cfg).launch(cluster, name=cfg[name].group_name, placement_strategy=placement.get_strategy(name))
        for name, worker in dict(actor=actor, rollout=Rollout, env=EnvWorker).items()
    }
    runner = EmbodiedRunner(cfg, **groups)
    runner.init_workers()
    return runner
