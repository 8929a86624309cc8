"""Moving in from LiteLLM: which addresses are a provider's, and so are sent the key that the environment has for it."""

import functools

import pytest

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config.litellm_addresses import KNOWN
from gateway_litellm import clear, moved


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    clear(monkeypatch)


@pytest.fixture
def move(tmp_path):
    return functools.partial(moved, tmp_path)


def provider(done):
    return done.config.models[0].deployments[0].provider


RESOURCE = {"model": "azure/x"}
VERTEX = {"model": "vertex_ai/gemini-2.5-flash", "vertex_project": "p-1"}
SIGNED = {"model": "bedrock/x", "aws_region_name": "eu-west-3"}
PROVIDERS = [
    *(
        (RESOURCE, f"https://{host}")
        for host in (
            *("a.openai.azure.com", "a.privatelink.openai.azure.com", "a.services.ai.azure.com", "a.openai.azure.us"),
            *("a.cognitiveservices.azure.com", "eastus.api.cognitive.microsoft.com", "a.openai.azure.cn"),
        )
    ),
    *(
        ({"model": "azure_ai/x"}, f"https://{host}/v1/")
        for host in (
            *("Mistral-large-a-serverless.eastus2.inference.ai.azure.com", "a.eastus2.models.ai.azure.com"),
            *("a.eastus2.inference.ml.azure.com", "a.usgovvirginia.inference.ml.azure.us", "a.inference.ml.azure.cn"),
            *("a.services.ai.azure.us", "a.services.ai.azure.cn"),
        )
    ),
    *(
        ({"model": "databricks/x"}, f"https://{host}/serving-endpoints")
        for host in (
            *("dbc-a1b2-c3d4.cloud.databricks.com", "1.2.gcp.databricks.com", "dbc-a1.cloud.databricks.us"),
            *("adb-1.2.azuredatabricks.net", "adb-1.2.databricks.azure.us", "adb-1.2.databricks.azure.cn"),
        )
    ),
    *(
        (VERTEX, f"https://{host}")
        for host in (
            *("aiplatform.googleapis.com", "europe-west4-aiplatform.googleapis.com", "us-central1-x.p.googleapis.com"),
            *("aiplatform.eu.rep.googleapis.com", "1.us-central1-2.prediction.vertexai.goog"),
        )
    ),
    *(
        (SIGNED, f"https://{host}")
        for host in (
            *("bedrock-runtime.eu-west-3.amazonaws.com", "bedrock-runtime-fips.us-east-1.amazonaws.com"),
            *("bedrock-runtime.eu-west-3.api.aws", "bedrock-runtime.cn-north-1.amazonaws.com.cn"),
            "vpce-0a1-b2.bedrock-runtime.eu-west-3.vpce.amazonaws.com",
        )
    ),
    *(
        ({"model": f"{kind}/x"}, f"https://{host}/v1")
        for kind, host in (
            *(("moonshot", "api.moonshot.cn"), ("github", "models.github.ai"), ("zai", "open.bigmodel.cn")),
            *(("dashscope", "dashscope-intl.aliyuncs.com"), ("dashscope", "dashscope-us.aliyuncs.com")),
            *(("dashscope", "cn-hongkong.dashscope.aliyuncs.com"), ("dashscope", "w.eu-1.maas.aliyuncs.com")),
            *(("nebius", "api.tokenfactory.nebius.com"), ("nebius", "api.studio.nebius.com")),
            *(("volcengine", "ark.ap-southeast.bytepluses.com"), ("nvidia_nim", "ai.api.nvidia.com")),
            *(("openai", "eu.api.openai.com"), ("xai", "eu-west-1.api.x.ai"), ("huggingface", "router.huggingface.co")),
        )
    ),
]


def sent(done):
    """Whether a provider is sent a key; those of two clouds are always signed in at."""
    found = to_dict(provider(done))
    return found["kind"] in ("bedrock", "vertex") or found["key_env"] is not None


@pytest.mark.parametrize(("entry", "base"), PROVIDERS)
def test_a_providers_other_addresses_are_sent_its_key(move, monkeypatch, entry, base):
    keys = KNOWN[entry["model"].partition("/")[0]].keys
    for name in keys[:1]:
        monkeypatch.setenv(name, "a-key")
    # Those that always sign in would be left out.
    done = move(entry | {"api_base": base})
    assert sent(done)
    assert "here it is sent no key" not in "".join(done.notes)


@pytest.mark.parametrize(
    ("entry", "host"),
    [
        *((entry, "proxy.example.com") for entry in (RESOURCE, VERTEX, SIGNED)),
        # What anybody may have, or what but looks alike.
        *((RESOURCE, host) for host in ("a.azure-api.net", "a.cloudapp.azure.com", "openai.azure.com.example.com")),
        *(({"model": "azure_ai/x"}, host) for host in ("a.azure.com", "inference.ai.azure.com.a.b", "a.azure.us")),
        *(({"model": "databricks/x"}, host) for host in ("a.databricksapps.com", "a.azure.us", "notdatabricks.us")),
        *((VERTEX, host) for host in ("a.run.app", "not-googleapis.com", "googleapis.com.example.com")),
        *((SIGNED, host) for host in ("ec2-1.compute.amazonaws.com", "bedrock-runtime.eu-west-3.amazonaws.com.a.b")),
        *((SIGNED, f"{host}.eu-west-3.vpce.amazonaws.com") for host in ("vpce-1.vpce-svc-2", "bedrock-runtime.a")),
        ({"model": "dashscope/x"}, "mine.oss-cn-hangzhou.aliyuncs.com"),
        ({"model": "azure_ai/x"}, "a.b"),
        ({"model": "huggingface/x"}, "a.b"),
        ({"model": "databricks/x"}, "a.b"),
        ({"model": "baseten/x"}, "a.b"),
    ],
)
@pytest.mark.parametrize("is_set", [False, True])
def test_an_address_that_is_not_the_providers_is_sent_no_key_of_the_environment(move, monkeypatch, entry, host, is_set):
    kind = entry["model"].partition("/")[0]
    for name in (*KNOWN[kind].keys, "AZURE_AD_TOKEN", "VERTEXAI_CREDENTIALS", "AWS_PROFILE_NAME") if is_set else ():
        monkeypatch.setenv(name, "a-key")
    if kind in ("bedrock", "vertex_ai"):
        # Which always sign in.
        with pytest.raises(ConfigError, match=r"api_base is not .*here the entry has to say"):
            move(entry | {"api_base": f"https://{host}"})
        return
    done = move(entry | {"api_base": f"https://{host}"})
    assert not sent(done)
    assert any("which is not the provider's; here it is sent no key" in line for line in done.notes)


@pytest.mark.parametrize(
    ("entry", "made"),
    [
        (RESOURCE | {"api_key": "os.environ/K"}, {"key_env": "K"}),
        (RESOURCE | {"azure_ad_token": "os.environ/K"}, {"key_env": "K", "auth": "token"}),
        (VERTEX | {"vertex_credentials": "os.environ/K"}, {"credentials_env": "K"}),
        (SIGNED | {"api_key": "os.environ/K"}, {"key_env": "K"}),
        (SIGNED | {"aws_profile_name": "work"}, {"profile": "work"}),
    ],
)
def test_what_an_entry_says_itself_is_sent_where_it_says(move, entry, made):
    found = to_dict(provider(move(entry | {"api_base": "https://proxy.example.com"})))
    assert {name: found[name] for name in made} == made


@pytest.mark.parametrize(
    "entry",
    [
        SIGNED | {"api_key": "sk-hush"},
        VERTEX | {"vertex_credentials": '{"key": "hush"}'},
        SIGNED | {"aws_bedrock_runtime_endpoint": "https://proxy.example.com"},
    ],
)
def test_what_is_written_down_is_not_replaced_by_the_machines(move, entry):
    entry = entry if "aws_bedrock_runtime_endpoint" in entry else entry | {"api_base": "https://proxy.example.com"}
    with pytest.raises(ConfigError, match="here the entry has to say") as raised:
        move(entry)
    assert "hush" not in str(raised.value)
