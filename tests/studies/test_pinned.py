"""Evidence is of one text: another standard library than the pinned one is refused."""

import json

import pytest

from anabranch.data import Domain, Files, Mixture, Stdlib
from anabranch.errors import DataError
from anabranch.studies import pinned
from anabranch.studies.harness import Arm, Study, run_study
from anabranch.studies.pinned import check_corpus, path_of


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of three files, and nothing of its documentation."""
    root = tmp_path / "lib"
    (root / "json").mkdir(parents=True)
    for name in ("abc.py", "ast.py", "json/tool.py"):
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr("anabranch.data.corpus.sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


READS = {"data": {"corpus": Stdlib.Config(include_docs=False)}}


def test_the_first_run_pins_it_and_another_text_is_refused(library, tmp_path):
    folder = tmp_path / "results"
    check_corpus([READS], folder)
    written = json.loads(path_of(folder).read_text())
    assert list(written["files"]) == ["abc.py", "ast.py", "json/tool.py"]
    assert {label for label, _ in written["files"].values()} == {"code"}
    check_corpus([READS, {"a": [Stdlib.Config(include_docs=False, max_bytes=10)]}], folder)
    # In a mixture as well.
    mixed = Mixture.Config(domains={"code": Domain(corpus=Stdlib.Config(include_docs=False))})
    (library / "abc.py").write_text("# changed\n")
    for config in (READS, {"corpus": mixed}):
        with pytest.raises(
            DataError, match=r"1 of its 3 files are others here .* such as abc\.py; run it with that Python"
        ):
            check_corpus([config], folder)
    (library / "abc.py").write_text("# abc.py\n")
    check_corpus([READS], folder)
    for change in (lambda: (library / "new.py").write_text("x"), (library / "ast.py").unlink):
        change()
        with pytest.raises(DataError, match="files are others here"):
            check_corpus([READS], folder)
    check = json.loads(path_of(folder).read_text())
    (library / "new.py").unlink()
    (library / "ast.py").write_text("# ast.py\n")
    # Documentation that is not here is missed by who reads it, and by nobody else.
    check["files"]["doc/a"] = ["docs", "0"]
    path_of(folder).write_text(json.dumps(check))
    check_corpus([READS], folder)
    with pytest.raises(DataError, match=r"of its 4 files are others here"):
        check_corpus([{"corpus": Stdlib.Config(include_docs=True)}], folder)
    path_of(folder).write_text("[]")
    with pytest.raises(DataError, match="is no list of files"):
        check_corpus([READS], folder)


def test_who_reads_something_else_is_left_alone(tmp_path, monkeypatch):
    check_corpus([{"corpus": Files.Config(paths=("x",))}, {"seed": 1}], tmp_path)
    assert not path_of(tmp_path).exists()
    monkeypatch.delitem(pinned.sys.modules, "anabranch.data.corpus")
    check_corpus([READS], tmp_path)
    assert not path_of(tmp_path).exists()


def test_a_study_of_the_recorded_size_is_refused_before_it_runs(library, tmp_path):
    runs = []

    def run(config, seed, progress):
        runs.append(seed)
        return {"loss": 1.0}

    def digest(config):
        return "d"

    study = Study("made_up", "", {}, (Arm("plain", "", READS),), run, lambda results: [], seeds=(0,), inputs=digest)
    run_study(study, tmp_path / "results", freezes=True)
    (library / "abc.py").write_text("# changed\n")
    with pytest.raises(DataError, match="is of the standard library of Python"):
        run_study(study, tmp_path / "results", seeds=[1], freezes=True)
    assert runs == [0]
    # The small size shows that it runs, on whatever is here.
    run_study(study, tmp_path / "tried", seeds=[1])
    assert runs == [0, 1]
