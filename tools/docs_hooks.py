"""Hooks of mkdocs: the site also has what stands elsewhere in the repository, and links to it work in both places.

README.md is the front page; CHANGELOG.md, CONTRIBUTING.md and SECURITY.md are pages; plots of bench/results and the
examples are files of the site. A page links to them by their path in the repository, as it has to on GitHub; the site's
path takes its place here.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
FILES = {"bench/results": ("*.png", "results"), "examples": ("*.*", "examples"), ".": ("LICENSE", ".")}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def site_paths() -> dict[str, str]:
    """repository path -> path below docs/, of everything that is not there."""
    found = dict(PAGES)
    for folder, (pattern, place) in FILES.items():
        for file in sorted((ROOT / folder).glob(pattern)):
            found[posixpath.normpath(f"{folder}/{file.name}")] = posixpath.normpath(f"{place}/{file.name}")
    return found


def on_files(files, config):
    for source, place in site_paths().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, **_):
    place = page.file.src_uri
    source = {site: repository for repository, site in PAGES.items()}.get(place, f"docs/{place}")
    return with_site_links(markdown, source, place)


def with_site_links(markdown: str, source: str, place: str) -> str:
    """The text of the page `source`, a path in the repository, as the page `place` of the site."""
    elsewhere = site_paths()

    def replaced(match: re.Match) -> str:
        before, target, anchor, after = match.groups(default="")
        if "://" in target or target.startswith(("mailto:", "/")):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = elsewhere.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not path:
            return match[0]  # mkdocs says that it is not there
        return f"{before}{posixpath.relpath(path, posixpath.dirname(place) or '.')}{anchor}{after}"

    return LINK.sub(replaced, markdown)
