"""What is read of files is told by content, wherever in a config a graph is named."""

import pytest

from anabranch.errors import DataError
from anabranch.studies import elasticmoe, fastrp, nanoflow, ttspm
from anabranch.studies.reading import TRACE, of_files, of_graphs, of_trace


@pytest.fixture
def data(tmp_path, monkeypatch):
    (tmp_path / "graphs").mkdir()
    (tmp_path / "traces").mkdir()
    for name in ("graphs/ppi.edgelist.gz", "graphs/ppi.labels.gz", "graphs/blogcatalog.mat", TRACE):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("config", [{"graph": "ppi"}, [("a", ["ppi"])], {"x": {"y": ("ppi", "power-4000", "karate")}}])
def test_graphs_are_found_by_their_names(config, data):
    found = of_graphs(config)
    assert found == of_files([data / "graphs" / f"ppi.{ending}" for ending in ("edgelist.gz", "labels.gz")])
    (data / "graphs" / "ppi.labels.gz").write_text("others")
    assert of_graphs(config) != found


def test_what_no_file_holds_is_not_read(data):
    assert of_graphs({"graph": "karate", "other": "power-4000", "name": "nothing"}) is None
    with pytest.raises(DataError, match="dblp"):
        of_graphs({"graph": "dblp"})


def test_arms_that_draw_what_they_work_on_read_nothing(data):
    for ending in ("edgelist.gz", "labels.gz"):
        (data / "graphs" / f"dblp.{ending}").write_text("x")
    told = {arm.name: fastrp.make(full=True).inputs(arm.config) for arm in fastrp.make(full=True).arms}
    assert [name for name, digest in told.items() if digest is None] == ["scaling"]
    assert told["svd"] != told["fastrp"]
    for module, reading in (
        (nanoflow, ("async",)),
        (elasticmoe, ("slo-",)),
        (ttspm, ("smollm2", "humaneval", "gsm8k")),
    ):
        study = module.make(full=True)
        reads = [arm.name for arm in study.arms if study.inputs(arm.config) is not None]
        assert reads
        assert reads == [arm.name for arm in study.arms if arm.name.startswith(reading)]


def test_a_trace_that_is_made_up_is_another(data):
    case = next(arm.config for arm in elasticmoe.make(full=True).arms if arm.name.startswith("slo-"))
    assert elasticmoe.read_by(case) == of_trace()
    (data / TRACE).unlink()
    assert elasticmoe.read_by(case) == "made up"
