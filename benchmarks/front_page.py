"""The moving picture of the README: python algos/evaluate.py START TRAINED --labels before after --suites id, then

    python benchmarks/front_page.py runs/EVALUATION/videos/FILM.mp4

The film in which both checkpoints play the same episodes, as videos/readme_before_after.gif: half its pictures, 256 colours.
"""

import sys
from pathlib import Path

import imageio.v3 as iio
from PIL import Image

GIF = Path(__file__).resolve().parents[1] / "videos" / "readme_before_after.gif"

if __name__ == "__main__":
    pictures = [Image.fromarray(frame) for frame in iio.imread(sys.argv[1])[::2]]
    colours = pictures[-1].quantize(256, Image.Quantize.MAXCOVERAGE)  # of the picture with the outcomes, the cube's rare red too
    few = [picture.quantize(palette=colours, dither=Image.Dither.NONE) for picture in pictures]
    few[0].save(GIF, save_all=True, append_images=few[1:], duration=100, loop=0, optimize=True)
    print(f"{GIF}: {len(few)} pictures of {few[0].size[0]} × {few[0].size[1]}, {GIF.stat().st_size / 1e6:.1f} MB")
