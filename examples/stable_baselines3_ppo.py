# Docs: docs/frameworks.md. PPO of Stable-Baselines3 on PickCube-v1: python examples/stable_baselines3_ppo.py
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

if __name__ == "__main__":  # the processes of SubprocVecEnv import this file
    options = dict(obs_mode="state", chunk=None, reward_mode="normalized_dense")
    venv = make_vec_env("pi_stepnft:pi_stepnft/PickCube-v1", 2, seed=0, env_kwargs=options, vec_env_cls=SubprocVecEnv)
    model = PPO("MlpPolicy", venv, n_steps=250, batch_size=125, gamma=0.8, seed=0, verbose=1)
    model.learn(total_timesteps=2_000)
    venv.close()
