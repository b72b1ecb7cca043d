"""The picture of a report in docs/evaluate.md: python algos/evaluate.py pi0-tiny-pickcube-state pi0-tiny-pickcube-state-stepnft
--labels SFT StepNFT --episodes 64 --suites id semantic-object_color-1 semantic-object_size-1 semantic-object_shape-1, then

    python benchmarks/report_picture.py runs/EVALUATION/report.html

Its beginning, light, beside its first film, dark, as docs/images/report.png. Needs Chromium (Debian: apt-get install chromium).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "report.png"
WIDTH, HEIGHT, WHOLE = 688, 880, 6000  # px of each part, and of the page from which they are cut


def photograph(page: str, scheme: int) -> Image.Image:
    """A page, as high as WHOLE. scheme: 0 dark, 1 light."""
    with tempfile.TemporaryDirectory() as folder:
        (html := Path(folder, "page.html")).write_text(page)
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{WHOLE}",
             f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=5000", f"--screenshot={folder}/page.png",
             html.as_uri()],
            check=True, capture_output=True, timeout=120,
        )
        return Image.open(f"{folder}/page.png").convert("RGB").copy()


if __name__ == "__main__":
    page = Path(sys.argv[1]).read_text()
    films = page.index("<h2>Videos</h2>")
    beginning = photograph(page, scheme=1)
    videos = photograph(page[: page.index("<h1>")] + page[films:], scheme=0)  # the rest of the page, under its own style
    both = Image.new("RGB", (2 * WIDTH, HEIGHT))
    both.paste(beginning, (0, 0))
    both.paste(videos, (WIDTH, 0))
    both.quantize(256).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {both.size[0]} × {both.size[1]}, {PICTURE.stat().st_size / 1e3:.0f} kB")
