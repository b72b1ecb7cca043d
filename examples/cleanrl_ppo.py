# Docs: docs/frameworks.md. PPO in one file: python examples/cleanrl_ppo.py
# final_obs is what an episode that was cut off ended with, from where its value goes on.
import gymnasium as gym
import torch
from torch import nn
from torch.distributions import Normal

num_envs, num_steps, total_steps, gamma, gae_lambda = 8, 50, 2_000, 0.8, 0.9
envs = gym.make_vec(
    "pi_stepnft:pi_stepnft/PickCube-v1", num_envs, obs_mode="state", chunk=None, reward_mode="normalized_dense",
    autoreset="same_step",
)
envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


def mlp(out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out))


torch.manual_seed(1)
actor, critic, log_std = mlp(action_dim), mlp(1), nn.Parameter(torch.zeros(action_dim))
parameters = [*actor.parameters(), *critic.parameters(), log_std]
optimizer = torch.optim.Adam(parameters, lr=3e-4)
obs = torch.as_tensor(envs.reset(seed=1)[0])
for update in range(total_steps // (num_envs * num_steps)):
    rows = []
    with torch.no_grad():
        for _ in range(num_steps):
            policy = Normal(actor(obs), log_std.exp())
            action = policy.sample()
            after, reward, terminated, truncated, info = envs.step(action.clamp(-1, 1).numpy())
            reward, done = torch.as_tensor(reward).float(), torch.as_tensor(terminated | truncated)
            for i in truncated.nonzero()[0]:  # not the end of the task: the value goes on behind the cut
                reward[i] += gamma * critic(torch.as_tensor(info["final_obs"][i]))[0]
            rows.append((obs, action, policy.log_prob(action).sum(-1), critic(obs)[:, 0], reward, done))
            obs = torch.as_tensor(after)
        b_obs, b_actions, b_logprobs, values, rewards, dones = (torch.stack(column) for column in zip(*rows))  # (steps, envs, …)
        advantages, advantage, value = torch.zeros_like(rewards), 0.0, critic(obs)[:, 0]
        for t in reversed(range(num_steps)):
            goes_on = ~dones[t]
            advantage = rewards[t] + gamma * goes_on * value - values[t] + gamma * gae_lambda * goes_on * advantage
            advantages[t], value = advantage, values[t]
    b_obs, b_actions, b_logprobs = b_obs.flatten(0, 1), b_actions.flatten(0, 1), b_logprobs.flatten()
    b_advantages, b_returns = advantages.flatten(), (advantages + values).flatten()
    for _ in range(4):
        for mb in torch.randperm(len(b_obs)).split(100):
            ratio = (Normal(actor(b_obs[mb]), log_std.exp()).log_prob(b_actions[mb]).sum(-1) - b_logprobs[mb]).exp()
            gain = (b_advantages[mb] - b_advantages[mb].mean()) / (b_advantages[mb].std() + 1e-8)
            policy_loss = -torch.min(gain * ratio, gain * ratio.clamp(0.8, 1.2)).mean()
            value_loss = (critic(b_obs[mb])[:, 0] - b_returns[mb]).square().mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    returns = torch.tensor(list(envs.return_queue)).mean()
    print(f"steps {(update + 1) * num_envs * num_steps}, episodes {envs.episode_count}, mean return {returns:.2f}")
envs.close()
