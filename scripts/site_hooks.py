"""Of mkdocs.yml: README, CHANGELOG and CONTRIBUTING are pages of the site too; links to other files are left as words."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}


def on_files(files, config):
    for source, page in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text()).replace("[LICENSE](LICENSE)", "LICENSE")
        files.append(File.generated(config, page, content=text))
    film = "videos/readme_before_after.gif"
    files.append(File.generated(config, film, abs_src_path=str(ROOT / film)))
    return files


def on_page_markdown(markdown, page, **_):
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^]]+)\]\({re.escape(up)}[^)]*\)", r"\1", markdown)
