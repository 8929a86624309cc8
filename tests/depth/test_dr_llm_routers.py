"""Routers of Dr.LLM: windows, banks and their files, the control knob, the loss, and training."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.depth.dr_llm import (
    BankConfig,
    FitConfig,
    Labels,
    RouterBank,
    class_balance,
    collect_features,
    controlled,
    decide_prompts,
    fit_routers,
    pool_windows,
    routing_loss,
    train_routers,
)
from anabranch.depth.dr_llm.fitting import quality_of
from anabranch.depth.dr_llm.routed import FirstLayer, route_steps
from anabranch.depth.routed import routed_pass
from anabranch.depth.stack import run_path
from anabranch.errors import CheckpointError, ConfigError, DataError, NotFiniteError
from dr_llm_made import asked, bank_of, stack, transformers_stack

SAME = 1e-5

# Windows


def pooled_by_hand(x_TD, windows):
    """Means of one sequence without padding."""
    used = min(windows, len(x_TD))
    size = len(x_TD) // used
    return torch.stack([x_TD[place * size : (place + 1) * size].mean(0) for place in range(used)])


@pytest.mark.parametrize(
    ("length", "used", "size"), [(3, 3, 1), (8, 8, 1), (9, 8, 1), (15, 8, 1), (16, 8, 2), (21, 8, 2), (1, 1, 1)]
)
def test_windows_by_hand(length, used, size):
    x_BLD = torch.arange(length, dtype=torch.float32).view(1, length, 1)
    mean_BWD, weight_BW = pool_windows(x_BLD, None, 8)
    wanted = [sum(range(place * size, (place + 1) * size)) / size for place in range(used)]
    assert mean_BWD[0, :used, 0].tolist() == wanted
    assert weight_BW[0].tolist() == pytest.approx([1 / used] * used + [0.0] * (8 - used))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=14).filter(any), min_size=1, max_size=3), st.integers(1, 9)
)
def test_padding_is_in_no_window(masks, windows):
    longest = max(map(len, masks))
    mask_BL = torch.tensor([mask + [False] * (longest - len(mask)) for mask in masks])
    x_BLD = torch.randn(*mask_BL.shape, 3, generator=torch.Generator().manual_seed(0))
    # What padding holds may be anything.
    mean_BWD, weight_BW = pool_windows(x_BLD.masked_fill(~mask_BL[..., None], math.inf), mask_BL, windows)
    for row, mask_L in enumerate(mask_BL):
        wanted_WD = pooled_by_hand(x_BLD[row][mask_L], windows)
        torch.testing.assert_close(mean_BWD[row, : len(wanted_WD)], wanted_WD)
        assert weight_BW[row].tolist() == pytest.approx(
            [1 / len(wanted_WD)] * len(wanted_WD) + [0.0] * (windows - len(wanted_WD))
        )


def test_windows_that_cannot_be():
    with pytest.raises(DataError, match="sequence 1 has no tokens"):
        pool_windows(torch.zeros(2, 3, 4), torch.tensor([[1, 1, 1], [0, 0, 0]]), 8)
    with pytest.raises(DataError, match="has no tokens"):
        pool_windows(torch.zeros(2, 0, 4), None, 8)
    with pytest.raises(DataError, match="has no tokens"):
        bank_of(stack()).decide(0, torch.zeros(2, 0, 16))
    with pytest.raises(ConfigError, match=r"shape \(2, 2\)"):
        pool_windows(torch.zeros(2, 3, 4), torch.ones(2, 2), 8)


# Control


@pytest.mark.parametrize(
    ("control", "wanted"),
    [
        (-1.0, [1.0, 0.0, 0.0]),
        (-0.75, [0.5 + 0.5 * 0.2, 0.5 * 0.5, 0.5 * 0.3]),
        (-0.5, [0.2, 0.5, 0.3]),
        (0.0, [0.1, 0.25 + 0.5, 0.15]),
        (0.5, [0.0, 1.0, 0.0]),
        (0.75, [0.0, 0.5, 0.5]),
        (1.0, [0.0, 0.0, 1.0]),
    ],
)
def test_the_knob_by_hand(control, wanted):
    made = controlled(torch.tensor([[0.2, 0.5, 0.3]]), control)
    assert made[0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("control", "decision"), [(-0.76, 0), (0.01, 1)])
@pytest.mark.parametrize("sure", [0, 1, 2])
def test_beyond_its_range_the_knob_asks_no_router(control, decision, sure):
    assert controlled(torch.eye(3)[sure : sure + 1], control).argmax() == decision


@pytest.mark.parametrize("control", [1.1, -2, float("nan"), "0", None, True])
def test_a_knob_that_cannot_be(control):
    with pytest.raises(ConfigError, match="control is"):
        controlled(torch.full((1, 3), 1 / 3), control)


# Banks


def test_parameters_are_counted():
    bank = RouterBank(BankConfig(num_blocks=30, width=576))
    assert bank.num_parameters == 30 * (128 * (576 + 1) + 3 * 129)
    assert not bank.first_bias_NF.any()
    assert not bank.second_bias_NC.any()
    for weight, inside, outside in ((bank.first_NFD, 576, 128), (bank.second_NCF, 128, 3)):
        bound = math.sqrt(6 / (inside + outside))
        assert bound * 0.95 < float(weight.detach().abs().max()) <= bound
    assert torch.equal(RouterBank(bank.config, seed=0).first_NFD, bank.first_NFD)
    assert not torch.equal(RouterBank(bank.config, seed=1).first_NFD, bank.first_NFD)


@pytest.mark.parametrize("length", [3, 8, 19])
def test_a_decision_is_that_of_the_formula(length):
    bank = bank_of(stack())
    x_BLD = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1))
    for layer in (0, 3):
        decision_B, probability_BC = bank.decide(layer, x_BLD)
        for row in range(2):
            means_WD = pooled_by_hand(x_BLD[row], 8)
            hidden_WF = F.gelu(F.linear(means_WD, bank.first_NFD[layer], bank.first_bias_NF[layer]), approximate="tanh")
            logit_C = F.linear(hidden_WF, bank.second_NCF[layer], bank.second_bias_NC[layer]).mean(0)
            torch.testing.assert_close(probability_BC[row], logit_C.softmax(-1))
            assert decision_B[row] == logit_C.argmax()


@pytest.mark.parametrize("length", [3, 19])
def test_padding_changes_no_decision(length):
    """Two ways to the same: means of equal lengths, and windows under a mask."""
    bank = bank_of(stack())
    x_BLD = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1))
    plain = bank.decide(2, x_BLD, torch.ones(2, length))
    for left, right in ((0, 2), (3, 0)):
        mask_BL = F.pad(torch.ones(2, length), (left, right))
        padded = bank.decide(2, F.pad(x_BLD, (0, 0, left, right), value=7.0), mask_BL)
        assert torch.equal(padded[0], plain[0])
        torch.testing.assert_close(padded[1], plain[1], atol=SAME, rtol=0)


def test_what_a_bank_refuses():
    bank, x_BLD = bank_of(stack()), torch.zeros(1, 2, 16)
    with pytest.raises(ConfigError, match="block 5 has no router; the bank has routers of blocks 0 to 4"):
        bank.decide(5, x_BLD)
    with pytest.raises(ConfigError, match="width 8, and the routers are for width 16"):
        bank.decide(0, x_BLD[..., :8])
    with pytest.raises(NotFiniteError, match="block 1 is NaN"):
        bank.decide(1, x_BLD.fill_(float("nan")))
    first = bank_of(stack(), features="first")
    first.decide(0, torch.zeros(1, 2, 16))
    with pytest.raises(ConfigError, match="block 1 is to be decided on: they are a baseline"):
        first.decide(1, torch.zeros(1, 2, 16))
    with pytest.raises(ConfigError, match="from block 0 on"):
        FirstLayer(first).decide(1, torch.zeros(1, 2, 16), None)


def test_a_bank_is_read_as_it_was_written(tmp_path):
    model = stack()
    bank = bank_of(model, windows=5)
    bank.save(tmp_path / "r", report={"questions": 3})
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"config.json", "routers.safetensors", "report.json"}
    read = RouterBank.load(tmp_path / "r", model, windows=5)
    assert read.config == bank.config
    assert not read.training
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, bank.get_parameter(name))
        assert not parameter.requires_grad
    bank_of(model, seed=1).save(tmp_path / "r")  # takes the place of the old one
    assert RouterBank.load(tmp_path / "r").windows == 8
    (tmp_path / "r" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        bank.save(tmp_path / "r")


@pytest.mark.parametrize(
    ("make", "windows", "message"),
    [
        (lambda: stack(num_layers=3), None, r"blocks \(L\) 5, and here 3"),
        (lambda: stack(dim=32), None, r"width \(d\) 16, and here 32"),
        (lambda: stack(seed=1), None, "fingerprint [0-9a-f]{64}, and here [0-9a-f]{64}"),
        (stack, 4, r"windows \(W\) 8, and here 4"),
    ],
)
def test_a_bank_of_another_model_is_told_with_both_values(tmp_path, make, windows, message):
    bank_of(stack()).save(tmp_path / "r")
    with pytest.raises(CheckpointError, match=message):
        RouterBank.load(tmp_path / "r", make(), windows=windows)


def with_windows(place, value):
    from safetensors.torch import load_file, save_file

    path = place / "routers.safetensors"
    save_file(load_file(path) | {"windows": torch.tensor([value])}, path)


def edited(place, **changes):
    config = place / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: edited(place, windows=4), r"windows \(W\) 8, and here 4"),
        (lambda place: edited(place, hidden=64), r"first_NFD of shape \[5, 128, 16\].*\[5, 64, 16\]"),
        (lambda place: edited(place, num_blocks=6), r"\[6, 128, 16\]"),
        (lambda place: with_windows(place, float("nan")), "windows of type torch.float32; it must be a whole number"),
        (lambda place: with_windows(place, float("inf")), "windows of type torch.float32"),
        (lambda place: with_windows(place, 8 + 0j), "windows of type torch.complex64"),
        (lambda place: edited(place, schema=9), "schema 9"),
        (lambda place: edited(place, width="wide"), "does not describe routers: width"),
        (lambda place: edited(place, format="other"), "no routers in"),
        (lambda place: (place / "config.json").unlink(), "no routers in"),
        (lambda place: (place / "config.json").write_text("{"), "no routers in"),
        (lambda place: (place / "routers.safetensors").unlink(), "routers.safetensors"),
        (lambda place: (place / "routers.safetensors").write_bytes(b"x" * 40), "routers.safetensors"),
    ],
)
def test_damaged_banks(tmp_path, damage, message):
    place = tmp_path / "r"
    bank_of(stack()).save(place)
    damage(place)
    with pytest.raises(CheckpointError, match=message):
        RouterBank.load(place, stack())


def test_weights_that_are_nan(tmp_path):
    bank = bank_of(stack())
    bank.first_NFD[0, 0, 0] = float("nan")
    bank.save(tmp_path / "r")
    with pytest.raises(CheckpointError, match="NaN"):
        RouterBank.load(tmp_path / "r")


# Decisions in passes


@pytest.mark.parametrize("make", [stack, transformers_stack])
def test_a_batch_of_mixed_decisions_is_each_sequence_alone(make):
    model = make()
    bank = bank_of(model, seed=3)
    prompts = [question.prompt for question in asked(7)]
    together = decide_prompts(model, bank, prompts)
    assert len(together.decision_NL.unique()) == 3
    assert len(set(together.paths)) > 1
    alone = decide_prompts(model, bank, prompts, batch_size=1)
    assert torch.equal(together.decision_NL, alone.decision_NL)
    torch.testing.assert_close(together.probability_NLC, alone.probability_NLC, atol=SAME, rtol=0)
    for prompt, path in zip(prompts, together.paths, strict=True):
        token_BL = torch.tensor([prompt])
        with torch.no_grad():
            routed = routed_pass(model, bank, token_BL).logits_BLV
            assert torch.equal(routed, run_path(model, token_BL, path))


def test_all_execute_is_the_model_bit_for_bit():
    model, token_BL = stack(), torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        wanted_BLV = model.module(token_BL).logits_BLV
        for control in (0.5, 0.6):
            assert torch.equal(routed_pass(model, bank_of(model), token_BL, control=control).logits_BLV, wanted_BLV)


def test_the_ends_of_the_knob():
    model = stack()
    prompts = [question.prompt for question in asked(3)]
    for control, decision in ((-1.0, 0), (0.5, 1), (1.0, 2)):
        assert decide_prompts(model, bank_of(model), prompts, control).decision_NL.unique().tolist() == [decision]


def test_decisions_for_every_token():
    model = stack()
    bank = bank_of(model, seed=3)
    prompt, after = [1, 2, 3, 4, 5], [6, 7, 8]
    logits_LV, decision_SN = route_steps(model, bank, prompt, after)
    assert (logits_LV.shape, decision_SN.shape) == ((3, 23), (3, 5))
    made = decide_prompts(model, bank, [prompt])
    assert decision_SN[0].tolist() == made.decision_NL[0].tolist()
    # The plain model, however it is asked.
    plain_LV, _ = route_steps(model, bank, prompt, after, control=0.5)
    with torch.no_grad():
        wanted_LV = run_path(model, torch.tensor([prompt + after[:-1]]))[0, 4:]
    torch.testing.assert_close(plain_LV, wanted_LV, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="nothing follows"):
        route_steps(model, bank, prompt, [])


def test_routers_of_another_model_do_not_decide():
    with pytest.raises(ConfigError, match="blocks 5, and this one has 3"):
        decide_prompts(stack(num_layers=3), bank_of(stack()), [[1]])
    with pytest.raises(ConfigError, match="fingerprint"):
        decide_prompts(stack(seed=1), bank_of(stack()), [[1]])
    for prompts in ([], [[1], []]):
        with pytest.raises(ConfigError, match="no tokens"):
            decide_prompts(stack(), bank_of(stack()), prompts)


# Loss


def test_weights_of_decisions_are_the_papers():
    assert class_balance([4399, 120956, 1457]).tolist() == pytest.approx([0.916, 0.905, 1.179], abs=1e-3)
    assert class_balance([7, 7, 7]).tolist() == pytest.approx([1, 1, 1])
    assert class_balance([5, 50, 500], beta=0.0).tolist() == pytest.approx([1, 1, 1])
    # A decision that no label asks for weighs nothing, and the others as if it were not there.
    absent = class_balance([4399, 120956, 0])
    assert absent[2] == 0
    assert float(absent.sum()) == pytest.approx(2)
    assert float(absent[0] / absent[1]) == pytest.approx(0.916 / 0.905, abs=2e-3)
    for counts, beta in (([0, 0, 0], 0.999), ([1, 1, 1], 1.0)):
        with pytest.raises(ConfigError):
            class_balance(counts, beta)


def test_the_focal_loss_by_hand():
    logit_LNC = torch.tensor([[[2.0, 0.0, -1.0]], [[0.0, 1.0, 3.0]]])
    decision_LN, alpha_C = torch.tensor([[0], [1]]), torch.tensor([0.5, 2.0, 1.0])
    first = math.exp(2) / (math.exp(2) + 1 + math.exp(-1))
    second = math.exp(1) / (1 + math.exp(1) + math.exp(3))
    wanted = (-0.5 * (1 - first) ** 2 * math.log(first) - 2.0 * (1 - second) ** 2 * math.log(second)) / 2
    assert float(routing_loss(logit_LNC, decision_LN, alpha_C=alpha_C)) == pytest.approx(wanted, rel=1e-6)
    plain = -(0.5 * math.log(first) + 2.0 * math.log(second)) / 2
    assert float(routing_loss(logit_LNC, decision_LN, gamma=0.0, alpha_C=alpha_C)) == pytest.approx(plain, rel=1e-6)
    same = F.cross_entropy(logit_LNC.flatten(0, 1), decision_LN.flatten())
    assert torch.equal(routing_loss(logit_LNC, decision_LN, gamma=0.0), same)


# Training


def labels_by(rule, count=24, num_blocks=5):
    """Labels that follow from the first token of a prompt."""
    questions = asked(count, length=10)
    rows = [rule(question.prompt[0]) for question in questions]
    return Labels(
        tuple(question.id for question in questions),
        tuple(question.prompt for question in questions),
        torch.tensor(rows).view(count, num_blocks),
    )


def even_or_odd(token):
    return [1, 0, 1, 2, 1] if token % 2 else [1, 1, 1, 1, 0]


def test_labels_of_another_model_of_the_same_sizes_are_refused():
    labels = replace(labels_by(even_or_odd, count=6), model=stack().fingerprint())
    assert len(collect_features(stack(), labels).weight_NW) == 6
    with pytest.raises(DataError, match="the paths are of another model: fingerprint"):
        train_routers(stack(seed=1), labels)


def test_features_are_what_stands_before_each_block_on_the_label_path():
    model, labels = stack(), labels_by(even_or_odd, count=6)
    found = collect_features(model, labels, windows=4, batch_size=4)
    first = collect_features(model, labels, windows=4, features="first")
    for number, (prompt, decisions) in enumerate(zip(labels.prompts, labels.decision_NL.tolist(), strict=True)):
        x_BLD, state = model.embed(torch.tensor([prompt]))
        start_WD = pooled_by_hand(x_BLD[0], 4)
        for layer, times in enumerate(decisions):
            wanted_WD = pooled_by_hand(x_BLD[0], 4)
            seen_WD, seen_first_WD = (of.of_blocks(slice(layer, layer + 1))[0, number] for of in (found, first))
            torch.testing.assert_close(seen_WD, wanted_WD, atol=SAME, rtol=0)
            torch.testing.assert_close(seen_first_WD, start_WD, atol=SAME, rtol=0)
            for _ in range(times):
                with torch.no_grad():
                    x_BLD = model.block(layer, x_BLD, state)
    assert found.decision_LN.T.tolist() == labels.decision_NL.tolist()
    assert found.num_bytes == 5 * 6 * 4 * 16 * 4


def test_routers_learn_what_can_be_seen():
    model, labels = stack(), labels_by(even_or_odd, count=40)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    bank, report = train_routers(model, labels, FitConfig(epochs=80, learning_rate=1e-2, held_out=0.0))
    assert report.learned.accuracy > 0.97
    assert report.learned.macro_f1 > 0.95
    assert report.counts == labels.count_C.tolist()
    assert report.alpha == pytest.approx(class_balance(labels.count_C).tolist(), abs=1e-5)
    assert (report.questions, report.steps, report.held_out) == (40, 80 * 3, None)
    made = decide_prompts(model, bank, labels.prompts)
    assert float((made.decision_NL == labels.decision_NL).double().mean()) > 0.97
    # Nothing of the base has learned, or has a gradient.
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert bank.config.fingerprint == model.fingerprint()


def test_blocks_learn_alone_however_many_at_a_time():
    model, labels = stack(), labels_by(even_or_odd)
    features = collect_features(model, labels)
    config = BankConfig(num_blocks=5, width=16)
    banks = [
        fit_routers(config, features, FitConfig(epochs=4, memory=memory))[0]
        for memory in (1, 2 * 24 * 8 * 16 * 4, 2**30)
    ]
    for bank in banks[1:]:
        for name, parameter in bank.named_parameters():
            torch.testing.assert_close(parameter, banks[0].get_parameter(name), atol=SAME, rtol=0)
    again = fit_routers(config, features, FitConfig(epochs=4, memory=1))[0]
    assert torch.equal(again.first_NFD, banks[0].first_NFD)
    other = fit_routers(config, features, FitConfig(epochs=4, seed=1))[0]
    assert not torch.equal(other.first_NFD, banks[0].first_NFD)


def test_what_is_held_out_follows_from_ids():
    model, labels = stack(), labels_by(even_or_odd, count=20)
    order = list(range(20))[::-1]
    config = FitConfig(epochs=1, held_out=0.25)
    _, report = train_routers(model, labels, config)
    _, turned = train_routers(model, labels.take(order), config)
    assert report.questions == turned.questions == 15
    assert report.counts == turned.counts
    assert sum(map(sum, report.held_out.confusion)) == 5 * 5


def test_quality_by_hand():
    labels, choices = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]])
    found = quality_of(labels, choices)
    assert found.confusion == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert (found.accuracy, found.by_block) == (0.75, [0.75])
    assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_labels_of_another_model():
    labels = labels_by(even_or_odd)
    with pytest.raises(DataError, match="5 blocks, and this one has 3"):
        train_routers(stack(num_layers=3), labels)
    with pytest.raises(DataError, match="the model has 0 to 4"):
        train_routers(stack(vocab_size=5), labels)


def test_a_broken_model_teaches_nothing():
    model = stack()
    with torch.no_grad():
        model.module.blocks[1].feed_forward.w2.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="block 2"):
        train_routers(model, labels_by(even_or_odd))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("beta", 1.0),
        ("gamma", -1.0),
        ("held_out", 1.0),
        ("windows", 0),
        ("features", "last"),
        ("learning_rate", 0.0),
    ],
)
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ConfigError, match=name):
        FitConfig(**{name: value})
