"""Reads who imports whom off the source; `python tests/imports.py` prints the table."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {"curvd": ROOT / "client", "curvd_server": ROOT / "server"}
DOORS = {"curvd.adapters", "curvd.cli", "curvd_server.demo"}
"""Exempt from the rules between packages; see ARCHITECTURE.md."""


def modules() -> dict[str, Path]:
    """Every hand-written module by its dotted name; a package's door by the package's."""
    found = {}
    for package, source in SOURCES.items():
        for path in sorted((source / package).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            if "v1" not in parts:
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = path
    return found


def imports(path: Path, known: set[str]) -> tuple[set[str], set[str]]:
    """Own modules and third-party packages that a file imports, wherever it does."""
    own, foreign = set(), set()
    tree = ast.parse(path.read_text())
    only_typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in only_typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] not in SOURCES:
                if parts[0] not in sys.stdlib_module_names:
                    foreign.add(parts[0])
            elif parts[:2] == ["curvd", "v1"]:
                own.add("curvd.v1")
            else:
                while ".".join(parts) not in known:
                    parts.pop()
                own.add(".".join(parts))
    return own, foreign


def table() -> list[tuple[str, str, str]]:
    """(module, own imports, third-party imports), lowest level first."""
    paths = modules()
    graph = {name: imports(path, set(paths)) for name, path in paths.items()}
    level: dict[str, int] = {"curvd.v1": -1}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"import cycle: {' -> '.join((*above, name))}")
        if name not in level:
            own, _ = graph[name]
            level[name] = 1 + max((height(o, (*above, name)) for o in own), default=-1)
        return level[name]

    rows = []
    for name in sorted(graph, key=lambda n: (height(n), n)):
        own, foreign = graph[name]
        cells = [", ".join(f"`{x}`" for x in sorted(s)) or "-" for s in (own, foreign)]
        rows.append((f"`{name}`", *cells))
    return rows


def markdown() -> str:
    """The table of ARCHITECTURE.md."""
    head = ["| module | imports of ours | third party |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {a} | {b} | {c} |" for a, b, c in table())])


if __name__ == "__main__":
    print(markdown())
