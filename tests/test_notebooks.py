"""The notebooks: whole files, links that lead somewhere, and cells that run where only what the notebook names is installed."""

import json
import re

import pytest

from guides import DOCS, INSTALL, Reader

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    """The texts of its cells of one kind."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_is_one_for_the_researcher_and_one_for_the_data_engineer():
    assert [path.stem for path in NOTEBOOKS] == ["data-engineer", "researcher"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole_and_its_links_lead_somewhere(path):
    held = json.loads(path.read_text(encoding="utf-8"))
    assert (held["nbformat"], held["metadata"]["kernelspec"]["name"]) == (4, "python3")
    ids = [cell["id"] for cell in held["cells"]]
    assert len(set(ids)) == len(ids)
    for text in cells(path, "code"):
        compile(text, str(path), "exec")
    links = [link for text in cells(path, "markdown") for link in re.findall(r"\]\(([^)#\s]+)", text)]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []
    # What it printed is of these cells, so nothing of a machine or of an error stands in it.
    printed = json.dumps([cell.get("outputs") for cell in held["cells"]])
    assert "/root" not in printed
    assert '"error"' not in printed


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_from_the_first_to_the_last(path, tmp_path):
    named = INSTALL.search("\n".join(cells(path, "markdown")))["extras"].split(",")
    reader = Reader(tmp_path)
    reader.environment["MPLBACKEND"] = "agg"
    said = reader.runs([reader.python, "-c", "\n\n".join(cells(path, "code"))], named)
    assert {"researcher": "bits per byte on held-out text", "data-engineer": "vectors in index.anb"}[path.stem] in said
