"""Check the documents: every link leads somewhere, and the paper map is true.

`docs/paper_map.md` is a table `claim | symbol | test`. Each row must name, between
backticks, at least one symbol that can be imported (`package.module.name`) and at
least one test that exists (`tests/file.py::function`).

Run it as `make docs`.
"""

import ast
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.+?)\s*$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")


def documents() -> list[Path]:
    """Every Markdown file at the top and under docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(document: Path) -> set[str]:
    """What may follow `#` in a link to a document, by GitHub's rule."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in HEADING.findall(text)
    }


def broken_links(document: Path) -> Iterator[str]:
    """Each relative link of a document whose file or heading does not exist."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue  # another site's
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists():
            yield f"the link {link} leads to no file"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"the link {link} leads to no heading"


def is_symbol(name: str) -> bool:
    """Whether a dotted name can be imported; a dataclass's field counts."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError):
        owner, _, field = name.rpartition(".")
        return (
            bool(owner)
            and is_symbol(owner)
            and field in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
        )
    return True


def is_test(name: str) -> bool:
    """Whether `tests/file.py::function` (or `::Class::method`) is defined."""
    path, *parts = name.split("::")
    if not (parts and (ROOT / path).is_file()):
        return False
    scope: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for part in parts:
        found = [
            node
            for node in scope
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
        ]
        if not found:
            return False
        scope = found[0].body
    return True


def false_rows(paper_map: Path) -> Iterator[str]:
    """Each row of the paper map whose symbol or test does not exist."""
    if not paper_map.is_file():
        yield "the file is missing"
        return
    lines = enumerate(paper_map.read_text(encoding="utf-8").splitlines(), 1)
    rows = [
        (number, [cell.strip() for cell in line.strip("| ").split("|")])
        for number, line in lines
        if line.startswith("|")
    ]
    claims = [
        (number, cells)
        for number, cells in rows
        if cells[0].lower() != "claim" and not set(cells[0]) <= set("-: ")
    ]
    if not claims:
        yield "it has no row `claim | symbol | test`"
    for number, cells in claims:
        if len(cells) != 3:
            yield f"line {number} has {len(cells)} cells: claim | symbol | test"
            continue
        for kind, cell, exists in (
            ("symbol", cells[1], is_symbol),
            ("test", cells[2], is_test),
        ):
            names = CODE.findall(cell)
            if not names:
                yield f"line {number} names no {kind}"
            for name in names:
                if not exists(name):
                    yield f"line {number}: there is no {kind} {name}"


def main() -> int:
    """Print what is wrong, one line each; 1 if anything is."""
    paper_map = ROOT / "docs" / "paper_map.md"
    wrong = [(doc, fault) for doc in documents() for fault in broken_links(doc)]
    wrong += [(paper_map, fault) for fault in false_rows(paper_map)]
    for document, fault in wrong:
        print(f"{document.relative_to(ROOT)}: {fault}", file=sys.stderr)
    print(f"{len(documents())} documents checked, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
