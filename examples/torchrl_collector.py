# Docs: docs/frameworks.md. Episodes of PickCube-v1 by a collector of TorchRL: python examples/torchrl_collector.py
import gymnasium as gym
from torchrl.collectors import Collector, RandomPolicy
from torchrl.envs import GymWrapper

venv = gym.make_vec("pi_stepnft:pi_stepnft/PickCube-v1", num_envs=4, obs_mode="state", chunk=None)
env = GymWrapper(venv).auto_register_info_dict()  # "success", "steps" and "lost" beside the observation
collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=400, total_frames=800)
for batch in collector:  # (4, 100)
    print(batch["next", "done"].sum().item(), "episodes,", batch["next", "success"].sum().item(), "successes")
collector.shutdown()
