"""The pictures of the documents are what their script draws today."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_pictures_are_up_to_date(tmp_path):
    subprocess.run(
        [sys.executable, DOCS / "draw.py", tmp_path], check=True, timeout=120
    )
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (DOCS / "pictures").iterdir()}
    assert drawn.keys() == kept.keys() == {"mesh.svg", "weight.svg", "order.svg"}
    # What is written, not where: another matplotlib measures text differently.
    for name, picture in drawn.items():
        assert words(picture) == words(kept[name]) != []


def words(picture):
    return re.findall(r">([^<]+)</text>", picture)
