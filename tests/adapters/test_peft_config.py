"""adapter_config.json: which layers are adapted, with which rank and alpha; and what is refused, in one line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.adapters.patterns import matching
from anabranch.adapters.peft_config import LoraTable
from anabranch.adapters.peft_tables import Ia3Table, PolyTable, PrefixTable, PromptTable, PTuningTable, table_of
from anabranch.errors import CheckpointError
from with_peft import needs_peft

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
MODULES = [*(f"model.layers.{layer}.{name}" for layer in range(12) for name in LINEAR), "lm_head"]
PLACE = Path("adapter_config.json")


def table(**fields):
    return LoraTable({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}, PLACE)


def of(layers, *names):
    return {f"model.layers.{layer}.{name}" for layer in layers for name in names}


ALL = range(12)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"target_modules": ["q_proj"]}, of(ALL, "self_attn.q_proj")),
        ({"target_modules": ["up_proj"]}, of(ALL, "mlp.up_proj", "mlp.experts.3.up_proj")),
        ({"target_modules": ["proj"]}, set()),  # the last word, whole
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, of([1], "self_attn.q_proj")),  # not 11
        ({"target_modules": "all-linear"}, set(MODULES) - {"lm_head"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
        ({"target_modules": None}, set()),
        ({"target_modules": []}, set()),
        ({"target_modules": r"model\.layers\.(1|2)\..*(q|k)_proj"}, of([1, 2], "self_attn.q_proj", "self_attn.k_proj")),
        ({"target_modules": "q_proj"}, set()),  # a pattern fits a whole name
        ({"target_modules": ["q_proj"], "layers_to_transform": 11}, of([11], "self_attn.q_proj")),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, of([0, 2], "self_attn.q_proj")),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, of(ALL, "self_attn.q_proj")),
        # The first number of a name, as peft 0.21 takes it, never an expert's; and none for names that are given in full.
        (
            {"target_modules": ["up_proj"], "layers_to_transform": [4]},
            of([4], "mlp.up_proj", "mlp.experts.3.up_proj"),
        ),
        (
            {"target_modules": ["up_proj"], "layers_to_transform": [3], "layers_pattern": "experts"},
            of(ALL, "mlp.experts.3.up_proj"),
        ),
        (
            {"target_modules": ["up_proj"], "layers_to_transform": [3], "layers_pattern": ["layers", "experts"]},
            of([3], "mlp.up_proj", "mlp.experts.3.up_proj"),
        ),
        (
            {"target_modules": ["model.layers.0.mlp.up_proj", "k_proj"], "layers_to_transform": 1},
            of([0], "mlp.up_proj") | of([1], "self_attn.k_proj"),
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["blocks"]}, set()),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["q_proj"]}, of(ALL, "self_attn.k_proj")),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.\d\..*"}, of([10, 11], "self_attn.q_proj")),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, of(ALL, "self_attn.q_proj")),
    ],
)
def test_targets(fields, wanted):
    assert table(**fields).targets(MODULES) == wanted


WORD = st.sampled_from(["layers", "h", "q", "mlp", "0", "1", "12"])
NAMES = st.lists(st.lists(WORD, min_size=2, max_size=7).map(".".join), min_size=1, max_size=8, unique=True)


@needs_peft
@settings(deadline=None)
@given(
    names=NAMES,
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.sampled_from([0, 1, 12]), max_size=2)),
    pattern=st.one_of(st.none(), WORD, st.lists(WORD, max_size=2)),
    draw=st.data(),
)
def test_targets_are_those_of_peft(names, layers, pattern, draw):
    def endings(most, least=0):
        """Of some of the names, whole ones too."""
        ending = st.tuples(st.sampled_from(names), st.integers(0, 6)).map(lambda one: one[0].split(".")[one[1] :])
        return draw.draw(st.lists(ending.filter(bool).map(".".join), min_size=least, max_size=most))

    wanted, excluded, saved = endings(3, 1), endings(1), endings(1)
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    fields = {
        "target_modules": wanted,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "target_parameters": None,
    }
    config = SimpleNamespace(**fields)
    found = {name: check_target_module_exists(config, name) for name in names}
    theirs = {name for name, one in found.items() if one and not isinstance(one, _ExcludedModule)}
    assert table(**fields).targets(names) == theirs


def test_ranks_and_alphas_by_pattern():
    found = table(
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 16, r"layers\.[2-3]\..*_proj": 32},
        alpha_pattern={"model.layers.0.mlp.up_proj": 0.5},
    )
    ranks, alphas = found.ranks(MODULES), found.alphas(MODULES)
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.11.self_attn.q_proj"] == 16
    assert ranks["model.layers.2.self_attn.q_proj"] == 16  # the first pattern that fits counts
    assert ranks["model.layers.2.self_attn.k_proj"] == 32
    assert ranks["model.layers.4.self_attn.k_proj"] == 4
    assert alphas["model.layers.0.mlp.up_proj"] == 0.5
    assert alphas["lm_head"] == 8
    assert not found.rslora


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type in adapter_config.json is 'IA3'; 'LORA' is what can be read"),
        ({"peft_type": None}, "peft_type in .* is None; 'LORA'"),
        ({"r": 0}, "r in .* is 0; a rank must be a whole number, at least 1"),
        ({"r": 2.5}, r"r in .* is 2\.5; a rank"),
        ({"r": True}, "r in .* is True; a rank"),
        ({"r": 10**400}, "r in .* is an integer of about 401 digits; a rank"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] in .* is -1; a rank"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern in .* is \['q_proj'\]; it must be a table of patterns"),
        ({"lora_alpha": float("nan")}, "lora_alpha in .* is nan; it must be a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha in .* is '8'; it must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha in .*; it must be a finite number"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] in .* is None; it must be a finite number"),
        ({"use_rslora": "yes"}, "use_rslora in .* is 'yes'; it must be true or false"),
        ({"bias": "some"}, "bias in .* is 'some'; it must be none, all or lora_only"),
        ({"target_modules": {"a": 1}}, "target_modules in .*; it must be a list of names"),
        ({"target_modules": [1]}, r"target_modules in .* is \[1\]; it must be a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save in .* is 'lm_head'; it must be a list of names"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform in .*; it must be a layer's number"),
        ({"layers_pattern": 3}, "layers_pattern in .*; it must be a name, or a list of them"),
        ({"use_dora": 1}, "use_dora in .* is 1; it must be true or false"),
        ({"lora_dropout": 1}, "lora_dropout in .* is 1; it must be a number from 0 to below 1"),
        ({"lora_dropout": "none"}, "lora_dropout in .* is 'none'; it must be a number from 0"),
        ({"lora_dropout": float("nan")}, "lora_dropout in .* is nan; it must be a number from 0"),
        ({"lora_bias": True}, "lora_bias in .*; biases of lora_B cannot"),
        ({"layer_replication": [[0, 2]]}, "layer_replication in .*; repeated layers cannot"),
        ({"target_parameters": "down_proj"}, "target_parameters in .*; it must be a list of names"),
        ({"kasa_config": {"beta": 1}}, "kasa_config in .*; KaSA cannot be computed here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights in .* is 'pissa_niter_4'; it changed the base too"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message) as error:
        table(**fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


IA3 = {"peft_type": "IA3"}
POLY = {"peft_type": "POLY"}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"peft_type": "XLORA"},
            "peft_type in adapter_config.json is 'XLORA'; LORA, IA3, POLY, PROMPT_TUNING, P_TUNING, PREFIX",
        ),
        ({}, "peft_type in .* is None; LORA, IA3"),
        ({"peft_type": ["LORA"]}, r"peft_type in .* is \['LORA'\]; LORA, IA3"),
        ({**IA3, "feedforward_modules": 3}, "feedforward_modules in .* is 3; it must be a list of names"),
        ({**IA3, "target_modules": [1]}, "target_modules in .*; it must be a list of names"),
        ({**POLY, "poly_type": "mhr"}, "poly_type in .* is 'mhr'; 'poly' is what can be computed here"),
        ({**POLY, "r": 0}, "r in .* is 0; it must be a whole number, at least 1"),
        ({**POLY, "n_tasks": True}, "n_tasks in .* is True; it must be a whole number"),
        ({**POLY, "n_skills": 10**400}, "n_skills in .* is an integer of about 401 digits; it must be"),
        ({**POLY, "n_splits": None}, "n_splits in .* is None; it must be a whole number"),
        ({**PROMPT, "num_virtual_tokens": None}, "num_virtual_tokens in .* is None; it must be a whole number"),
        ({**PROMPT, "token_dim": -1}, "token_dim in .* is -1; it must be a whole number"),
        ({**PROMPT, "num_transformer_submodules": 2}, "num_transformer_submodules in .* is 2; it must be 1"),
        ({**PREFIX, "num_layers": 1.5}, r"num_layers in .* is 1\.5; it must be a whole number"),
        ({**PREFIX, "prefix_projection": "no"}, "prefix_projection in .* is 'no'; it must be true or false"),
    ],
)
def test_what_is_refused_of_other_kinds(fields, message):
    with pytest.raises(CheckpointError, match=message) as error:
        table_of(fields, PLACE)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_the_kind_of_a_config_is_that_which_it_says():
    kinds = {
        "LORA": LoraTable,
        "IA3": Ia3Table,
        "POLY": PolyTable,
        "PROMPT_TUNING": PromptTable,
        "P_TUNING": PTuningTable,
        "PREFIX_TUNING": PrefixTable,
    }
    for name, kind in kinds.items():
        assert type(table_of({"peft_type": name, "num_virtual_tokens": 1}, PLACE)) is kind


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["up_proj"], of(ALL, "mlp.up_proj", "mlp.experts.3.up_proj")),
        (["p_proj"], of(ALL, "mlp.up_proj", "mlp.experts.3.up_proj")),  # within a word too, as peft has it
        (r".*layers\.1\.mlp\.up_proj", of([1], "mlp.up_proj")),
        ([], set()),
        (None, set()),
    ],
)
def test_whose_inputs_ia3_multiplies(given, wanted):
    assert Ia3Table({**IA3, "feedforward_modules": given}, PLACE).of_inputs(MODULES) == wanted


def test_sizes_of_poly_have_those_of_peft_where_they_are_left_out():
    found = PolyTable(POLY, PLACE)
    assert (found.rank, found.num_tasks, found.num_skills, found.num_splits) == (8, 1, 4, 1)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_ways_to_start_that_leave_the_base_alone(start):
    """They say nothing of what is computed, and are kept."""
    found = table(init_lora_weights=start, target_modules=["q_proj"])
    assert found.table["init_lora_weights"] == start
    assert found.targets(MODULES) == table(target_modules=["q_proj"]).targets(MODULES)
    assert found.ranks(["lm_head"]) == {"lm_head": 4}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"target_modules in adapter_config.json cannot be compared .* '\(' is no regular expression"),
        ("(.*)*(.*)*(.*)*!", "target_modules in adapter_config.json cannot be compared .* took more than 1 s"),
    ],
)
def test_a_pattern_that_is_none_or_never_ends_is_told(pattern, message):
    with pytest.raises(CheckpointError, match=message) as error:
        table(target_modules=pattern).targets(MODULES)
    assert "\n" not in str(error.value)


def test_plain_words_need_no_process(monkeypatch):
    monkeypatch.setattr("anabranch.adapters.patterns.Sandbox", None)
    assert matching(["q", "a.q", "x"], ["a.q", "q", "b"], is_ending=True, what="") == [{"a.q", "q"}, {"a.q"}, set()]


class Word(str):
    """Counts how often a name is compared with it."""

    looked = 0

    def __eq__(self, other):
        Word.looked += 1
        return str.__eq__(self, other)

    def __radd__(self, other):
        Word.looked += 1
        return other + str(self)

    def __format__(self, spec):
        Word.looked += 1
        return str(self)

    __hash__ = str.__hash__


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_full_names_are_looked_up_not_compared_one_by_one(field):
    """A folder that we write names each layer; of a large mixture they are many thousand."""
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(8) for expert in range(16)]
    words = [Word(name) for name in names]
    fields = {"target_modules": words} if field == "target_modules" else {"target_modules": ".*", field: words}
    Word.looked = 0
    assert table(**fields).targets(names) == (set(names) if field == "target_modules" else set())
    assert Word.looked < 20 * len(names)
