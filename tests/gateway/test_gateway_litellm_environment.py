"""Moving in from LiteLLM: whom the gateway lets in, where it sends what it is asked, and with which key, as LiteLLM did."""

import functools

import pytest
import yaml

from anabranch.cli.main import main
from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config.litellm_addresses import KNOWN, LOCATIONS, NO_KEYS, OPENAI_FORM, REGIONS
from gateway_litellm import clear, moved

ONE = {"model": "openai/gpt-4o", "timeout": 60, "max_tokens": 100}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    clear(monkeypatch)


@pytest.fixture
def move(tmp_path):
    return functools.partial(moved, tmp_path)


def provider(done):
    return done.config.models[0].deployments[0].provider


# Who is let in


@pytest.mark.parametrize(
    ("general", "own", "variables", "key"),
    [
        ({"master_key": "os.environ/MASTER"}, {}, {}, "env:MASTER"),
        ({"master_key": "os.environ/MASTER"}, {}, {"LITELLM_MASTER_KEY": "sk-1"}, "env:MASTER"),
        ({"master_key": "sk-written"}, {}, {}, None),
        # LiteLLM's quick start has it in the environment alone.
        ({}, {}, {"LITELLM_MASTER_KEY": "sk-1"}, "env:LITELLM_MASTER_KEY"),
        ({"master_key": None}, {}, {"LITELLM_MASTER_KEY": "sk-1"}, "env:LITELLM_MASTER_KEY"),
        ({}, {"LITELLM_MASTER_KEY": "sk-hush"}, {}, "env:LITELLM_MASTER_KEY"),
        ({}, {"LITELLM_MASTER_KEY": "os.environ/OWN"}, {"OWN": "sk-hush"}, "env:LITELLM_MASTER_KEY"),
        # What lets nobody in unknown there.
        ({"custom_auth": "auth.check"}, {}, {}, None),
        ({"enable_jwt_auth": True}, {}, {}, None),
        ({"enable_oauth2_auth": True}, {}, {}, None),
        ({"enable_oauth2_proxy_auth": True}, {}, {}, None),
    ],
)
def test_a_proxy_that_was_closed_stays_closed(move, monkeypatch, general, own, variables, key):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = move(ONE, general_settings=general, environment_variables=own)
    assert (done.config.require_key, done.config.admin.key) == (True, key)
    assert "require_key" not in "".join(done.notes)
    assert any("get 401" in line for line in done.left) or key is None
    assert "hush" not in f"{done.left}{done.notes}{to_dict(done.config)}"


@pytest.mark.parametrize("general", [None, {}, {"master_key": None}, {"enable_jwt_auth": False}])
@pytest.mark.parametrize("variables", [{}, {"LITELLM_MASTER_KEY": " "}])
def test_an_open_result_is_told(move, monkeypatch, general, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = move(ONE, **({} if general is None else {"general_settings": general}))
    assert done.config.require_key is False
    (line,) = (line for line in done.notes if "require_key is false" in line)
    assert "everybody who reaches the gateway is answered" in line
    assert "LITELLM_MASTER_KEY" in line


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_tells_it(tmp_path, capsys, monkeypatch, as_json):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-the-operator")
    path, out = tmp_path / "config.yaml", tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump({"model_list": [{"model_name": "m", "litellm_params": ONE}]}))
    line = ["gateway", "import", str(path), "--out", str(out), *(["--json"] if as_json else [])]
    assert main(line) == 0
    shown = capsys.readouterr()
    assert "require_key is false" in shown.out + shown.err
    assert yaml.safe_load(out.read_text())["require_key"] is False
    monkeypatch.setenv("LITELLM_MASTER_KEY", "sk-1")
    assert main(line) == 2
    assert main([*line, "--partial"]) == 0
    assert "require_key is false" not in capsys.readouterr().err
    assert yaml.safe_load(out.read_text()).get("require_key", True) is True


# Where it is

# What else an entry needs to be taken over.
NEEDS = {"bedrock": {"aws_region_name": "eu-west-3"}, "vertex_ai": {"vertex_project": "acme-1"}}
MODELS = {"vertex_ai": "gemini-2.5-flash"}
BASES = [(kind, name) for kind, place in KNOWN.items() for name in place.bases]


def entry_of(kind, **more):
    return {"model": f"{kind}/{MODELS.get(kind, 'x')}", **NEEDS.get(kind, {}), **more}


def host(done):
    return provider(done).base_url.removeprefix("https://").partition("/")[0]


@pytest.mark.parametrize(("kind", "name"), BASES)
def test_an_address_of_the_environment_is_read(move, monkeypatch, kind, name):
    """Were it not, what was asked of a server of one's own would go to the provider."""
    monkeypatch.setenv(name, "https://own.example.com")
    done = move(entry_of(kind))
    assert host(done) == "own.example.com"
    # It is told, since the next import may read another.
    assert any(name in line for line in done.notes)
    # What an entry says comes first, and what a file sets comes before what is set.
    own = {"vertex_credentials": "/keys/a.json"} if kind == "vertex_ai" else {"api_key": "os.environ/K"}
    assert host(move(entry_of(kind, api_base="https://entry.example.com", **own))) == "entry.example.com"
    done = move(entry_of(kind), environment_variables={name: "https://file.example.com"})
    assert host(done) == "file.example.com"


@pytest.mark.parametrize("kind", [kind for kind, place in KNOWN.items() if len(place.bases) > 1])
def test_of_several_the_first_counts_as_there(move, monkeypatch, kind):
    for at, name in enumerate(KNOWN[kind].bases):
        monkeypatch.setenv(name, f"https://own{at}.example.com")
    assert host(move(entry_of(kind))) == "own0.example.com"


@pytest.mark.parametrize(
    ("entry", "variables", "made"),
    [
        (
            {"model": "bedrock/x"},
            {name: f"eu-west-{at + 1}" for at, name in enumerate(REGIONS)},
            {"region": "eu-west-1"},
        ),
        *(({"model": "bedrock/x"}, {name: "eu-west-3"}, {"region": "eu-west-3"}) for name in REGIONS),
        ({"model": "bedrock/us-west-2/x"}, {"AWS_REGION_NAME": "eu-west-3"}, {"region": "us-west-2"}),
        (
            {"model": "bedrock/arn:aws:bedrock:eu-west-1:1:inference-profile/x"},
            {"AWS_REGION_NAME": "eu-west-3"},
            {"region": "eu-west-1"},
        ),
        ({"model": "bedrock/x"}, {"AWS_REGION": "eu-west-3", "AWS_PROFILE_NAME": "work"}, {"profile": "work"}),
        *(
            (
                {"model": "vertex_ai/gemini-2.5-flash", "vertex_project": "p-1"},
                {name: "europe-west4"},
                {"location": "europe-west4"},
            )
            for name in LOCATIONS
        ),
        ({"model": "vertex_ai/gemini-2.5-flash"}, {"VERTEXAI_PROJECT": "p-1"}, {"project": "p-1"}),
        (
            {"model": "vertex_ai/gemini-2.5-flash"},
            {"VERTEXAI_CREDENTIALS": "/keys/a.json"},
            {"credentials_env": "VERTEXAI_CREDENTIALS"},
        ),
        (
            {"model": "azure/x"},
            {"AZURE_API_BASE": "https://a.b", "AZURE_API_VERSION": "2025-01-01-preview"},
            {"api_version": "2025-01-01-preview"},
        ),
        # Forms in which LiteLLM wants an address.
        (
            {"model": "anthropic/x", "api_base": "https://a.b/v1/messages"},
            {},
            {"base_url": "https://a.b"},
        ),
        ({"model": "gemini/x", "api_base": "https://a.b/v1beta"}, {}, {"base_url": "https://a.b", "version": "v1beta"}),
        (
            {
                "model": "vertex_ai/gemini-2.5-flash",
                "vertex_credentials": "/k.json",
                "api_base": "https://a.b/v1beta1/",
            },
            {},
            {"base_url": "https://a.b", "version": "v1beta1"},
        ),
        ({"model": "mistral/x", "api_base": "https://a.b"}, {}, {"base_url": "https://a.b/v1"}),
        ({"model": "huggingface/x", "api_base": "https://a.b/"}, {}, {"base_url": "https://a.b/v1"}),
        (
            {"model": "docker_model_runner/x", "api_base": "http://a/engines/llama.cpp"},
            {},
            {"base_url": "http://a/engines/llama.cpp/v1"},
        ),
        ({"model": "databricks/x", "api_base": "https://a.b"}, {}, {"base_url": "https://a.b/serving-endpoints"}),
    ],
)
def test_regions_projects_and_forms_of_addresses(move, monkeypatch, entry, variables, made):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = move(entry)
    found = to_dict(provider(done))
    assert {name: found[name] for name in made} == made
    assert done.left == ()


@pytest.mark.parametrize("kind", OPENAI_FORM)
def test_what_speaks_openais_form_is_taken_where_an_entry_says_it_is(move, kind):
    done = move(entry_of(kind, api_base="https://own.example.com/v1", api_key="os.environ/K"))
    found = provider(done)
    assert (found.owner.kind, found.model, found.base_url, found.key_env) == (
        "openai",
        "x",
        "https://own.example.com/v1",
        "K",
    )
    assert done.left == ()


@pytest.mark.parametrize(
    ("entry", "made"),
    [
        (
            {
                "model": "azure_ai/Phi-4",
                "api_base": "https://x.services.ai.azure.com/models",
                "api_key": "os.environ/K",
            },
            {"kind": "azure", "base_url": "https://x.services.ai.azure.com", "api_version": "v1", "key_env": "K"},
        ),
        (
            {
                "model": "azure_ai/Phi-4",
                "api_base": "https://x.services.ai.azure.com/models/chat/completions?api-version=2024-05-01-preview",
            },
            {"kind": "azure", "base_url": "https://x.services.ai.azure.com", "key_env": "AZURE_AI_API_KEY"},
        ),
        (
            {"model": "azure_ai/x", "api_base": "https://x.eastus2.models.ai.azure.com/v1"},
            {"kind": "openai", "base_url": "https://x.eastus2.models.ai.azure.com/v1", "key_env": "AZURE_AI_API_KEY"},
        ),
        # A host that anybody may have there.
        (
            {"model": "azure_ai/x", "api_base": "https://x.eastus2.cloudapp.azure.com/v1"},
            {"kind": "openai", "key_env": None},
        ),
        (
            {"model": "azure_ai/x", "api_base": "https://a.b/v1"},
            {"kind": "openai", "base_url": "https://a.b/v1", "key_env": None},
        ),
    ],
)
def test_models_of_azures_that_are_not_openais(move, entry, made):
    found = to_dict(provider(move(entry)))
    assert {name: found[name] for name in made} == made


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"model": "hosted_vllm/x"}, "HOSTED_VLLM_API_BASE is not set now"),
        ({"model": "databricks/x"}, "DATABRICKS_API_BASE is not set now"),
        ({"model": "azure_ai/x"}, "AZURE_AI_API_BASE is not set now"),
        ({"model": "azure_ai/claude-sonnet-4-5", "api_base": "https://x.services.ai.azure.com"}, "Anthropic's form"),
        ({"model": "cohere/x", "api_base": "https://a.b"}, "even with an api_base"),
        ({"model": "bedrock/agent/A/B", "aws_region_name": "eu-west-3"}, "another API of it"),
        (
            {"model": "vertex_ai/gemini-2.5-flash", "vertex_project": "p-1", "api_base": "https://a.b/c"},
            "it has a path",
        ),
        ({"model": "bedrock/x"}, "neither AWS_REGION_NAME nor AWS_REGION is set"),
    ],
)
def test_what_could_answer_nothing_is_not_taken(move, entry, why):
    with pytest.raises(ConfigError, match=why):
        move(entry)


# The key

OWN = [
    (kind, place)
    for kind, place in KNOWN.items()
    if place.address and place.keys and kind not in ("azure", "bedrock", "vertex_ai")
]


@pytest.mark.parametrize(("kind", "place"), OWN)
def test_at_the_providers_own_address_its_key_is_kept(move, monkeypatch, kind, place):
    for more in ({}, {"api_base": place.address}, {"api_base": f"{place.address}/"}):
        assert provider(move(entry_of(kind, **more))).key_env == place.usual_key
    # Elsewhere it is not sent, which is told, since LiteLLM does.
    done = move(entry_of(kind, api_base="https://own.example.com"))
    assert provider(done).key_env is None
    assert any("here it is sent no key" in line and place.usual_key in line for line in done.notes)
    # A name that ends alike is not the provider's, nor is a line that anybody reads.
    for base in (f"https://not-{place.address.partition('//')[2]}", place.address.replace("https", "http")):
        assert provider(move(entry_of(kind, api_base=base))).key_env is None
    for name in reversed(place.keys):
        monkeypatch.setenv(name, "a-key")
        assert provider(move(entry_of(kind))).key_env == name


@pytest.mark.parametrize(("kind", "name"), BASES)
def test_an_address_and_a_key_of_one_environment_belong_together(move, monkeypatch, kind, name):
    place = KNOWN[kind]
    monkeypatch.setenv(name, "https://own.example.com")
    entries = [entry_of(kind), entry_of(kind, api_base=f"os.environ/{name}")]
    assert [getattr(provider(move(entry)), "key_env", None) for entry in entries] == [None, None]
    for key in place.keys[:1]:
        monkeypatch.setenv(key, "a-key")
        assert [provider(move(entry)).key_env for entry in entries] == [key, key]


@pytest.mark.parametrize("kind", ["hosted_vllm", "lm_studio", "llamafile", "litellm_proxy", "ollama"])
def test_a_server_of_ones_own_is_sent_the_key_that_is_named_for_it(move, monkeypatch, kind):
    entry = entry_of(kind, api_base="http://gpu:8000/v1")
    assert provider(move(entry)).key_env is None
    (name,) = KNOWN[kind].keys
    monkeypatch.setenv(name, "a-key")
    assert provider(move(entry)).key_env == name


def test_a_token_of_azures_of_the_environment(move, monkeypatch):
    monkeypatch.setenv("AZURE_AD_TOKEN", "token")
    entry = {"model": "azure/x", "api_base": "https://a.openai.azure.com"}
    # It is Azure's alone.
    elsewhere = move(entry | {"api_base": "https://a.b"})
    assert (provider(elsewhere).auth, provider(elsewhere).key_env) == ("key", None)
    assert (provider(move(entry)).auth, provider(move(entry)).key_env) == ("token", "AZURE_AD_TOKEN")
    monkeypatch.setenv("AZURE_API_KEY", "key")
    assert (provider(move(entry)).auth, provider(move(entry)).key_env) == ("key", "AZURE_API_KEY")


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"model": "anthropic/x"}, "ANTHROPIC_AUTH_TOKEN"),
        ({"model": "bedrock/x", "aws_region_name": "eu-west-3"}, "AWS_ROLE_NAME"),
    ],
)
def test_as_whom_litellm_signs_in_and_the_gateway_does_not_is_told(move, monkeypatch, entry, name):
    assert not any(name in line for line in move(entry).notes)
    monkeypatch.setenv(name, "hush")
    done = move(entry)
    assert any(name in line for line in done.notes)
    assert "hush" not in f"{done.notes}{to_dict(done.config)}"


@pytest.mark.parametrize("kind", OPENAI_FORM)
def test_each_has_a_key_by_its_name(kind):
    """Of one without, nothing would say that LiteLLM sends a key of the environment."""
    assert KNOWN[kind].keys


@pytest.mark.parametrize("word", sorted(NO_KEYS))
def test_a_word_that_stands_for_no_key_is_none(move, word):
    for model in ("hosted_vllm/x", "openai/x", "ollama/x"):
        done = move({"model": model, "api_base": "http://gpu:8000/v1", "api_key": word.upper()})
        assert (provider(done).key_env, done.left) == (None, ())
    # A provider's own wants one.
    done = move({"model": "openai/gpt-4o", "api_key": word})
    assert "is a key written into the file (not shown)" in done.left[0]


# What LiteLLM writes before the name of a model


@pytest.mark.parametrize(
    ("model", "made"),
    [
        ("azure/o_series/my-o3", {"model": "my-o3", "reasons": True}),
        ("azure/gpt5_series/mine", {"model": "mine", "reasons": True}),
        ("azure/x", {"model": "x", "reasons": None}),
        ("bedrock/converse/x.y", {"model": "x.y"}),
        ("bedrock_converse/x.y", {"model": "x.y"}),
        ("bedrock/chat_completions/x.y", {"model": "x.y"}),
        (
            "bedrock/llama/arn:aws:bedrock:eu-west-3:1:imported-model/x",
            {"model": "arn:aws:bedrock:eu-west-3:1:imported-model/x"},
        ),
    ],
)
def test_a_prefix_is_no_part_of_the_name(move, model, made):
    done = move(
        {"model": model, **({"api_base": "https://a.b"} if model[0] == "a" else {"aws_region_name": "eu-west-3"})}
    )
    found = to_dict(provider(done))
    assert {name: found[name] for name in made} == made
    assert done.left == ()


@pytest.mark.parametrize(
    ("entry", "info"),
    [
        ({"model": "openai/responses/gpt-5-pro"}, {}),
        ({"model": "openai/gpt-5-pro"}, {"mode": "responses"}),
        ({"model": "xai/responses/gpt-5-pro"}, {}),
        ({"model": "azure/responses/gpt-5-pro", "api_base": "https://a.b", "api_version": "2025-04-01-preview"}, {}),
    ],
)
def test_what_is_asked_by_the_responses_api_has_it_and_chats_are_told(move, entry, info):
    done = move(entry, info=info)
    found = provider(done)
    assert (found.model, found.responses) == ("gpt-5-pro", True)
    # Azure has it in its newer API alone.
    assert getattr(found, "api_version", "v1") == "v1"
    (line,) = done.left
    assert "litellm_params.model is asked by the Responses API there, chats too" in line
