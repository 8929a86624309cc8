"""Rules, and what counts as a cue."""

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.money import Price
from anabranch.routers.strategies.cues import has_code, has_maths, language, looks_hard
from anabranch.routers.strategies.rules import Rule, Rules

POOL = Pool(
    (
        Model(name="large", price=Price.of_dollars(10, 30), context=128_000),
        Model(name="small", price=Price.of_dollars(0.1, 0.3), context=8_000),
        Model(name="medium", price=Price.of_dollars(1, 3), context=32_000),
    )
)


def toml(text):
    import tomllib

    return from_dict(Rules.Config, tomllib.loads(text)).build()


MINE = """
kind = "rules"
otherwise = "small"
[[rules]]
name = "vip"
headers = { "X-Tier" = "gold|platinum" }
models = ["large", "medium"]
[[rules]]
name = "german"
languages = ["de"]
size = "medium"
[[rules]]
name = "orders"
regex = "order #\\\\d+"
models = ["gone", "medium"]
[[rules]]
name = "long"
min_tokens = 1000
size = "large"
[[rules]]
name = "legal"
tasks = ["contract"]
size = "large"
[[rules]]
name = "nowhere"
regex = "^nowhere$"
models = ["gone"]
"""


@pytest.mark.parametrize(
    ("query", "model", "rule"),
    [
        (Query(text="hi", headers={"x-tier": "gold"}), "large", "vip"),
        (Query(text="hi", headers={"x-tier": "golden"}), "small", None),
        (Query(text="Wie ist das Wetter in der Stadt und was ist zu tun?"), "medium", "german"),
        (Query(text="Where is ORDER #123?"), "medium", "orders"),
        (Query(text="x " * 2000), "large", "long"),
        (Query(text="hi", prompt_tokens=1000), "large", "long"),
        (Query(text="hi", task="contract"), "large", "legal"),
        (Query(text="hi"), "small", None),
    ],
)
def test_rules_from_toml(query, model, rule):
    decision = toml(MINE).route(query, POOL)
    assert decision.model == model
    assert decision.details["rule"] == rule
    assert len(decision.candidates) == 3


def test_a_rule_for_models_that_are_gone_is_refused():
    with pytest.raises(InputError, match="rule 'nowhere' names gone; the pool has large, small, medium"):
        toml(MINE).route(Query(text="nowhere"), POOL)


@pytest.mark.parametrize(
    ("query", "model"),
    [
        (Query(text="Good morning!"), "small"),
        (Query(text="What is in this picture?", has_images=True), "large"),
        (Query(text="Good morning!", has_tools=True), "large"),
        (Query(text="```python\nprint(1)\n```\nWhy?"), "large"),
        (Query(text="Fix this:\ndef f(x):\n    return x +\nSyntaxError"), "large"),
        (Query(text="Solve for x: the equation x^2 = 4"), "large"),
        (Query(text="Compare and contrast the two treaties."), "large"),
        (Query(text="Tell me of the town and its people. " * 20), "medium"),
        (Query(text="Tell me of the town and its people. " * 300), "medium"),
    ],
)
def test_default_rules(query, model):
    assert strategies.make("rules").route(query, POOL).model == model


def test_models_with_too_short_a_context_are_left_out():
    decision = strategies.make("rules").route(Query(text="hi", prompt_tokens=10_000, max_tokens=500), POOL)
    assert [candidate.model for candidate in decision.candidates] == ["medium", "large"]
    with pytest.raises(InputError, match="about 200000 tokens; no model of the pool takes that many"):
        strategies.make("rules").route(Query(text="hi", prompt_tokens=200_000), POOL)


def test_order_of_sizes():
    ranked = {
        size: [
            c.model
            for c in Rules.Config(rules=(Rule(name="all", size=size),)).build().route(Query(text="x"), POOL).candidates
        ]
        for size in ("small", "medium", "large")
    }
    assert ranked == {
        "small": ["small", "medium", "large"],
        "medium": ["medium", "large", "small"],
        "large": ["large", "medium", "small"],
    }


def test_config_reads_back():
    config = toml(MINE).config
    assert from_dict(Rules.Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "x"}, "either models or size"),
        ({"name": "x", "size": "small", "models": ("a",)}, "either models or size"),
        ({"name": "x", "size": "huge"}, "size"),
        ({"name": "x", "size": "small", "regex": "("}, "regular expression"),
        ({"name": "x", "size": "small", "headers": {"a": "["}}, "regular expression"),
        ({"name": "x", "size": "small", "min_tokens": -1}, "min_tokens"),
    ],
)
def test_bad_rules(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**fields)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("What is the capital of the country, and what do people eat there?", "en"),
        ("Quelle est la capitale de la France et que mange-t-on dans le sud ?", "fr"),
        ("¿Cuál es la capital de España y qué se come en el sur?", "es"),
        ("Was ist die Hauptstadt und wie ist das Wetter?", "de"),
        ("Qual è la capitale e che cosa si mangia nel sud?", "it"),
        ("Wat is de hoofdstad van het land en hoe is het weer?", "nl"),
        ("日本の首都はどこですか", "ja"),
        ("法国的首都是哪里", "zh"),
        ("프랑스의 수도는 어디인가요", "ko"),
        ("Какая столица Франции?", "ru"),
        ("ما هي عاصمة فرنسا", "ar"),
        ("1 + 1", None),
        ("", None),
    ],
)
def test_language(text, code):
    assert language(text) == code


def test_cues_stay_quiet_on_plain_prose():
    prose = "Write me a warm birthday card for my aunt, who likes gardens and tea."
    assert [cue(prose) for cue in (has_code, has_maths, looks_hard)] == [False, False, False]
    assert has_code("SELECT name FROM users;\nWHERE id = 3;")
    assert has_maths(r"Show that $\int_0^1 x dx = 1/2$")
    assert looks_hard("Why? How? When? Where?")


def test_cues_go_through_a_long_text_once():
    """A pattern that began anew at each bracket would not end."""
    text = "a(" * 2_000_000 + "{" * 2_000_000
    assert [cue(text) for cue in (has_code, has_maths, looks_hard)] == [False, False, False]
    assert language(text) == language("a")
