"""Moving in from LiteLLM: what was closed stays closed, and nothing is asked elsewhere, whatever of a file is not read."""

import functools
import itertools

import pytest
import yaml

from anabranch.cli.main import main
from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config.litellm_addresses import KNOWN
from gateway_litellm import clear, fields, moved

HERE = "http://10.0.0.5:8000/v1"
ASIDE = {"model": "openai/aside", "api_base": "http://aside/v1", "timeout": 60, "max_tokens": 100}
CREDENTIALS = [
    {"credential_name": "mine", "credential_values": {"api_base": HERE, "api_key": "os.environ/MINE"}},
    {"credential_name": "mine", "credential_values": {"api_base": "http://second/v1"}},
]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    clear(monkeypatch)


@pytest.fixture
def move(tmp_path):
    return functools.partial(moved, tmp_path)


def provider(done):
    return done.config.models[0].deployments[0].provider


# Who is let in

# What may hold a key that is not read, or keep others out.
CLOSED = [
    ({"include": ["general.yaml"]}, "include"),
    ({"general_settings": ["master_key"]}, "general_settings"),
    ({"environment_variables": ["LITELLM_MASTER_KEY"]}, "environment_variables"),
    ({"environment_variables": {"LITELLM_MASTER_KEY": "os.environ/OWN"}}, "environment_variables.LITELLM_MASTER_KEY"),
    *(
        ({"general_settings": {name: "x"}}, f"general_settings.{name}")
        for name in (
            *("key_management_system", "use_azure_key_vault", "use_google_kms", "store_model_in_db", "allowed_ips"),
            *("custom_auth", "enable_jwt_auth", "enable_oauth2_auth", "enable_oauth2_proxy_auth", "what_comes_later"),
        )
    ),
]


@pytest.mark.parametrize(("sections", "by"), CLOSED)
def test_what_may_have_been_closed_is_not_opened(move, sections, by):
    done = move(ASIDE, **sections)
    assert done.config.require_key is True
    (line,) = (line for line in done.left if "require_key stays true" in line)
    assert f"may be closed by {by}, which is not read" in line
    assert "require_key" not in "".join(done.notes)


@pytest.mark.parametrize("by", ["database_url", "alerting"])
def test_what_keeps_nobody_out_closes_nothing(move, by):
    assert move(ASIDE, general_settings={by: "x"}).config.require_key is False


def test_the_command_writes_it_closed_with_what_is_left_out(tmp_path, capsys):
    path, out = tmp_path / "config.yaml", tmp_path / "gateway.yaml"
    entries = [
        {"model_name": name, "litellm_params": one} for name, one in (("a", ASIDE), ("b", {"model": "openai/b"}))
    ]
    path.write_text(yaml.safe_dump({"include": ["general.yaml"], "model_list": entries}))
    line = ["gateway", "import", str(path), "--out", str(out)]
    assert main(line) == 2
    assert not out.exists()
    assert main([*line, "--partial"]) == 0
    written = yaml.safe_load(out.read_text())
    assert (written.get("require_key", True), [model["name"] for model in written["models"]]) == (True, ["a"])
    assert "require_key stays true" in capsys.readouterr().err


# Where it is asked

DEFAULTS = {"api_base": HERE, "api_key": "os.environ/MINE"}


@pytest.mark.parametrize(
    ("entry", "sections"),
    [
        ({"litellm_credential_name": "mine"}, {"credential_list": CREDENTIALS}),
        ({}, {"router_settings": {"default_litellm_params": DEFAULTS | {"temperature": 0}}}),
        (
            {},
            {
                "router_settings": {"default_litellm_params": {"litellm_credential_name": "mine"}},
                "credential_list": CREDENTIALS,
            },
        ),
        # What an entry says comes before its credential.
        (
            {"litellm_credential_name": "other", "api_base": HERE},
            {
                "credential_list": [
                    {"credential_name": "other", "credential_values": {**DEFAULTS, "api_base": "http://b"}}
                ]
            },
        ),
    ],
)
def test_an_address_and_a_key_of_elsewhere_are_the_entrys(move, tmp_path, entry, sections):
    done = move({"model": "openai/secret", **entry}, **sections)
    assert (provider(done).base_url, provider(done).key_env) == (HERE, "MINE")
    # Of the defaults it is told what they are taken over for; of credentials there is nothing to tell.
    told = ["router_settings.default_litellm_params"] if "router_settings" in sections else []
    assert fields(done.left, tmp_path / "config.yaml") == told


def test_a_key_that_is_written_into_a_credential_is_not_shown(move):
    given = [{"credential_name": "c", "credential_values": {"api_base": HERE, "api_key": "sk-hush"}}]
    done = move({"model": "openai/x", "litellm_credential_name": "c"}, credential_list=given)
    assert any("is a key written into the file (not shown)" in line for line in done.left)
    assert "hush" not in f"{done.left}{done.notes}{to_dict(done.config)}"


PLAIN = {"model": "openai/secret"}
GEMINI = {"model": "vertex_ai/gemini-2.5-pro"}
VERTEX = {"model": "vertex_ai/gemini-2.5-flash", "vertex_project": "p-1"}


@pytest.mark.parametrize(
    ("entry", "sections", "field"),
    [
        *((PLAIN, sections, "api_base") for sections, by in CLOSED[:3]),
        *(
            (PLAIN, {"general_settings": {name: "x"}}, "api_base")
            for name in ("key_management_system", "use_azure_key_vault", "use_google_kms")
        ),
        (PLAIN, {"environment_variables": {"OPENAI_API_BASE": "os.environ/OWN"}}, "api_base"),
        (PLAIN, {"litellm_settings": {"api_base": HERE}}, "api_base"),
        ({"model": "groq/x"}, {"litellm_settings": {"api_base": HERE}}, "api_base"),
        ({"model": "bedrock/x", "aws_region_name": "eu-west-3"}, {"litellm_settings": {"api_base": HERE}}, "api_base"),
        # There it comes before the entry's.
        ({"model": "ollama/x", "api_base": "http://a"}, {"litellm_settings": {"api_base": HERE}}, "api_base"),
        (VERTEX, {"litellm_settings": {"vertex_location": "europe-west4"}}, "vertex_location"),
        (VERTEX | {"region_name": "europe-west4"}, {}, "region_name"),
        *((entry, {"litellm_settings": {"use_litellm_proxy": True}}, "model") for entry in (PLAIN, VERTEX)),
        # There an address of its own is asked in LiteLLM's form.
        (PLAIN | {"api_base": HERE}, {"litellm_settings": {"use_litellm_proxy": True}}, "model"),
        *(
            (PLAIN, {"environment_variables": {"USE_LITELLM_PROXY": value}}, "model")
            for value in (True, "True", " TRUE ", "os.environ/OWN")
        ),
        (PLAIN | {"use_litellm_proxy": True}, {}, "use_litellm_proxy"),
        (PLAIN | {"mock_response": "hello"}, {}, "mock_response"),
        (PLAIN | {"litellm_credential_name": "gone"}, {"credential_list": CREDENTIALS}, "litellm_credential_name"),
        (PLAIN | {"litellm_credential_name": ["mine"]}, {"credential_list": CREDENTIALS}, "litellm_credential_name"),
        (PLAIN | {"api_base": "http://a", "base_url": "http://b"}, {}, "api_base"),
        (PLAIN | {"api_base": "http://a"}, {"router_settings": {"default_litellm_params": DEFAULTS}}, "api_base"),
        (PLAIN | {"base_url": "http://a"}, {"router_settings": {"default_litellm_params": DEFAULTS}}, "api_base"),
        (PLAIN, {"router_settings": {"default_litellm_params": {"mock_response": "hello"}}}, "mock_response"),
    ],
)
def test_an_entry_that_may_be_asked_elsewhere_is_left_out(move, entry, sections, field):
    with pytest.raises(ConfigError, match=rf"model_list\.0\.litellm_params\.{field} "):
        move(entry, **sections)


@pytest.mark.parametrize("value", ["true", "True"])
def test_the_environment_may_have_all_asked_of_another_litellm(move, monkeypatch, value):
    monkeypatch.setenv("USE_LITELLM_PROXY", value)
    with pytest.raises(
        ConfigError, match=r"litellm_params\.model is asked of another LiteLLM there.*by USE_LITELLM_PROXY"
    ):
        move(PLAIN)


@pytest.mark.parametrize("value", ["false", "", "1", "yes"])
def test_what_there_is_no_yes_leaves_nothing_out(move, monkeypatch, value):
    monkeypatch.setenv("USE_LITELLM_PROXY", value)
    assert provider(move(PLAIN)).base_url == "https://api.openai.com/v1"
    monkeypatch.delenv("USE_LITELLM_PROXY")
    done = move(PLAIN, litellm_settings={"use_litellm_proxy": value})
    assert provider(done).base_url == "https://api.openai.com/v1"


def test_what_is_asked_of_another_litellm_by_its_name_is_kept(move, monkeypatch):
    monkeypatch.setenv("USE_LITELLM_PROXY", "true")
    monkeypatch.setenv("LITELLM_PROXY_API_BASE", HERE)
    found = provider(move({"model": "litellm_proxy/x"}, litellm_settings={"use_litellm_proxy": True}))
    assert (found.base_url, found.model) == (HERE, "x")


@pytest.mark.parametrize("sections", [sections for sections, _ in CLOSED[:3]])
def test_one_whose_address_is_known_is_kept(move, monkeypatch, sections):
    assert provider(move(PLAIN | {"api_base": HERE}, **sections)).base_url == HERE
    monkeypatch.setenv("OPENAI_API_BASE", HERE)
    assert provider(move(PLAIN, **sections)).base_url == HERE


# What of a file may hold an address, and is not read.
STORES = [
    {"general_settings": {name: "x"}} for name in ("key_management_system", "use_azure_key_vault", "use_google_kms")
]
MAY_HOLD = [{"include": ["models.yaml"]}, *STORES]
KEY = {"api_key": "os.environ/MINE"}
PAIR = {"aws_access_key_id": "os.environ/A", "aws_secret_access_key": "os.environ/S"}
REGION = {"aws_region_name": "eu-west-3"}
# Entries that say with which key they are asked, and in which region.
SAYING = [
    *(
        {"model": f"{kind}/x", **KEY}
        for kind in KNOWN
        if KNOWN[kind].address and kind not in ("azure", "bedrock", "vertex_ai")
    ),
    *({"model": "bedrock/x", **REGION, **one} for one in (KEY, PAIR)),
    VERTEX | {"vertex_location": "europe-west4", "vertex_credentials": "os.environ/CREDS"},
    GEMINI | {"vertex_ai_project": "p-1", "vertex_ai_location": "eu", "vertex_ai_credentials": "os.environ/CREDS"},
]


@pytest.mark.parametrize("entry", SAYING, ids=lambda entry: entry["model"])
@pytest.mark.parametrize("sections", MAY_HOLD, ids=str)
def test_an_entry_that_needs_nothing_of_what_is_not_read_is_kept(move, tmp_path, entry, sections):
    done = move(entry, **sections)
    assert done.config.require_key is True
    assert provider(done) == provider(move(entry))
    assert not any("litellm_params" in field for field in fields(done.left, tmp_path / "config.yaml"))
    # Which LiteLLM may be asked elsewhere for, all the same.
    bases = KNOWN[entry["model"].partition("/")[0]].bases
    told = [line for line in done.notes if "entries that name their key are taken" in line]
    assert len(told) == bool(bases or "include" in sections)
    assert all(name in line for line in told for name in bases)


@pytest.mark.parametrize(
    "entry",
    [
        PLAIN,
        PLAIN | {"api_key": "sk-hush"},
        {"model": "bedrock/x", **PAIR},
        {"model": "bedrock/x", **REGION},
        {"model": "bedrock/x", **REGION, "aws_access_key_id": "os.environ/A"},
        VERTEX | {"vertex_credentials": "os.environ/CREDS"},
        VERTEX | {"vertex_location": "europe-west4"},
        {"model": "azure/x", **KEY},
        {"model": "hosted_vllm/x", **KEY},
    ],
)
@pytest.mark.parametrize("sections", MAY_HOLD, ids=str)
def test_one_that_may_need_something_of_it_is_left_out(move, entry, sections):
    with pytest.raises(ConfigError, match=r"litellm_params\.api_base (may be another by|is missing)"):
        move(entry, **sections)


def test_what_is_left_out_is_told_all_ways_to_take_it_over(move, monkeypatch):
    with pytest.raises(ConfigError, match="write the entry's own into it, set OPENAI_BASE_URL for the import, or take"):
        move(PLAIN, **STORES[0])
    monkeypatch.setenv("OPENAI_BASE_URL", HERE)
    assert provider(move(PLAIN, **STORES[0])).base_url == HERE


def stored(section, **settings):
    return {"general_settings": section["general_settings"] | {"key_management_settings": settings}}


@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"hosted_keys": ["OPENAI_API_KEY", "ANTHROPIC_API_BASE"]},
        {"hosted_keys": []},
        {"access_mode": "write_only", "store_virtual_keys": True},
        {"access_mode": "write_only", "hosted_keys": ["OPENAI_BASE_URL"]},
    ],
)
def test_a_store_that_holds_no_address_leaves_nothing_out(move, store, settings):
    done = move(PLAIN, **stored(store, **settings))
    assert done.config.require_key is True
    assert provider(done) == provider(move(PLAIN))
    assert "entries that name their key" not in "".join(done.notes)


@pytest.mark.parametrize(
    ("entry", "settings"),
    [
        *(
            (PLAIN | key, {"hosted_keys": [name]})
            for key in ({}, KEY)
            for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE")
        ),
        (PLAIN, {"hosted_keys": None}),
        (PLAIN, {"hosted_keys": "OPENAI_API_KEY"}),
        (PLAIN, {"access_mode": "read_and_write"}),
    ],
)
def test_a_store_that_may_hold_an_address_leaves_out_what_it_is_of(move, entry, settings):
    with pytest.raises(ConfigError, match=r"api_base may be another by general_settings\.key_management_system"):
        move(entry, **stored(STORES[0], **settings))


@pytest.mark.parametrize(
    ("entry", "name", "variable"),
    [
        (VERTEX, "vertex_location", "VERTEX_LOCATION"),
        (VERTEX | {"api_base": "https://eu.example.com"}, "vertex_location", "VERTEXAI_LOCATION"),
        (GEMINI, "vertex_project", "VERTEXAI_PROJECT"),
        ({"model": "bedrock/x", **KEY}, "aws_region_name", "AWS_REGION"),
    ],
)
def test_a_region_that_a_store_holds_is_not_read(move, entry, name, variable):
    with pytest.raises(ConfigError, match=rf"{name} may be another by general.*set {variable[:3]}\w+ for the import"):
        move(entry, **stored(STORES[0], hosted_keys=[variable]))


def test_a_region_that_is_said_is_not_the_stores(move, monkeypatch):
    held = stored(STORES[0], hosted_keys=["VERTEXAI_LOCATION", "AWS_REGION"])
    assert provider(move(VERTEX | {"vertex_ai_location": "europe-west4"}, **held)).location == "europe-west4"
    assert provider(move({"model": "bedrock/x", **REGION}, **held)).region == "eu-west-3"
    monkeypatch.setenv("VERTEXAI_LOCATION", "europe-west1")
    assert provider(move(VERTEX, **held)).location == "europe-west1"


@pytest.mark.parametrize("sections", [sections for sections, _ in CLOSED[1:3]])
def test_what_of_a_file_cannot_be_read_at_all_leaves_out_every_entry_without_an_address(move, sections):
    with pytest.raises(ConfigError, match="api_base may be another by"):
        move(PLAIN | KEY, **sections)


# Vertex's second names

FIRST = {"vertex_project": "p-1", "vertex_location": "europe-west1", "vertex_credentials": "os.environ/CREDS"}
OURS = {"project": "p-1", "location": "europe-west1", "credentials_env": "CREDS"}


def second(given):
    return {name.replace("vertex_", "vertex_ai_"): value for name, value in given.items()}


@pytest.mark.parametrize("is_second", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("where", ["entry", "defaults", "credential"])
def test_what_says_where_vertex_is_asked_is_read_by_both_of_its_names(move, tmp_path, monkeypatch, is_second, where):
    # Which the entry comes before.
    for name, value in (("PROJECT", "other"), ("LOCATION", "us-central1"), ("CREDENTIALS", "/other.json")):
        monkeypatch.setenv(f"VERTEXAI_{name}", value)
    given = {}
    for (name, value), is_it in zip(FIRST.items(), is_second, strict=True):
        given |= second({name: value}) if is_it else {name: value}
    if where == "entry":
        done = move(GEMINI | given, litellm_settings={"vertex_location": "us-central1", "vertex_project": "other"})
    elif where == "defaults":
        done = move(GEMINI, router_settings={"default_litellm_params": given})
    else:
        listed = [{"credential_name": "g", "credential_values": given}]
        done = move(GEMINI | {"litellm_credential_name": "g"}, credential_list=listed)
    found = to_dict(provider(done))
    assert {name: found[name] for name in OURS} == OURS
    assert not any(
        "model_list.0.litellm_params" in field for field in fields((*done.left, *done.notes), tmp_path / "config.yaml")
    )


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("other", ["", "other", None])
def test_of_two_names_the_first_counts_where_it_says_something(move, tmp_path, name, other):
    wanted = FIRST | {name: "os.environ/OTHER" if other and name == "vertex_credentials" else other or FIRST[name]}
    done = move(GEMINI | second(FIRST) | {name: wanted[name] if other else other})
    found = provider(done)
    assert (found.project, found.location, found.credentials_env) == (
        *(wanted[one] for one in ("vertex_project", "vertex_location")),
        wanted["vertex_credentials"].removeprefix("os.environ/"),
    )
    told = [f"model_list.0.litellm_params.{name.replace('vertex_', 'vertex_ai_')}"] if other else []
    assert fields(done.left, tmp_path / "config.yaml") == told


def test_what_cannot_be_read_of_a_second_name_is_told_by_it(move):
    with pytest.raises(ConfigError, match=r"litellm_params\.vertex_ai_location is read from the environment there"):
        move(GEMINI | {"vertex_project": "p-1", "vertex_ai_location": "os.environ/OWN"})
    done = move(GEMINI | {"vertex_project": "p-1", "vertex_ai_credentials": '{"key": "hush"}'})
    assert any("vertex_ai_credentials are written into the file (not shown)" in line for line in done.left)
    assert "hush" not in f"{done.left}{done.notes}"
