"""Write the table of all pretraining recipes into docs/performance.md: `make plan`.

Each recipe is compiled for its own slice, or read from the programs that are kept on
disk. Nothing is measured: memory is the compiler's, all else predicted.
"""

import importlib.metadata
import sys
from pathlib import Path

from llama_jax.config.recipe import recipe_names
from llama_jax.planning.plan import Plan, has_compiler, plan
from llama_jax.planning.report import GIB, mesh

FOLDER = Path("configs/pretrain")
DOCUMENT = Path("docs/performance.md")
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
COLUMNS = (
    "recipe",
    "slice",
    "chips",
    "mesh",
    "rows per chip",
    "remat",
    "GiB per chip",
    "predicted s",
    "predicted MFU",
    "predicted tokens/s",
    "predicted days for 2T tokens",
    "predicted chip-hours",
)


def main() -> int:
    """Returns the exit status: 1 if a recipe does not fit."""
    if not has_compiler():
        print("libtpu is not installed: pip install 'llama-jax[tpu]'", file=sys.stderr)
        return 1
    places = [
        f"{file}:{name}"
        for file in sorted(FOLDER.glob("*.py"))
        for name in recipe_names(file)
    ]
    plans = dict[str, Plan]()
    for place in places:
        plans[place] = plan(place)
        print(row(place, plans[place]), flush=True)
    write(DOCUMENT, table(plans))
    print(f"Written to {DOCUMENT}.")
    return 0 if all(each.fits for each in plans.values()) else 1


def table(plans: dict[str, Plan]) -> str:
    """The section of the document, without its markers."""
    versions = " and ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("jax", "libtpu")
    )
    rule = "|".join("---" for _ in COLUMNS)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{rule}|"]
    lines += [row(place, each) for place, each in plans.items()]
    return f"Compiled with {versions}.\n\n" + "\n".join(lines)


def row(place: str, each: Plan) -> str:
    """One line of the table."""
    slices = f"{each.topology.slices} x " if each.topology.slices > 1 else ""
    cells = [
        f"`{Path(place).name}`",
        f"{slices}{each.topology.name}",
        f"{each.topology.num_chips:,}",
        mesh(each),
        f"{each.rows_per_chip:g}",
        each.recipe.train.remat,
        f"{each.hbm_bytes / GIB:.1f} of {each.hbm_limit / GIB:.1f}",
    ]
    if each.step_seconds and each.mfu and each.tokens_per_second:
        days = 2e12 / each.tokens_per_second / 86_400
        cells += [
            f"{each.step_seconds:.2f}",
            f"{each.mfu:.1%}",
            f"{each.tokens_per_second:,.0f}",
            f"{days:,.1f}",
            f"{days * 24 * each.topology.num_chips:,.0f}",
        ]
    else:
        cells += ["does not fit", "", "", "", ""]
    return f"| {' | '.join(cells)} |"


def write(document: Path, section: str) -> None:
    """Put a section between the document's markers."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{document} has no {BEGIN} ... {END} to write between.")
    document.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
