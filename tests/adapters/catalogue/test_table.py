"""Cards: every method of the survey's table has one, and each says what a machine can read."""

import ast
import inspect
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from anabranch.adapters import catalogue
from anabranch.adapters.adapt import catalogued
from anabranch.adapters.catalogue import CARDS, applied, cost, find, kept, listed
from anabranch.errors import ConfigError
from anabranch.lm import Decoder

# The package has a function of this name.
recommend_module = sys.modules["anabranch.adapters.catalogue.recommend"]
# The survey's methods, row by row.
SURVEY = """
    adapter-houlsby adapter-pfeiffer adapter-parallel
    adapter-fusion adamix adapter-soup mera
    prompt-tuning p-tuning prefix-tuning multitask-prompt-tuning cpt cartridge
    ia3 ssf
    diff-pruning fish-mask lt-sft shira
    bitfit ln-tuning attention-tuning beft
    intrinsic unilora tinylora
    lora rslora lora-plus pissa olora eva loftq
    adalora dylora sora
    dora vera randlora loha lokr hira miss gralora delora fourierft waveft c3a vblora oft boft hra road psoft
    lorahub molora mole mixlora mola poly mhr xlora arrow
    mam unipelt llm-adapters s4
    adapter-drop sparse-adapter qlora peqa lst side-tuning lora-fa mezo galore gradient-checkpointing
    lily full
"""
# What it has not, and peft has.
LATER = "llama-adapter adamss deft frod glora osf peanut pvera shadow supertuning trainable-tokens"


def test_every_method_of_the_survey_has_a_card():
    assert {*SURVEY.split(), *LATER.split()} == set(CARDS)


@pytest.mark.parametrize("id", CARDS)
def test_a_card_says_what_it_must(id):
    card = CARDS[id]
    told = json.loads(json.dumps(card.to_dict()))
    assert told["id"] == id == find(id).id
    assert all(told[name] for name in ("name", "family", "rule", "where", "trainable", "backend"))
    assert set(told["added_flops"]) == {"forward", "backward", "merged"}
    assert re.fullmatch(r"[a-z0-9-]+", id)
    assert card.papers or id in ("full", "trainable-tokens")
    assert all(re.fullmatch(r"\d{4}\.\d{5}", one.arxiv) for one in card.papers if one.arxiv)
    # What is run, is run by somebody; what learns of it is known.
    if card.backend == "peft":
        assert card.peft_type
    if card.backend != "none":
        assert card.count is not None
    # And of what we run, what is put on a model or learns of it.
    if card.backend == "own":
        assert (card.trained is None) == any((card.layer, card.front, card.ladder))


@pytest.mark.parametrize(
    "module", [applied, catalogued, cost, kept, recommend_module], ids=lambda module: module.__name__
)
def test_who_reads_cards_knows_none_by_its_id(module):
    """What is special to a method is a field of its card."""
    said = {node.value for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Constant)}
    # A config without an id is of LoRA.
    assert said & set(CARDS) <= ({"lora"} if module is catalogued else set())


def who(card):
    """As the page of the survey calls who runs it."""
    if card.backend != "none":
        return f"`{card.backend}`"
    return "a setting of training" if card.setting else "another command or call" if card.way else "nobody"


def test_the_pages_say_who_runs_what():
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "systems" / "peft-survey.md").read_text("utf-8")
    rows = page.split("| run by | methods |\n|---|---|\n")[1].split("\n\n")[0]
    told = {who: set(ids.split(", ")) for who, ids in re.findall(r"^\| (.+?) \| (.+) \|$", rows, re.M)}
    found = defaultdict(set)
    for card in CARDS.values():
        found[who(card)].add(card.id)
    assert told == found
    own, run = len(found["`own`"]), len(found["`own`"] | found["`peft`"])
    guide = (docs / "adapters-guide.md").read_text("utf-8")
    assert f"of {len(CARDS)} methods, {run} of which run here or through peft" in guide
    index = (docs / "systems" / "index.md").read_text("utf-8")
    assert f"a card of each of {len(CARDS)} methods" in index
    assert f"{own} methods of our own and" in index
    assert f"{own} methods of our own and" in page


def test_lists_are_of_what_learns_little_on_a_model():
    shape = catalogue.Shape.of(Decoder.Config(dim=32, num_layers=2))
    few = {card.id for card in listed(max_parameters=1000, shape=shape)}
    assert {"ln-tuning", "lorahub"} <= few
    # What cannot be told, or has nothing to learn in such a model, is not among them.
    assert not {"full", "lora", "s4", "bitfit"} & few
    lora = catalogue.estimate(find("lora"), shape).trainable
    for most, is_in in ((lora, True), (lora - 1, False)):
        assert ("lora" in {card.id for card in listed(max_parameters=most, shape=shape)}) == is_in
    for given in ({"max_parameters": 9}, {"shape": shape}):
        with pytest.raises(ConfigError, match="give max_parameters and shape, or neither"):
            listed(**given)


def test_lists_are_of_what_was_asked():
    assert [card.id for card in listed(family="selective", needs_bias=True)] == ["bitfit"]
    assert {card.backend for card in listed(backend="own")} == {"own"}
    assert all(card.merges in ("no", "per task") for card in listed(merges=False))
    assert {card.id for card in listed(family="prompt")} >= {"prompt-tuning", "cartridge"}
    assert len(listed()) == len(CARDS) > 60
    assert "lora" in {card.id for card in listed(mixed=True, merges=True)}
    for wrong, message in (
        ({"family": "x"}, "no family 'x'; use one of additive"),
        ({"backend": "x"}, "backend is 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            listed(**wrong)


def test_a_name_that_is_nearly_one():
    with pytest.raises(ConfigError, match="there is no method 'lorra'; did you mean 'lora'"):
        find("lorra")
    with pytest.raises(ConfigError, match="there is no method 'zzzz'; anabranch adapters list"):
        find("zzzz")


def test_counts_that_were_measured_with_peft_on_a_small_llama():
    """Of the survey's spec: two layers of width 64, q and v adapted."""
    from anabranch.lm import Decoder
    from anabranch.nn import SelfAttention, SwiGLU

    attention = SelfAttention.Config(num_heads=4)
    config = Decoder.Config(dim=64, num_layers=2, attention=attention, feed_forward=SwiGLU.Config(hidden_dim=128))
    shape = catalogue.Shape.of(config)
    wanted = {
        ("lora", "rank", 8): 4096,
        ("vera", "rank", 256): 1280,
        ("lokr", "rank", 8): 512,
        ("fourierft", "entries", 50): 200,
        ("oft", "block", 16): 1920,
        ("boft", "block", 8): 2304,
        ("prefix-tuning", "tokens", 8): 2048,
        ("prompt-tuning", "tokens", 8): 512,
    }
    for (id, name, value), number in wanted.items():
        assert catalogue.estimate(find(id), shape, {name: value}).trainable == number, id
    ia3 = catalogue.estimate(find("ia3"), shape, {"targets": ("q", "v")})
    assert ia3.trainable == 256
