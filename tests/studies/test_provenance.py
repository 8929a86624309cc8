from dataclasses import dataclass

import pytest

from anabranch import studies
from anabranch.config import Config, configclass
from anabranch.data import DataConfig, Files
from anabranch.experts.rexmoe import ReXMoE
from anabranch.studies.provenance import Digests, Origin, device_kind, groups, joined_versions, notes, parts, readers
from anabranch.train import RunConfig, TrainConfig

# Studies whose runs read text by a config of a language model's run.
LEARNING = (
    "alf_lb",
    "chain",
    "duo_llm",
    "expertflow",
    "local_routing_consistency",
    "parscale",
    "rexmoe",
    "rexmoe_grown",
    "rmoe",
    "versatile",
)


@configclass
class Two(Config):
    base: RunConfig
    run: RunConfig


@dataclass(frozen=True)
class Named:
    name: str
    looked: list

    def content_digest(self):
        self.looked.append(self.name)
        return self.name


def test_parts_are_found_wherever_they_stand():
    run = RunConfig()
    found = [type(part) for part in parts({"a": [1, (run,)]}) if isinstance(part, Config)]
    assert found[:2] == [RunConfig, type(run.model)]
    assert {DataConfig, TrainConfig} <= set(found)
    assert readers(Two(base=run, run=run)) == [run.data]
    assert readers({"steps": 3}) == []


def test_digests_look_at_each_text_once():
    looked = []
    one, other, two = Named("one", looked), Named("one", looked), Named("two", looked)
    digests = Digests()
    assert digests.of([one, {"x": other}]) == "one"
    both = digests.of([two, one])
    assert len(both) == 16
    assert digests.of([one, two]) != both
    assert digests.of([3]) is None
    assert looked == ["one", "two"]
    assert Digests(lambda config: f"given {config}").of(3) == "given 3"


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("full", [False, True])
def test_every_learning_study_notes_what_its_runs_read_and_where_they_run(name, full):
    for arm in studies.find(name)(full=full).arms:
        counted = arm.name.startswith(("static-", "online-"))  # of ALF-LB: scores that are drawn
        assert len(readers(arm.config)) == (0 if counted else 1), arm.name
        assert (device_kind(arm.config) is None) == counted, arm.name


def test_which_studies_learn_is_not_forgotten():
    """A study that comes later and trains on text belongs to the list above. Others read drawings, traces, or text in one of their arms,
    and choose no device."""
    found = {name for name in studies.STUDIES if any(readers(arm.config) for arm in studies.find(name)().arms)}
    assert found == {*LEARNING, "elaswave", "gpipe", "packet_spraying", "pccl", "pvchat", "tokenring"}


def test_the_digest_of_a_run_is_that_of_its_text(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text " * 500)
    data = DataConfig(corpus=Files.Config(paths=(str(tmp_path / "a.txt"),)))
    run = RunConfig(data=data)
    before = Digests().of(run)
    assert before == data.build().fingerprint() == Digests().of(Two(base=run, run=run))
    (tmp_path / "a.txt").write_text("other text " * 500)
    assert Digests().of(run) != before


def test_the_device_is_what_auto_means_here(monkeypatch):
    run = RunConfig()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_kind(run) == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_kind(run) == "cpu"
    fixed = run.replace(train=run.train.replace(device="cuda:1"))
    assert device_kind(fixed) == "cuda"
    assert device_kind(Two(base=run, run=fixed)) == "cpu and cuda"
    assert device_kind(ReXMoE.Config()) is None


def origin(arm, seed, torch="2.0", **fields):
    return Origin(arm, seed, **{"versions": {"torch": torch}, "device": "cpu", "inputs": "x", "reads": True, **fields})


def test_runs_that_are_alike_need_no_word():
    alike = [origin("a", 0), origin("b", 0)]
    assert notes(alike, {"torch": "2.0"}) == []
    assert groups(alike) == [
        {"versions": {"torch": "2.0"}, "device": "cpu", "inputs": "x", "runs": {"a": [0], "b": [0]}}
    ]
    assert joined_versions(alike) == {"torch": "2.0"}
    # Who reads nothing has nothing to note.
    assert notes([origin("a", 0, inputs=None, reads=False), origin("b", 0)], {"torch": "2.0"}) == []


def test_devices_that_differ_are_told():
    mixed = [origin("a", 0), origin("b", 0, device="cuda"), origin("b", 1, device=None)]
    assert notes(mixed, {"torch": "2.0"}) == [
        "not all on one device: cpu: a seed 0; cuda: b seed 0; not noted: b seed 1"
    ]
