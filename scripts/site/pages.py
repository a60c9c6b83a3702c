"""A hook of mkdocs.yml: README.md, CONTRIBUTING.md and CHANGELOG.md as pages of the site.

They stand above docs/, so their links to each other and into docs/ are made to fit.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those of docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its in PAGES.items():
            text = text.replace(f"]({other}", f"]({its}")
        files.append(File.generated(config, page, content=text))
    return files
