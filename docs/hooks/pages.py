"""Pages of the site that are files elsewhere in the repository.

Each is written once, where people look for it; its links are turned into links of the
site. What a link names that is no page (a script, a folder) is named without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/RESULTS.md": "results.md",
}
"""Path in the repository -> page of the site."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages.

    Args:
        files: Of the site.
        config: Of the site.

    Returns:
        The files with the pages.
    """
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=linked(text, source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links that lead out of `docs/`.

    Args:
        markdown: Of a page.
        page: The page.
        config: Of the site.
        files: Of the site.

    Returns:
        The page with links of the site.
    """
    if page.file.abs_src_path is None:  # one of those above
        return markdown
    return linked(markdown, f"docs/{page.file.src_uri}")


def linked(text: str, source: str) -> str:
    """Turn links of the repository into links of the site.

    Args:
        text: Markdown.
        source: Path of its file in the repository.

    Returns:
        The text with other links.

    Raises:
        FileNotFoundError: If a link names nothing in the repository.
    """

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        is_outward = not source.startswith("docs/") or target.startswith("../")
        if re.match(r"[a-z]+:", target) or not is_outward:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            msg = f"{source} links to {target}, which is not in the repository"
            raise FileNotFoundError(msg)
        page = PAGES.get(path) or path.removeprefix("docs/")
        is_page = path in PAGES or (path.startswith("docs/") and path.endswith(".md"))
        return f"[{label}]({page}{anchor})" if is_page else label

    return _LINK.sub(replace, text)
