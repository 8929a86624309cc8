"""The base that studies of adapters have in common."""

import signal

import pytest

from anabranch.studies import adapter_bench
from anabranch.studies.adapter_bench import Bench, BenchSize

SIZE = BenchSize(dim=32, num_layers=1, num_heads=2, base_steps=4, base_batch=4, words_learned=20, words_measured=4)


def test_half_of_a_base_is_kept_for_nobody(tmp_path, monkeypatch):
    """Who came next took it for the whole, without a word."""
    monkeypatch.setattr(adapter_bench, "cache_folder", lambda: tmp_path)

    def signalled(event):
        if event.kind == "step" and event.step == 1:
            signal.raise_signal(signal.SIGINT)

    whole = adapter_bench.Trainer
    monkeypatch.setattr(adapter_bench, "Trainer", lambda *told: whole(*told, on_event=signalled))
    with pytest.raises(KeyboardInterrupt):
        Bench.kept(SIZE)
    assert not list(tmp_path.rglob("base.json"))
    monkeypatch.setattr(adapter_bench, "Trainer", whole)
    kept = Bench.kept(SIZE)
    assert kept.folder.name == "step-00000004"
    assert Bench.kept(SIZE).folder == kept.folder
