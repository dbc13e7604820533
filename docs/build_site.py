"""The docs as a site of plain HTML files: `python docs/build_site.py [FOLDER]`, `site` by default.

Pages link to files all over the repository (recipes, figures, sources), and MkDocs knows only what lies in one folder:
so the pages are gathered first, in their places, with every file that they link to.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "recipes/**/*.md", "benchmarks/**/*.md")
LINK = re.compile(r"\]\(([^)#:\s]+)")
"""The path of a Markdown link or picture; addresses of the web have a colon."""


def gather(folder: Path) -> None:
    """Copy the pages, and what they link to, to the same places below `folder`."""
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        text = page.read_text()
        linked = {(page.parent / path).resolve() for path in LINK.findall(text)}
        for source in (page, *linked):
            if source.is_file():
                target = folder / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        (folder / page.relative_to(ROOT)).write_text(_without_folders(text, page.parent))


def _without_folders(text: str, beside: Path) -> str:
    """Links to folders, which a site has no page for: to their README where there is one, else no link."""

    def mend(match: re.Match[str]) -> str:
        label, path = match.groups()
        target = beside / path
        if not target.is_dir():
            return match[0]
        return f"[{label}]({path.rstrip('/')}/README.md)" if (target / "README.md").is_file() else label

    return re.sub(r"\[([^\]]+)\]\(([^)#:\s]+)\)", mend, text)


def build(site: Path) -> None:
    """Build the site; a link or an anchor that leads nowhere is an error.

    Raises CalledProcessError, MkDocs' own words on stderr.
    """
    with tempfile.TemporaryDirectory() as temporary:
        pages = Path(temporary) / "pages"
        gather(pages)
        settings = (ROOT / "docs" / "mkdocs.yml").read_text() + f"docs_dir: {pages}\nsite_dir: {site.resolve()}\n"
        config = Path(temporary) / "mkdocs.yml"
        config.write_text(settings)
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)]
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # its theme's advertisement for a successor
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
