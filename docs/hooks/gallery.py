"""The gallery: each example runs against a server, and shows what it printed and drew.

A page is made from an example's docstring, output, picture and source. Outputs are kept
in `.cache/gallery` under a hash of all that they depend on: the example, both packages,
and the versions of what computes and draws.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "gallery"
LIBRARIES = ("torch", "numpy", "matplotlib")
AT_ONCE = 2
"""Most of an example's time is the import of torch."""
LIMIT_S = 300
"""An example that takes longer has no place in a gallery."""

log = get_plugin_logger("gallery")


@dataclass(frozen=True)
class Example:
    """An example, and what it left when it ran."""

    path: Path
    printed: str
    picture: bytes | None

    @property
    def name(self) -> str:
        """What its page is called."""
        return self.path.stem

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return self._docstring[0].strip().rstrip(".")

    @property
    def text(self) -> str:
        """The rest of its docstring."""
        return self._docstring[1].strip("\n")

    @property
    def program(self) -> str:
        """Its source without the docstring."""
        source = self.path.read_text()
        first = ast.parse(source).body[0]
        return "".join(source.splitlines(keepends=True)[first.end_lineno :]).lstrip()

    @property
    def _docstring(self) -> tuple[str, str]:
        whole = ast.get_docstring(ast.parse(self.path.read_text())) or self.name
        title, _, text = whole.partition("\n")
        return title, text


def on_config(config: Any) -> Any:
    """Give each example its place in the navigation.

    Args:
        config: Of the site.

    Returns:
        The configuration with the pages of the gallery.
    """
    pages = ["gallery/index.md", *(f"gallery/{path.stem}.md" for path in examples())]
    for entry in config.nav:
        if "Gallery" in entry:
            entry["Gallery"] = pages
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the gallery's pages and pictures.

    Args:
        files: Of the site.
        config: Of the site.

    Returns:
        The files with the gallery.
    """
    found = run_all(examples())
    pages: dict[str, str | bytes] = {"index.md": index(found)}
    for example in found:
        pages[f"{example.name}.md"] = page(example)
        if example.picture is not None:
            pages[f"{example.name}.png"] = example.picture
    for name, content in pages.items():
        files.append(File.generated(config, f"gallery/{name}", content=content))
    return files


def examples() -> list[Path]:
    """List the examples in the order of their names."""
    return sorted((ROOT / "examples").glob("*.py"))


def index(found: list[Example]) -> str:
    """Write the gallery's first page.

    Args:
        found: The examples.

    Returns:
        Markdown: each title with its picture.
    """
    cards = [
        f"[![{e.title}]({e.name}.png)]({e.name}.md)\n[{e.title}]({e.name}.md)"
        if e.picture is not None
        else f"[{e.title}]({e.name}.md)"
        for e in found
    ]
    return (
        "# Gallery\n\nThe programs of `examples/`, run against a server when these pages "
        "were built.\n\n"
        '<div class="gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>\n"
    )


def page(example: Example) -> str:
    """Write the page of an example.

    Args:
        example: What to show.

    Returns:
        Markdown.
    """
    picture = (
        "" if example.picture is None else f"![{example.title}]({example.name}.png)"
    )
    return (
        f"# {example.title}\n\n{example.text}\n\n{picture}\n\n"
        f"## What it prints\n\n```text\n{example.printed}```\n\n"
        f"## The program\n\n```python\n{example.program}```\n"
    )


def run_all(paths: list[Path]) -> list[Example]:
    """Run the examples that the cache does not have.

    Args:
        paths: Of the examples.

    Returns:
        All of them with what they left.
    """
    folders = {path: CACHE / digest(path) for path in paths}
    missing = [path for path, folder in folders.items() if not folder.exists()]
    if missing:
        with serving() as target, ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda path: run(path, target, folders[path]), missing))
    return [read(path, folder) for path, folder in folders.items()]


def run(path: Path, target: str, folder: Path) -> None:
    """Run one example and keep what it leaves.

    Args:
        path: Of the example.
        target: Of a server.
        folder: Where to; made only if the example succeeds.

    Raises:
        RuntimeError: If it fails.
    """
    log.info("running examples/%s", path.name)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        made = Path(work) / "made"
        made.mkdir()
        done = subprocess.run(
            [sys.executable, path, target, made / "picture.png"],
            cwd=work,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if done.returncode:
            msg = f"examples/{path.name} failed:\n{done.stdout}{done.stderr}"
            raise RuntimeError(msg)
        printed = done.stdout.replace(str(made / "picture.png"), "picture.png")
        (made / "printed.txt").write_text(printed)
        made.rename(folder)


def read(path: Path, folder: Path) -> Example:
    """Read what a run left.

    Args:
        path: Of the example.
        folder: Of the run.

    Returns:
        The example.
    """
    picture = folder / "picture.png"
    return Example(
        path,
        (folder / "printed.txt").read_text(),
        picture.read_bytes() if picture.exists() else None,
    )


def digest(path: Path) -> str:
    """Hash all that an example's output depends on.

    Args:
        path: Of the example.

    Returns:
        Hexadecimal digits.
    """
    state = hashlib.sha256()
    sources = [p for side in ("client", "server") for p in (ROOT / side).rglob("*.py")]
    for source in [path, Path(__file__), *sorted(sources)]:
        state.update(f"{source.relative_to(ROOT)}\n".encode() + source.read_bytes())
    for library in LIBRARIES:
        state.update(f"{library} {metadata.version(library)}\n".encode())
    return state.hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Run a server for the examples.

    Yields:
        Its target.
    """
    # Small matrices: several threads for each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    with (
        tempfile.TemporaryDirectory() as folder,
        serve_in_thread(
            ServerConfig(listen="127.0.0.1:0", data_dir=Path(folder))
        ) as target,
    ):
        yield target
