"""Models and traces that were saved before their layers were made of parts (at 46a24f6) are read, and compute what they did.

``saved/`` has three models of two layers of width 8 with random weights, what they gave, and a trace of the first.
"""

import json
from pathlib import Path

import pytest
import torch

from anabranch.lm import load_model, save_model
from anabranch.routing import RoutingTrace, record_routing, replay_routing
from anabranch.routing.passes import between_passes

SAVED = Path(__file__).parent / "saved"
FACTS = json.loads((SAVED / "facts.json").read_text())
TOKENS = torch.tensor([[1, 4, 2, 6, 3], [5, 5, 0, 1, 2]])


def known(ours, theirs):
    """What ``ours`` says of the fields that ``theirs`` has."""
    if isinstance(theirs, dict):
        return {field: known(ours[field], value) for field, value in theirs.items()}
    if isinstance(theirs, list):
        return [known(one, value) for one, value in zip(ours, theirs, strict=True)]
    return ours


@pytest.mark.parametrize("name", FACTS)
def test_a_saved_model_computes_what_it_did_and_is_saved_the_same(name, tmp_path):
    model, _ = load_model(SAVED / name)
    with record_routing(model.eval()) as recorder, torch.no_grad():
        logits_BLV = model(TOKENS).logits_BLV
    torch.testing.assert_close(logits_BLV[:, -1], torch.tensor(FACTS[name]["logits"]), rtol=1e-5, atol=1e-6)
    assert [layer.name for layer in recorder.trace().layers] == FACTS[name]["layers"]
    save_model(tmp_path / name, model)
    ours, theirs = (json.loads((folder / name / "config.json").read_text()) for folder in (tmp_path, SAVED))
    ours, theirs = ours["model"]["feed_forward"], theirs["model"]["feed_forward"]
    # Fields that came since are saved too, and say what was so then.
    assert known(ours, theirs) == theirs
    again, _ = load_model(tmp_path / name)
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_saved_trace_of_tied_passes_is_read_and_replayed():
    trace = RoutingTrace.read(SAVED / "chain-tied.parquet")
    model, _ = load_model(SAVED / "chain-tied")
    with replay_routing(model.eval(), trace), torch.no_grad():
        logits_BLV = model(TOKENS).logits_BLV
    torch.testing.assert_close(logits_BLV[:, -1], torch.tensor(FACTS["chain-tied"]["logits"]), rtol=1e-5, atol=1e-6)
    assert len(between_passes(trace)) == 4
