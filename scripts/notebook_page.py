"""Run docs/notebooks/generate.ipynb, and write what it shows as docs/pages/generate.md.

    LLAMA_CHECKPOINT=$PWD/runs/demo python -m scripts.notebook_page

`make page` types this. Pictures go into generate_files/, beside the page.
"""

import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = DOCS / "notebooks/generate.ipynb"
# Cells with this tag are for one place to run notebooks in, and show nothing.
LEFT_OUT = "colab"
SECONDS = 900


def main() -> int:
    """Write the page and its pictures; returns the exit status."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=SECONDS).execute(cwd=NOTEBOOK.parent)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            for data in [output.get("data", {})]:
                if "text/html" in data:
                    # On one line, or Markdown goes on at the first blank one.
                    data["text/html"] = data["text/html"].replace("\n", "<br>")
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = {LEFT_OUT}
    name = NOTEBOOK.stem
    text, resources = MarkdownExporter(config=config).from_notebook_node(
        notebook,
        {"output_files_dir": f"{name}_files", "unique_key": name},
    )
    pages = DOCS / "pages"
    shutil.rmtree(pages / f"{name}_files", ignore_errors=True)
    (pages / f"{name}_files").mkdir(parents=True)
    for place, content in resources["outputs"].items():
        (pages / place).write_bytes(content)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    note = f"*[The notebook](../notebooks/{NOTEBOOK.name}) as it ran; `make page` "
    note += "writes this page.*"
    (pages / f"{name}.md").write_text("\n".join([note, "", *lines, ""]))
    print(f"{pages / name}.md: {len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
