"""A price that names one side alone: the other comes from where it is known, or the file is refused."""

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import load_config
from anabranch.gateway.config.price_table import list_price
from anabranch.routers.money import NANO, Price

LISTED = "https://api.openai.com/v1"
OPENAI = '{ kind = "openai", model = "gpt-4o", key_env = "" }'
MINI = '{ kind = "openai", model = "gpt-4o-mini", key_env = "" }'
UNKNOWN = '{ kind = "openai", model = "own", key_env = "", base_url = "http://10.0.0.1/v1" }'
MOCK = '{ kind = "mock", model = "own" }'


def load(tmp_path, price, *deployments):
    """A model of that price, whose deployments are a provider, or a provider and a price."""
    made = ", ".join(
        "{ provider = "
        + (one if isinstance(one, str) else one[0])
        + ("" if isinstance(one, str) else f", price = {one[1]}")
        + " }"
        for one in deployments
    )
    told = "" if price is None else f"price = {price}\n"
    path = tmp_path / "gateway.toml"
    path.write_text(f'[[models]]\nname = "m"\n{told}deployments = [{made}]\n')
    return load_config(path).models[0]


def test_a_models_other_side_is_that_of_the_list(tmp_path):
    listed = list_price(LISTED, "gpt-4o")
    price = load(tmp_path, "{ input_usd = 2 }", OPENAI).price
    assert price == Price(input=2 * NANO, output=listed.output)
    assert load(tmp_path, "{ output_usd = 2 }", OPENAI).price == Price(input=listed.input, output=2 * NANO)
    # Both, where it names neither of them but what is made of one.
    price = load(tmp_path, "{ cached_input_usd = 1 }", OPENAI).price
    assert price == Price(input=listed.input, output=listed.output, cached_input=NANO)


def test_of_several_deployments_the_dearest_counts_of_those_without_a_price(tmp_path):
    dear, cheap = (list_price(LISTED, name).output for name in ("gpt-4o", "gpt-4o-mini"))
    assert load(tmp_path, "{ input_usd = 2 }", MINI, OPENAI, UNKNOWN).price.output == dear > cheap
    whole = "{ input_usd = 1, output_usd = 1 }"
    assert load(tmp_path, "{ input_usd = 2 }", MINI, (OPENAI, whole)).price.output == cheap
    assert load(tmp_path, "{ input_usd = 2 }", (OPENAI, whole)).price.output == dear


def test_what_is_free_is_no_guide_to_what_nobody_knows(tmp_path):
    assert load(tmp_path, "{ input_usd = 2 }", MOCK).price == Price(input=2 * NANO)
    assert load(tmp_path, "{ input_usd = 2 }", MOCK, MINI).price.output == list_price(LISTED, "gpt-4o-mini").output
    with pytest.raises(ConfigError, match="gives input_usd, but no output_usd"):
        load(tmp_path, "{ input_usd = 2 }", MOCK, UNKNOWN)


def test_a_deployments_other_side_is_its_models_and_else_that_of_the_list(tmp_path):
    model = load(tmp_path, "{ input_usd = 3, output_usd = 9 }", (OPENAI, "{ input_usd = 2 }"))
    assert model.deployments[0].price == Price(input=2 * NANO, output=9 * NANO)
    model = load(tmp_path, None, (OPENAI, "{ input_usd = 2 }"), (MOCK, "{ output_usd = 2 }"))
    assert model.deployments[0].price == Price(input=2 * NANO, output=list_price(LISTED, "gpt-4o").output)
    # What nobody bills costs what is said of it.
    assert model.deployments[1].price == Price(output=2 * NANO)


def test_tiers_and_long_prompts_have_both_sides_too(tmp_path):
    listed = list_price(LISTED, "gpt-4o")
    told = "{ input_usd = 2, tiers = { priority = { input_usd = 4 } }, long_context = 9, long = { output_usd = 5 } }"
    price = load(tmp_path, told, OPENAI).price
    tier = price.tiers["priority"]
    assert (tier.input, tier.output) == (4 * NANO, listed.output)
    assert (price.long.input, price.long.output) == (2 * NANO, 5 * NANO)


@pytest.mark.parametrize(
    ("price", "deployment", "says"),
    [
        ("{ input_usd = 2 }", UNKNOWN, "3: models.0.price gives input_usd, but no output_usd, and the price list"),
        ("{ input_usd = 2 }", UNKNOWN, "write output_usd too (output_usd = 0 if answers cost nothing)"),
        ("{ output_usd = 2 }", UNKNOWN, "write input_usd too (input_usd = 0 if prompts cost nothing)"),
        ("{ cache_write_usd = 2 }", UNKNOWN, "gives cache_write_usd, but no input_usd and no output_usd"),
        (None, (UNKNOWN, "{ input_usd = 2 }"), "3: models.0.deployments.0.price gives input_usd, but no output_usd"),
        (
            "{ tiers = { flex = { input_usd = 2 } } }",
            UNKNOWN,
            "models.0.price.tiers.flex gives input_usd, but no output",
        ),
        # What is wrong otherwise is told.
        ("{ input_usd = 2 }", '{ kind = "none" }', "models.0.deployments.0.provider"),
        ("{ input_usd = 1e-12, output_usd = 1 }", UNKNOWN, "is 1e-12; the least is 0.000000001, and 0 where it costs"),
    ],
)
def test_what_nobody_knows_is_refused_with_file_and_line(tmp_path, price, deployment, says):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, price, deployment)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("price", "wanted"),
    [
        ("{ input_usd = 2, output_usd = 0 }", Price(input=2 * NANO)),
        ("{}", Price()),
        ("{ request_usd = 2 }", Price(request=2 * NANO)),
        ("{ audio_input_usd = 2 }", Price(audio_input=2 * NANO)),
    ],
)
def test_what_is_said_stands(tmp_path, price, wanted):
    assert load(tmp_path, price, UNKNOWN).price == wanted
