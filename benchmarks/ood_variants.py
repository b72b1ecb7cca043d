"""The out-of-distribution variants, looked at and solved: python benchmarks/ood_variants.py --env-ids PickCube-v1

Per task: a contact sheet of every variant (the policy's 96 px picture beside the one for people, all from the same seed) at
docs/images/ood_<task>.png, and the scripted expert's success on every variant in benchmarks/results/ood_experts.json, which has to
be 80 % or more. Results that are there already are not repeated: delete their lines to do so. Prints a Markdown table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from pi_stepnft import envs
from pi_stepnft.envs import demos
from pi_stepnft.envs.maniskill import Camera, ManiSkillSpec, variants
from pi_stepnft.envs.maniskill.env import ManiSkillEnv
from pi_stepnft.harness.statistics import wilson

OUT = Path(__file__).parent / "results" / "ood_experts.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE, LABEL, COLUMNS = 96, 12, 6
LIMIT = 300_000  # bytes of a sheet


@dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(variants.TASKS)
    """tasks"""
    episodes: int = 50
    """expert episodes per variant, with seeds seed, seed + 1, …; vision variants, whose states are the task's own, get a tenth"""
    seed: int = envs.EVAL_SEED
    """first seed"""
    sheet: bool = True
    """draw the contact sheet"""
    sheet_seed: int = 3
    """whose episode the sheet shows"""
    experts: bool = True
    """run the expert"""
    variant: str = ""
    """only variants whose id contains this"""


def cell(env_id: str, seed: int) -> Image.Image:
    """The start of an episode (for a jumping object: just after it) in both pictures, with the variant's name above."""
    env = ManiSkillEnv(ManiSkillSpec(env_id, camera=Camera(), video_size=2 * SIZE))
    env.reset(seed)
    if variants.find(env_id).jump:
        env.step(np.zeros((variants.JUMP_STEP + 1, env.action_dim), np.float32))
    image, state = np.zeros((len(env.cameras), SIZE, SIZE, 3), np.uint8), np.zeros(env.state_dim, np.float32)
    env.observe(image, state)
    human = Image.fromarray(env.render()).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    env.close()
    picture = Image.new("RGB", (2 * SIZE + 2, SIZE + LABEL + 4), "white")
    picture.paste(Image.fromarray(image[env.cameras.index("base_camera")]), (0, LABEL))
    picture.paste(human, (SIZE, LABEL))
    ImageDraw.Draw(picture).text((1, 0), env_id.partition("/")[2] or env_id, "black")
    return picture


def contact_sheet(cells: list[Image.Image], path: Path) -> None:
    """Cells in rows, saved with as many colours as the limit allows."""
    width, height = cells[0].size
    sheet = Image.new("RGB", (width * COLUMNS, height * -(-len(cells) // COLUMNS)), "white")
    for i, picture in enumerate(cells):
        sheet.paste(picture, (width * (i % COLUMNS), height * (i // COLUMNS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    for colors in (256, 128, 64, 32):
        sheet.quantize(colors, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= LIMIT:
            return


def solve(env_id: str, episodes: int, seed: int) -> dict:
    """The expert's outcomes on one variant."""
    env = ManiSkillEnv(ManiSkillSpec(env_id, obs_mode="state"))
    runs = [demos.demonstrate(env, seed + i, noise=0.0) for i in tqdm(range(episodes), desc=env_id, leave=False)]
    env.close()
    steps = [len(run["action"]) for run in runs if run]
    return dict(successes=len(steps), episodes=episodes, seed=seed, median_steps=float(np.median(steps)) if steps else None)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for task in args.env_ids:
        ids = [i for i in [task, *variants.variants(task)] if args.variant in i]
        if args.sheet:
            alive = ManiSkillEnv(ManiSkillSpec(task))  # without one, SAPIEN would compile its shaders anew for every picture
            cells = [cell(i, args.sheet_seed) for i in tqdm(ids, desc=f"{task}: pictures", leave=False)]
            alive.close()
            contact_sheet(cells, IMAGES / f"ood_{task}.png")
        for env_id in ids if args.experts else []:
            results = json.loads(OUT.read_text()) if OUT.exists() else {}
            if env_id not in results:
                few = "/" in env_id and variants.family(env_id) == "vision"
                results[env_id] = solve(env_id, max(1, args.episodes // 10) if few else args.episodes, args.seed)
                OUT.write_text(json.dumps(results, indent=1))
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    print("| variant | expert | 95 % interval | median steps |\n|---|---|---|---|")
    for env_id, r in results.items():
        if env_id.partition("/")[0] in args.env_ids:
            low, high = (100 * bound for bound in wilson(r["successes"], r["episodes"]))
            print(f"| {env_id} | {r['successes']} of {r['episodes']} | [{low:.0f}, {high:.0f}] % | {r['median_steps']:.0f} |")
