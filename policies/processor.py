"""From observations and instructions to a policy's inputs, and from its outputs back to actions.

processor = Processor(config, Tokenizer(), NormStats.from_data(states), NormStats.from_data(actions))
images, image_mask, tokens, token_mask, state = processor(obs, instructions)
actions = processor.unnormalize_actions(policy.sample(policy.encode_prefix(images, image_mask, tokens, token_mask),
state))
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from pi_stepnft.policies.weights import regular

TINY_TOKENIZER = Path(__file__).parent / "assets" / "tiny_tokenizer.model"
STATE_BINS = np.linspace(-1, 1, 257)[:-1]
"""lower edges of the 256 bins in which π0.5's prompt gives a normalised state, as in openpi"""
CONSTANT = 1e-6
"""deviation, or half the distance of the quantiles, up to which a dimension of statistics never varied"""
TOKENIZER_BYTES = 128 << 20
"""of a tokenizer's file at most (PaliGemma's tokenizer.json: 34 MB)"""


@dataclass
class NormStats:
    """Statistics of one vector, each a float32 array (D,): mean, standard deviation, 1 % and 99 % quantiles."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    def __post_init__(self):
        for name in ("mean", "std", "q01", "q99"):
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
                value = np.asarray(getattr(self, name), dtype=np.float32)
            setattr(self, name, value)
            if value.ndim != 1 or value.shape != self.mean.shape:
                raise ValueError(
                    f"normalisation {name} has shape {value.shape}; expected one vector length for all four"
                )
            if not np.isfinite(value).all() or (name == "std" and (value < 0).any()):
                raise ValueError(
                    f"normalisation {name} holds NaN, infinity or a negative deviation; compute it from finite data"
                )
        if not (len(self) and (self.q01 <= self.q99).all()):
            raise ValueError("normalisation has no dimension, or a q01 above its q99; compute it from data")

    def __len__(self) -> int:
        return len(self.mean)

    def constant(self, normalization: str) -> np.ndarray:
        """(D,) bool: dimensions that never varied, by the statistics that `normalization` ("mean_std", "quantile") scales by."""
        return (self.std if normalization == "mean_std" else (self.q99 - self.q01) / 2) <= CONSTANT

    @classmethod
    def from_data(cls, data: np.ndarray, min_std: float = 1e-2) -> "NormStats":
        """Statistics over all but the last axis of data (..., D).

        min_std: floor of the deviation, and of half the distance between the quantiles, in the data's units. A value that
        hardly varies in the demonstrations would otherwise be magnified without limit as soon as the policy leaves them.
        Raises ValueError if there is no data.
        """
        flat = np.asarray(data, dtype=np.float64).reshape(-1, np.shape(data)[-1])  # (N, D)
        if not len(flat):
            raise ValueError(f"normalisation data has shape {np.shape(data)}; expected at least one vector")
        q01, q99 = np.quantile(flat, (0.01, 0.99), axis=0)
        short = np.maximum(0, min_std - (q99 - q01) / 2)
        return cls(flat.mean(axis=0), np.maximum(flat.std(axis=0), min_std), q01 - short, q99 + short)

    @classmethod
    def identity(cls, dim: int) -> "NormStats":
        """Statistics that leave a vector (dim,) as it is."""
        return cls(np.zeros(dim), np.ones(dim), -np.ones(dim), np.ones(dim))

    @classmethod
    def affine(cls, center: np.ndarray, scale: np.ndarray) -> "NormStats":
        """Statistics that map center ± scale, each (D,), to ±1, read as mean and deviation or as quantiles."""
        center, scale = np.asarray(center, dtype=np.float64), np.asarray(scale, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            return cls(center, scale, center - scale, center + scale)

    def to_dict(self) -> dict:
        """Lists for JSON, in openpi's layout."""
        return {name: getattr(self, name).tolist() for name in ("mean", "std", "q01", "q99")}


class Tokenizer:
    """A sentencepiece model or a `tokenizer.json`: the small one that ships with the project, or a path to PaliGemma's."""

    def __init__(self, path: str | Path = TINY_TOKENIZER):
        """Raises ValueError if the file is missing or no tokenizer."""
        self.path = regular(path, TOKENIZER_BYTES, "tokenizer ")
        try:
            self.serialized = self.path.read_bytes()
            if self.path.suffix == ".json":
                self._model = tokenizers.Tokenizer.from_buffer(self.serialized)
                self._size = self._model.get_vocab_size(with_added_tokens=False)
                self._bos = self._model.token_to_id("<bos>")
            else:
                self._model = sentencepiece.SentencePieceProcessor(model_proto=self.serialized)
                self._size, self._bos = self._model.get_piece_size(), self._model.bos_id()
            self._pieces("pick up the cube\n")  # some damage shows only here
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"tokenizer {path}: {error}; expected a sentencepiece .model or a tokenizer.json file"
            ) from None
        if self._bos is None or self._bos < 0:
            raise ValueError(f"tokenizer {path} has no begin-of-sequence token <bos>; expected PaliGemma's or one like it")

    def __len__(self) -> int:
        return self._size

    def _pieces(self, text: str) -> list[int]:
        if isinstance(self._model, tokenizers.Tokenizer):
            return self._model.encode(text, add_special_tokens=False).ids
        return self._model.encode(text)

    def encode(self, text: str, state: np.ndarray | None = None) -> list[int]:
        """Prompt of one observation, without padding.

        π0: begin-of-sequence, the cleaned text, and a separately encoded newline. With a state (D,), normalised, as π0.5 has
        it: begin-of-sequence and "Task: text, State: bins;\\nAction: ", where [-1, 1] is cut into 256 bins.
        """
        cleaned = text.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return [self._bos, *self._pieces(cleaned), *self._pieces("\n")]
        bins = np.digitize(state, STATE_BINS) - 1  # -1 below the range, 255 from the last edge on
        return [self._bos, *self._pieces(f"Task: {cleaned}, State: {' '.join(map(str, bins))};\nAction: ")]

    def longest(self, texts: Iterable[str], numbers: int = 0) -> int:
        """Tokens of the longest prompt with one of these sentences, and with a state of so many numbers in it if there are any."""
        state = np.ones(numbers) if numbers else None  # bins of three digits
        return max(len(self.encode(text, state)) for text in texts)


class Processor:
    """Tokenizer, normalisation and image preparation of one policy.

    B observations, N cameras in the configuration, L text tokens, S and A the padded state and action widths; S_raw and
    A_raw are the environment's own, known from the statistics.
    """

    def __init__(
        self,
        config,
        tokenizer: Tokenizer,
        state_stats: NormStats,
        action_stats: NormStats,
        device: torch.device | str = "cpu",
        relative: Sequence[int] = (),
        pad_state_bins: bool = False,
    ):
        """relative: action dimensions that the policy gives as offsets from the same dimension of the state (openpi's
        `pi0_libero`: 0 to 5). pad_state_bins: whether the state in π0.5's prompt is padded to the policy's width (lerobot
        before 0.5). Raises ValueError if the statistics or the vocabulary exceed what the policy's config has room for.
        """
        for name, stats, limit in (
            ("state", state_stats, config.state_dim),
            ("action", action_stats, config.action_dim),
        ):
            if len(stats) > limit:
                raise ValueError(f"{name} has {len(stats)} dimensions, the policy takes {limit}; raise {name}_dim")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.path} has {len(tokenizer)} pieces, "
                f"the policy takes {config.vocab_size}; raise vocab_size"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.state_stats = state_stats
        self.action_stats = action_stats
        self.device = torch.device(device)
        self.reads_state = getattr(config, "discrete_state", False)  # π0.5 only: π0's state is a token of its own
        self.relative = tuple(relative)
        self.pad_state_bins = pad_state_bins
        if any(not 0 <= dim < min(len(state_stats), len(action_stats)) for dim in self.relative):
            raise ValueError(
                f"relative is {self.relative}; expected dimensions of both the state ({len(state_stats)}) "
                f"and the action ({len(action_stats)})"
            )
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self._warned = False

    def __call__(
        self, obs: dict[str, np.ndarray], instructions: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Prepare a batch, on `self.device`.

        obs: "state" float (B, S_raw), and "image" uint8 (B, cameras, H, W, 3), which may be absent without cameras in
        the configuration; instructions: B strings.
        -> images (B, N, 3, image_size, image_size) float32 in [-1, 1], image_mask (B, N) bool, tokens (B, L) int64,
        token_mask (B, L) bool, state (B, S) float32. Raises ValueError on shapes that do not fit.
        """
        if not isinstance(obs, Mapping) or "state" not in obs or (self.config.num_cameras and obs.get("image") is None):
            wanted = '"state" and "image"' if self.config.num_cameras else '"state"'
            given = ", ".join(map(repr, obs)) if isinstance(obs, Mapping) else type(obs).__name__
            raise ValueError(f"the observation must be a dict with {wanted}, got {given or 'an empty one'}")
        if np.ndim(obs["state"]) != 2 or isinstance(instructions, str):
            raise ValueError("state must be (B, S) and instructions a list of B texts, also for a single observation")
        state = self.normalize_state(obs["state"])
        if len(instructions) != len(state):
            raise ValueError(f"{len(instructions)} instructions for {len(state)} observations; expected one each")
        images, image_mask = self.prepare_images(obs.get("image"), len(state))
        tokens, token_mask = self.tokenize(instructions, state)
        return images, image_mask, tokens, token_mask, state

    def options(self) -> dict:
        """Arguments beyond tokenizer, statistics and device, as JSON."""
        return {"relative": list(self.relative), "pad_state_bins": self.pad_state_bins}

    # ---------------------------------------------------------------- images

    def prepare_images(self, images: np.ndarray | None, batch: int) -> tuple[Tensor, Tensor]:
        """uint8 images (B, cameras, H, W, 3) -> ((B, N, 3, image_size, image_size) in [-1, 1], mask (B, N)).

        Cameras the observation lacks become all -1 images with mask False. Raises ValueError on too many cameras or
        another dtype.
        """
        N, size = self.config.num_cameras, self.config.image_size
        given = 0 if images is None or N == 0 else images.shape[1]
        prepared = torch.full((batch, max(0, N - given), 3, size, size), -1.0, device=self.device)  # absent cameras
        if given:
            images = torch.as_tensor(images)
            if (
                images.ndim != 5
                or images.shape[0] != batch
                or given > N
                or images.shape[-1] != 3
                or images.dtype != torch.uint8
            ):
                raise ValueError(
                    f"images are {images.dtype} {tuple(images.shape)}; "
                    f"expected torch.uint8 ({batch}, up to {N} cameras, H, W, 3)"
                )
            frames = images.flatten(0, 1).permute(0, 3, 1, 2)  # (B * cameras, 3, H, W)
            frames = resize_with_padding(frames, size).to(self.device).float()
            frames = frames.div_(255).mul_(2).sub_(1).unflatten(0, (batch, given))  # channels last in memory: nothing is transposed
            prepared = torch.cat((frames, prepared), dim=1) if given < N else frames
        mask = (torch.arange(N, device=self.device) < given).expand(batch, N)
        return prepared, mask

    # ---------------------------------------------------------------- text

    def tokenize(self, instructions: Sequence[str], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B strings -> tokens (B, L) int64, padded on the right with 0, and mask (B, L).

        state: (B, S) as `normalize_state` gives it, for a policy that reads it from its prompt (π0.5 with `discrete_state`);
        others ignore it. Without a state in it, a repeated prompt is encoded once. A longer prompt is cut to L tokens, with
        one warning. Raises ValueError if the state is needed and absent.
        """
        if self.reads_state:
            if state is None:
                raise ValueError("the prompt of this policy holds the state; pass the normalised state to tokenize")
            bins = state if self.pad_state_bins else state[..., : len(self.state_stats)]
            rows = [self._encode(text, values) for text, values in zip(instructions, bins.cpu().numpy())]
        else:
            for text in instructions:
                if text not in self._tokens:
                    self._tokens[text] = self._encode(text)
            rows = [self._tokens[text] for text in instructions]
        return torch.stack([tokens for tokens, _ in rows]), torch.stack([mask for _, mask in rows])

    def _encode(self, text: str, state: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        length = self.config.max_token_len
        ids = self.tokenizer.encode(text, state)
        if len(ids) > length and not self._warned:
            self._warned = True
            warnings.warn(f"prompt of {len(ids)} tokens cut to max_token_len {length}: {text!r}", stacklevel=4)
        if max(ids) >= self.config.vocab_size:  # a tokenizer.json may number its pieces as it likes
            raise ValueError(
                f"tokenizer {self.tokenizer.path} numbers a piece {max(ids)}, "
                f"the policy takes {self.config.vocab_size}; use the policy's tokenizer"
            )
        ids = ids[:length]
        tokens = torch.tensor(ids + [0] * (length - len(ids)), device=self.device)
        return tokens, torch.arange(length, device=self.device) < len(ids)

    # ---------------------------------------------------------------- state and actions

    def normalize_state(self, state: np.ndarray | Tensor) -> Tensor:
        """(..., S_raw) -> (..., S) float32, scaled by the statistics, then zeros."""
        return self._normalize(state, self.state_stats, self.config.state_dim, "state")

    def normalize_actions(self, actions: np.ndarray | Tensor, state: np.ndarray | Tensor | None = None) -> Tensor:
        """(..., H, A_raw) in the environment's units -> (..., H, A) float32, scaled by the statistics, then zeros.

        state: (..., S_raw), not normalised, at the beginning of the chunk, for a policy with `relative` actions.
        """
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        if self.relative:
            actions = self._shift(actions, state, -1)
        return self._normalize(actions, self.action_stats, self.config.action_dim, "action")

    def _normalize(self, x: np.ndarray | Tensor, stats: NormStats, width: int, name: str) -> Tensor:
        x = torch.as_tensor(x, dtype=torch.float32, device=self.device)
        if x.shape[-1] != len(stats):
            raise ValueError(
                f"{name} has {x.shape[-1]} dimensions; expected {len(stats)}, as in the policy's statistics"
            )
        # A dimension that never varied is measured in its own units: divided by 1e-6, as in openpi and lerobot, the first
        # observation that differs by a hair would be thousands of deviations away. Its own value is the same in all three.
        constant = torch.as_tensor(stats.constant(self.config.normalization), device=x.device)
        if self.config.normalization == "quantile":
            low, high = torch.as_tensor(stats.q01, device=x.device), torch.as_tensor(stats.q99, device=x.device)
            x = (x - low) / torch.where(constant, 2.0, high - low + 1e-6) * 2 - 1
        else:
            mean, std = torch.as_tensor(stats.mean, device=x.device), torch.as_tensor(stats.std, device=x.device)
            x = (x - mean) / torch.where(constant, 1.0, std + 1e-6)
        return F.pad(x, (0, width - len(stats)))

    def unnormalize_actions(
        self, actions: np.ndarray | Tensor, state: np.ndarray | Tensor | None = None
    ) -> np.ndarray | Tensor:
        """(..., H, A) -> (..., H, A_raw) in the environment's units; numpy gives numpy, a tensor gives a tensor.

        A dimension that never varied keeps its value, whatever the policy says.
        state: (..., S_raw), not normalised, that the policy acted on, for a policy with `relative` actions.
        """
        stats = self.action_stats
        x = torch.as_tensor(actions)[..., : len(stats)].float()
        if self.config.normalization == "quantile":
            low, high = torch.as_tensor(stats.q01, device=x.device), torch.as_tensor(stats.q99, device=x.device)
            x = (x + 1) / 2 * (high - low + 1e-6) + low
        else:
            mean, std = torch.as_tensor(stats.mean, device=x.device), torch.as_tensor(stats.std, device=x.device)
            x = x * (std + 1e-6) + mean
        if self.relative:
            x = self._shift(x, state, 1)
        return x if isinstance(actions, Tensor) else x.numpy()

    def _shift(self, actions: Tensor, state: np.ndarray | Tensor | None, sign: int) -> Tensor:
        """Actions (..., H, A_raw) with `sign` times the state (..., S_raw) added to the relative dimensions."""
        if state is None:
            raise ValueError(f"actions {self.relative} of this policy are relative to the state; pass the observation's state")
        dims = list(self.relative)
        state = torch.as_tensor(state, dtype=actions.dtype, device=actions.device)
        actions = actions.clone()
        actions[..., dims] += sign * state[..., None, dims]
        return actions


def resize_with_padding(images: Tensor, size: int) -> Tensor:
    """Fit uint8 images (B, 3, H, W) into squares (B, 3, size, size), aspect kept, centred on black.

    Bilinear with antialiasing, as PIL resizes and thus as the published policies' data were prepared.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    ratio = max(height, width) / size
    new_height, new_width = max(1, int(height / ratio)), max(1, int(width / ratio))
    resized = F.interpolate(images, (new_height, new_width), mode="bilinear", antialias=True)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return F.pad(resized, (left, size - new_width - left, top, size - new_height - top))
