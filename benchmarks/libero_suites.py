"""LIBERO's suites, looked at: python benchmarks/libero_suites.py

Per suite: a contact sheet of its tasks, docs/images/<suite>.jpg. Each task in its first fixed initial state: agentview and wrist
camera as a policy gets them, and agentview after 20 steps forwards and down, the same ones in every task.
"""

import gc
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import matplotlib
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from pi_stepnft import envs
from pi_stepnft.envs import EVAL_SEED
from pi_stepnft.envs.libero import LiberoSpec, tasks

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SIZE, GAP, CAPTION = 144, 4, 30


@dataclass
class Args:
    suites: tuple[str, ...] = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    """suites of LIBERO or LIBERO-PRO"""


def tile(env_id: str) -> Image.Image:
    """Three pictures of a task side by side, its number and instruction below."""
    env = LiberoSpec(env_id, image_size=SIZE).create(0, 1)
    env.reset(EVAL_SEED)
    before, after, state = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros(8, np.float32)
    env.observe(before, state)
    start = state[:3].copy()
    env.step(np.tile(np.array([0.5, 0, -0.5, 0, 0, 0, 1], np.float32), (20, 1)))
    env.observe(after, state)
    assert np.abs(state[:3] - start).max() > 0.03, f"the arm of {env_id} does not move"
    out = Image.new("RGB", (3 * SIZE, SIZE + CAPTION), "white")
    out.paste(Image.fromarray(np.concatenate([before[0], before[1], after[0]], axis=1)))
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 11)
    text = "\n".join(textwrap.wrap(f"{env_id.split('/')[1]}: {env.instruction}", 70))
    ImageDraw.Draw(out).multiline_text((3, SIZE + 1), text, "black", font, spacing=1)
    env.wrapper.close()
    return out


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    try:
        for suite in args.suites:
            tiles = []
            for _, number, _ in tasks.task_names(suite):
                tiles.append(tile(f"{suite}/{number}"))
                gc.collect()
                print(f"{suite}/{number}", flush=True)
            rows = -(-len(tiles) // 2)
            sheet = Image.new("RGB", (2 * 3 * SIZE + GAP, rows * (SIZE + CAPTION)), "white")
            for i, picture in enumerate(tiles):
                sheet.paste(picture, (i % 2 * (3 * SIZE + GAP), i // 2 * (SIZE + CAPTION)))
            sheet.save(IMAGES / f"{suite.replace('_', '-')}.jpg", quality=88)
    except envs.EnvError as error:
        sys.exit(f"error: {error}")
