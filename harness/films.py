"""Videos of evaluated episodes, which are replayed by their actions."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pi_stepnft.harness.evaluation import Evaluation

GREEN, RED, GREY, WHITE = (0, 158, 115), (213, 94, 0), (150, 150, 150), (235, 235, 235)
GAP, STRIP = 4, 24
"""Between tiles, and height of a line of text, px."""
OUTCOMES = {True: ("success", GREEN), False: ("failure", RED), None: ("replay differs", GREY)}


@dataclass
class Episode:
    """What a film shows of an episode: frames (T + 1, H, W, 3) uint8, one per control step, and how it ended (None: the replay
    ended otherwise than the evaluation, as it can on a GPU or where a worker dies)."""

    seed: int
    frames: np.ndarray
    success: bool | None


def replay(
    venv, seeds: Sequence[int], actions: Sequence[np.ndarray], success: Sequence[bool], *, progress: str = ""
) -> list[Episode]:
    """Repeat episodes by their actions (T, A), without the policy, and take a picture after every control step.

    success: how they ended when they were evaluated. progress: label of a progress bar, or "".
    """
    episodes, bar = [], tqdm(total=sum(map(len, actions)), desc=progress, unit="picture", leave=False, disable=not progress)
    for first in range(0, len(seeds), venv.num_envs):
        batch = list(actions[first : first + venv.num_envs])
        count = len(batch)
        padded = list(seeds[first : first + count]) + [0] * (venv.num_envs - count)
        venv.reset(seed=padded, options={"reset_mask": np.arange(venv.num_envs) < count})
        frames, outcome = [[frame] for frame in venv.render(range(count))], np.zeros(count, bool)
        lost = np.zeros(count, bool)
        for step in range(max(map(len, batch))):
            moving = [slot for slot in range(count) if step < len(batch[slot])]
            chunk = np.zeros((venv.num_envs, 1, venv.action_dim), np.float32)
            for slot in moving:
                chunk[slot, 0] = batch[slot][step]
            info = venv.step(chunk)[-1]
            outcome[moving] = info["success"][moving]
            lost |= info["lost"][:count]
            for slot, frame in zip(moving, venv.render(moving)):
                frames[slot].append(frame)
            bar.update(len(moving))
        for slot in range(count):
            expected = bool(success[first + slot])
            same = outcome[slot] == expected and not lost[slot]
            episodes.append(Episode(padded[slot], np.stack(frames[slot]), expected if same else None))
    bar.close()
    return episodes


def ending(episode: Episode) -> str:
    """The last of its captions."""
    return f"{OUTCOMES[episode.success][0]}, step {len(episode.frames) - 1}"


def write(
    path: str | Path, instruction: str, rows: Sequence[tuple[str, tuple, Sequence[Episode]]], *, fps: int = 20, crf: int = 30
) -> None:
    """A film (.mp4, H.264) of rows of episodes side by side, each row with a title and its colour (r, g, b).

    The instruction stands on top; below each tile its seed, and below that the step and, once the episode has ended, the outcome.
    Columns are as wide as their captions where pictures are smaller.
    """
    import imageio.v3 as iio
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)  # Pillow's own knows no Greek
    side = rows[0][2][0].frames.shape[1]
    columns = max(len(episodes) for _, _, episodes in rows)
    told = [caption for *_, episodes in rows for e in episodes for caption in (f"seed {e.seed}", ending(e))]
    column, row = max(side, *(math.ceil(font.getlength(text)) + 4 for text in told)), side + 3 * STRIP
    width = max(columns * (column + GAP) + GAP, *(math.ceil(font.getlength(title)) + 2 * GAP + 20 for title, *_ in rows))
    lines = textwrap.wrap(f"“{instruction}”", width // 8)
    top = STRIP * len(lines)
    height = top + len(rows) * row
    blank = Image.new("RGB", (width + width % 2, height + height % 2), (20, 20, 20))  # H.264 wants even sides
    draw = ImageDraw.Draw(blank)
    for i, line in enumerate(lines):
        draw.text((GAP + 2, STRIP * (i + 0.5)), line, WHITE, font, anchor="lm")
    places = []  # (left, top of its row, episode)
    for r, (title, colour, episodes) in enumerate(rows):
        y = top + r * row
        draw.rectangle((GAP + 2, y + 6, GAP + 13, y + 17), colour)
        draw.text((GAP + 20, y + STRIP / 2), title, WHITE, font, anchor="lm")
        places += [(GAP + c * (column + GAP), y + STRIP, episode) for c, episode in enumerate(episodes)]

    def picture(step: int) -> np.ndarray:
        canvas = blank.copy()
        draw = ImageDraw.Draw(canvas)
        for x, y, episode in places:
            end = len(episode.frames) - 1
            canvas.paste(Image.fromarray(episode.frames[min(step, end)]), (x, y))
            draw.text((x + 2, y + side + 0.5 * STRIP), f"seed {episode.seed}", GREY, font, anchor="lm")
            text, colour = f"step {step}", WHITE
            if step >= end:
                text, colour = ending(episode), OUTCOMES[episode.success][1]
                draw.rectangle((x, y, x + side - 1, y + side - 1), None, colour, 4)
            draw.text((x + 2, y + side + 1.3 * STRIP), text, colour, font, anchor="lm")
        return np.asarray(canvas)

    steps = max(len(episode.frames) for *_, episode in places)
    films = [picture(step) for step in range(steps)]
    films += films[-1:] * math.ceil(1.5 * fps)  # time to read the outcomes
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.mp4")
    iio.imwrite(temporary, np.stack(films), fps=fps, codec="libx264", quality=None, macro_block_size=2,
                output_params=["-crf", str(crf), "-movflags", "+faststart"])
    temporary.replace(path)  # a film that is there is whole


def record(venv, result: Evaluation, path: str | Path, label: str, *, episodes: int = 8) -> None:
    """A film of an evaluation's first episodes, in rows of four under a label; at most as many as there are environments."""
    first = range(min(episodes, len(result.success), venv.num_envs))
    told = [result.actions[i, : result.steps[i]] for i in first]
    tiles = replay(venv, result.seeds[first], told, result.success[first], progress="video")
    colour = (0, 114, 178)
    write(path, venv.instruction, [(label, colour, tiles[row : row + 4]) for row in range(0, len(tiles), 4)])
