"""`Rollout`: the episodes of one iteration, which an algorithm plays turn by turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Turn:
    """The next chunk of b episodes: what they observe now, and what an algorithm is to do with it, `act`."""

    obs: dict[str, np.ndarray]  # {"image": uint8 (b, cameras, H, W, 3), "state": float32 (b, S)}
    instructions: list[str]
    episode: torch.Tensor  # (b,) int64 number of each among the iteration's episodes
    number: torch.Tensor  # (b,) int64 how many chunks it had before
    cut: bool
    """whether they have been cut off: this is the last observation of each, and there is nothing to do"""
    shape: tuple[int, ...]  # (H, A) of a chunk
    device: torch.device
    key: tuple[int, int]  # of the run and of the iteration
    among_all: list[int]  # number of each episode among those of all ranks
    actions: np.ndarray | None = None

    def noise(self, n: int) -> torch.Tensor:
        """Standard normal noise (b, n, H, A) float32 on the device, which follows from the run's seed, the iteration, the episode
        and the turn: whatever other episodes are played beside it, and on however many machines."""
        drawn = [rng.standard_normal((n, *self.shape), np.float32) for rng in self._generators(0)]
        return torch.from_numpy(np.stack(drawn)).to(self.device)

    def integers(self, high: int) -> torch.Tensor:
        """Random whole numbers (b,) int64 in [0, high), which follow from the same as the noise."""
        return torch.tensor([rng.integers(high) for rng in self._generators(1)], device=self.device)

    def _generators(self, stream: int) -> Iterator[np.random.Generator]:
        for episode, number in zip(self.among_all, self.number.tolist()):
            yield np.random.default_rng((*self.key, episode, number, stream))

    def act(self, actions: torch.Tensor) -> None:
        """Execute n actions of each, (b, n, action_dim) in the environments' units, before the next turn of these episodes."""
        self.actions = actions.cpu().numpy()


class Rollout:
    """Episodes, played side by side; iterating gives the turns of those that are still running.

    Afterwards: success, lost (its worker died, or its actions were no finite numbers: to be left out) and terminated (nothing
    follows) of each episode (E,) bool, rewards (E, P) float32 of each chunk, and env_steps, how many actions were executed.
    """

    def __init__(self, venv, seeds: np.ndarray, *, execute: int, max_steps: int, shape: tuple[int, ...], device: torch.device,
                 key: tuple[int, int], overlap: bool, observe_cut: bool, among_all: np.ndarray | None = None):
        """venv: B environments; seeds: (E,) of the initial states, E a multiple of B, played B at a time. execute: actions of a
        chunk; max_steps: after how many an episode is cut off, 0 for the task's own limit. shape, device, key: as of `Turn`.
        overlap: in two halves, of which one is simulated while there is a turn in the other. observe_cut: whether episodes that
        were cut off have a last turn, to look at. among_all: (E,) their numbers among the episodes of all ranks; None: there are no
        others."""
        self.venv, self.seeds, self.execute, self.overlap, self.observe_cut = venv, seeds, execute, overlap, observe_cut
        self.turn = dict(shape=shape, device=device, key=key)
        self.among_all = np.arange(len(seeds)) if among_all is None else among_all
        self.success, self.lost, self.terminated = np.zeros((3, len(seeds)), bool)
        self.rewards = np.zeros((len(seeds), -(-(max_steps or venv.max_episode_steps) // execute)), np.float32)
        self.env_steps = 0

    def __iter__(self) -> Iterator[Turn]:
        playing = deque(map(self._play, np.array_split(np.arange(self.venv.num_envs), 1 + self.overlap)))
        while playing:
            part = playing.popleft()
            for turn in part:
                if turn is None:  # it waits for its simulators
                    playing.append(part)
                    break
                yield turn

    def _play(self, slots: np.ndarray) -> Iterator[Turn | None]:
        """The turns of some environments; None while they compute."""
        venv, B = self.venv, self.venv.num_envs
        mine = np.isin(np.arange(B), slots)
        for begin in range(0, len(self.seeds), B):
            venv.reset_async(seed=self.seeds[begin : begin + B], options=dict(reset_mask=mine))
            yield None
            obs, info = venv.reset_wait()
            running, episodes = mine.copy(), begin + np.arange(B)
            for number in range(self.rewards.shape[1]):
                index = np.flatnonzero(running)
                if not len(index):
                    break
                yield (turn := self._turn(obs, index, begin, number))
                actions = np.zeros((B, self.execute, venv.action_dim), np.float32)
                actions[index] = turn.actions
                venv.step_async(actions, running)
                yield None
                obs, reward, terminated, truncated, info = venv.step_wait()
                now = episodes[index]
                self.rewards[now, number], self.terminated[now] = reward[index], terminated[index]
                self.lost[now] = info["lost"][index]
                self.env_steps += int(info["steps"][index].sum())
                running &= ~(terminated | truncated)
            self.success[episodes[mine]] = info["success"][mine]
            cut = slots[~(self.terminated | self.lost)[episodes[slots]]]
            if self.observe_cut and len(cut):
                yield self._turn(obs, cut, begin, self.rewards.shape[1], cut=True)

    def _turn(self, obs: dict[str, np.ndarray], index: np.ndarray, begin: int, number: int, cut: bool = False) -> Turn:
        seen = {name: value[index] for name, value in obs.items()}
        episode, among_all = torch.from_numpy(begin + index), self.among_all[begin + index].tolist()
        told = [self.venv.instructions[i] for i in index]
        return Turn(seen, told, episode, torch.full_like(episode, number), cut, among_all=among_all, **self.turn)
