"""Moving in from LiteLLM: where it asks each provider, and with which key, when an entry does not say so.

Addresses, variables and their order are those that LiteLLM's code reads.
"""

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from anabranch.gateway.config.prices import PLACES

# What of an entry says where its provider is.
BASES = ("api_base", "base_url", "aws_bedrock_runtime_endpoint")


class Place(NamedTuple):
    """Where a provider is.

    Attributes:
        address: of the provider itself; None for what is nowhere by default, as a server of one's own.
        bases: variables that name another; the first that is set counts.
        keys: variables that may hold the key, likewise.
        key: the one that is meant where none of them is set; empty for the first.
        others: hosts that are the provider's too, with all below them.
        form: of hosts that are the provider's too, where others below the same name are anybody's.
    """

    address: str | None = None
    bases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    key: str = ""
    others: tuple[str, ...] = ()
    form: str = ""

    @property
    def is_anywhere(self) -> bool:
        """Whether it is no provider, but what people run themselves."""
        return self.address is None and not self.others

    @property
    def usual_key(self) -> str | None:
        """The variable of the key where none is set; None for what wants none."""
        return self.key or (self.keys[0] if self.keys else None)

    def is_at(self, url: str) -> bool:
        """Whether an address is the provider's own, and so may be sent its key."""
        parts = urlsplit(url)
        own = [urlsplit(self.address).hostname or ""] if self.address else []
        host = parts.hostname or ""
        is_below = any(host == one or host.endswith(f".{one}") for one in (*own, *self.others))
        return parts.scheme == "https" and (is_below or (self.form != "" and re.fullmatch(self.form, host) is not None))


def _usual(address: str | None, name: str) -> Place:
    """Of a provider whose variables are called after it."""
    return Place(address, (f"{name}_API_BASE",), (f"{name}_API_KEY",))


_OPENAI = Place("https://api.openai.com/v1", ("OPENAI_BASE_URL", "OPENAI_API_BASE"), ("OPENAI_API_KEY",))
_FEATHERLESS = ("FEATHERLESS_AI_API_BASE", "FEATHERLESS_API_BASE"), ("FEATHERLESS_AI_API_KEY", "FEATHERLESS_API_KEY")
_TOGETHER = ("TOGETHER_API_KEY", "TOGETHER_AI_API_KEY", "TOGETHERAI_API_KEY", "TOGETHER_AI_TOKEN")
_FIREWORKS = ("FIREWORKS_API_KEY", "FIREWORKS_AI_API_KEY", "FIREWORKSAI_API_KEY", "FIREWORKS_AI_TOKEN")

# Azure's own hosts for models; others of its hosts are anybody's.
_AZURES = (
    *("services.ai.azure.com", "models.ai.azure.com", "inference.ai.azure.com", "inference.ml.azure.com"),
    *("openai.azure.com", "cognitiveservices.azure.com", "api.cognitive.microsoft.com"),
    # Of governments, and of China.
    *("openai.azure.us", "cognitiveservices.azure.us", "api.cognitive.microsoft.us"),
    *("services.ai.azure.us", "inference.ml.azure.us"),
    *("openai.azure.cn", "cognitiveservices.azure.cn", "api.cognitive.azure.cn"),
    *("services.ai.azure.cn", "inference.ml.azure.cn"),
)
# Of workspaces at Amazon and Google, and at Azure.
_DATABRICKS = (
    *("databricks.com", "databricks.us"),
    *("azuredatabricks.net", "databricks.azure.us", "databricks.azure.cn"),
)
# Others of Amazon's hosts are anybody's.
_BEDROCKS = r"(vpce-[a-z0-9-]+\.)?bedrock-runtime(-fips)?\.[a-z0-9-]+\.(vpce\.)?(amazonaws\.com(\.cn)?|api\.aws)"
# One host for each region, and one for each workspace.
_DASHSCOPES = ("dashscope-intl.aliyuncs.com", "dashscope-us.aliyuncs.com", "maas.aliyuncs.com")
_NEBIUS = (
    *("api.studio.nebius.com", "api.tokenfactory.nebius.com"),
    *("api.tokenfactory.eu-west1.nebius.com", "api.tokenfactory.us-central1.nebius.com"),
)

# What speaks OpenAI's API.
OPENAI_FORM: dict[str, Place] = {
    "openai": _OPENAI,
    "text-completion-openai": _OPENAI,
    "custom_openai": _OPENAI,
    "aiml": _usual("https://api.aimlapi.com/v1", "AIML"),
    "aiohttp_openai": _OPENAI,
    "anyscale": _usual("https://api.endpoints.anyscale.com/v1", "ANYSCALE"),
    # Elsewhere for each model, so that an entry has to say where.
    "baseten": Place(None, (), ("BASETEN_API_KEY",), others=("baseten.co",)),
    "cerebras": _usual("https://api.cerebras.ai/v1", "CEREBRAS"),
    "chutes": Place("https://llm.chutes.ai/v1", (), ("CHUTES_API_KEY",)),
    "clarifai": Place("https://api.clarifai.com/v2/ext/openai/v1", (), ("CLARIFAI_API_KEY",)),
    "codestral": _usual("https://codestral.mistral.ai/v1", "CODESTRAL"),
    "cometapi": Place("https://api.cometapi.com/v1", ("COMETAPI_API_BASE",), ("COMETAPI_KEY",)),
    "dashscope": _usual("https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE")._replace(others=_DASHSCOPES),
    "databricks": _usual(None, "DATABRICKS")._replace(others=_DATABRICKS),
    "deepinfra": _usual("https://api.deepinfra.com/v1/openai", "DEEPINFRA"),
    "deepseek": _usual("https://api.deepseek.com/v1", "DEEPSEEK"),
    "docker_model_runner": _usual(None, "DOCKER_MODEL_RUNNER"),
    "empower": _usual("https://app.empower.dev/api/v1", "EMPOWER"),
    "featherless_ai": Place("https://api.featherless.ai/v1", *_FEATHERLESS),
    "fireworks_ai": Place("https://api.fireworks.ai/inference/v1", ("FIREWORKS_API_BASE",), _FIREWORKS),
    "friendliai": Place(
        "https://api.friendli.ai/serverless/v1", ("FRIENDLI_API_BASE",), ("FRIENDLIAI_API_KEY", "FRIENDLI_TOKEN")
    ),
    "galadriel": _usual("https://api.galadriel.com/v1", "GALADRIEL"),
    "github": _usual("https://models.inference.ai.azure.com", "GITHUB")._replace(others=("models.github.ai",)),
    "groq": _usual("https://api.groq.com/openai/v1", "GROQ"),
    "helicone": Place("https://ai-gateway.helicone.ai", (), ("HELICONE_API_KEY",)),
    "hosted_vllm": _usual(None, "HOSTED_VLLM"),
    "huggingface": Place(
        None,
        ("HF_API_BASE", "HUGGINGFACE_API_BASE"),
        ("HUGGINGFACE_API_KEY",),
        others=("huggingface.co", "huggingface.cloud"),
    ),
    "hyperbolic": _usual("https://api.hyperbolic.xyz/v1", "HYPERBOLIC"),
    "inception": _usual("https://api.inceptionlabs.ai/v1", "INCEPTION"),
    "lambda_ai": _usual("https://api.lambda.ai/v1", "LAMBDA"),
    "lemonade": _usual(None, "LEMONADE"),
    "litellm_proxy": _usual(None, "LITELLM_PROXY"),
    "llamafile": _usual(None, "LLAMAFILE"),
    "lm_studio": _usual(None, "LM_STUDIO"),
    "meta_llama": _usual("https://api.llama.com/compat/v1", "LLAMA"),
    # The second is documented; what asks chats reads the first.
    "mistral": Place(
        "https://api.mistral.ai/v1",
        ("MISTRAL_AZURE_API_BASE", "MISTRAL_API_BASE"),
        ("MISTRAL_AZURE_API_KEY", "MISTRAL_API_KEY"),
        "MISTRAL_API_KEY",
    ),
    "modelscope": _usual("https://api-inference.modelscope.cn/v1", "MODELSCOPE"),
    "moonshot": _usual("https://api.moonshot.ai/v1", "MOONSHOT")._replace(others=("api.moonshot.cn",)),
    "morph": _usual("https://api.morphllm.com/v1", "MORPH"),
    "nano-gpt": Place("https://nano-gpt.com/api/v1", (), ("NANOGPT_API_KEY",)),
    "nebius": _usual("https://api.studio.nebius.ai/v1", "NEBIUS")._replace(others=_NEBIUS),
    "novita": _usual("https://api.novita.ai/v3/openai", "NOVITA"),
    "nscale": _usual("https://inference.api.nscale.com/v1", "NSCALE"),
    "nvidia_nim": _usual("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM")._replace(others=("ai.api.nvidia.com",)),
    "openai_like": _usual(None, "OPENAI_LIKE"),
    "ovhcloud": _usual("https://oai.endpoints.kepler.ai.cloud.ovh.net/v1", "OVHCLOUD"),
    "parasail": _usual("https://api.parasail.io/v1", "PARASAIL"),
    "perplexity": Place(
        "https://api.perplexity.ai", ("PERPLEXITY_API_BASE",), ("PERPLEXITYAI_API_KEY", "PERPLEXITY_API_KEY")
    ),
    "poe": Place("https://api.poe.com/v1", (), ("POE_API_KEY",)),
    "publicai": _usual("https://api.publicai.co/v1", "PUBLICAI"),
    "sambanova": _usual("https://api.sambanova.ai/v1", "SAMBANOVA"),
    "scaleway": Place("https://api.scaleway.ai/v1", (), ("SCW_SECRET_KEY",)),
    "synthetic": Place("https://api.synthetic.new/openai/v1", (), ("SYNTHETIC_API_KEY",)),
    "together_ai": Place(
        "https://api.together.xyz/v1", ("TOGETHER_AI_API_BASE",), _TOGETHER, "TOGETHERAI_API_KEY", ("api.together.ai",)
    ),
    "v0": _usual("https://api.v0.dev/v1", "V0"),
    "veniceai": Place("https://api.venice.ai/api/v1", (), ("VENICE_AI_API_KEY",)),
    "vercel_ai_gateway": _usual("https://ai-gateway.vercel.sh/v1", "VERCEL_AI_GATEWAY"),
    "volcengine": _usual("https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE")._replace(
        others=("ark.ap-southeast.bytepluses.com", "ark.eu-west.bytepluses.com")
    ),
    "wandb": _usual("https://api.inference.wandb.ai/v1", "WANDB"),
    "xai": _usual("https://api.x.ai/v1", "XAI"),
    "xinference": _usual(None, "XINFERENCE"),
    "zai": _usual("https://api.z.ai/api/paas/v4", "ZAI")._replace(others=("open.bigmodel.cn",)),
}
# Of the others; the address of a cloud's is for the price list, since theirs is the resource's or the region's.
OTHERS: dict[str, Place] = {
    "anthropic": Place(
        "https://api.anthropic.com", ("ANTHROPIC_API_BASE", "ANTHROPIC_BASE_URL"), ("ANTHROPIC_API_KEY",)
    ),
    "azure": Place(
        "https://any.openai.azure.com",
        ("AZURE_API_BASE",),
        ("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
        "AZURE_API_KEY",
        _AZURES,
    ),
    "azure_ai": _usual(None, "AZURE_AI")._replace(others=_AZURES),
    "bedrock": Place(PLACES["bedrock"], ("AWS_BEDROCK_RUNTIME_ENDPOINT",), form=_BEDROCKS),
    "gemini": Place(
        "https://generativelanguage.googleapis.com",
        ("GEMINI_API_BASE",),
        ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
        "GEMINI_API_KEY",
    ),
    "ollama": _usual(None, "OLLAMA"),
    "openrouter": Place("https://openrouter.ai/api/v1", ("OPENROUTER_API_BASE",), ("OPENROUTER_API_KEY", "OR_API_KEY")),
    "vertex_ai": Place(
        PLACES["vertex"],
        ("VERTEXAI_API_BASE", "VERTEX_API_BASE"),
        others=("googleapis.com", "prediction.vertexai.goog"),
    ),
}
# The same by every name.
KNOWN = {**OPENAI_FORM, **OTHERS}
# Regions and the like, by the variables that LiteLLM reads, the first that is set.
REGIONS = ("AWS_REGION_NAME", "AWS_REGION", "AWS_DEFAULT_REGION")
PROJECTS = ("VERTEXAI_PROJECT",)
LOCATIONS = ("VERTEXAI_LOCATION", "VERTEX_LOCATION")
VERSIONS = ("AZURE_API_VERSION",)
# Whether all is asked of another LiteLLM.
PROXIED = "USE_LITELLM_PROXY"
# Of Vertex, what LiteLLM reads under a second name where the first says nothing.
SECOND_NAMES = {
    "vertex_project": "vertex_ai_project",
    "vertex_location": "vertex_ai_location",
    "vertex_credentials": "vertex_ai_credentials",
}
# What people write where a server wants no key and a client insists on one.
NO_KEYS = frozenset(
    {
        *("", "-", "x", "xx", "xxx", "xxxx", "none", "null", "no", "na", "n/a", "empty", "anything", "any", "local"),
        *("dummy", "dummy-key", "dummy_key", "fake", "fake-key", "fake_key", "fake-api-key", "sk-fake", "sk-dummy"),
        *("no-key", "no-key-needed", "no-key-required", "sk-no-key-required", "not-needed", "not-required", "unused"),
        *("ignored", "placeholder", "test", "ollama", "vllm", "lm-studio", "lmstudio", "lemonade", "llamafile", "noop"),
    }
)


def is_no_key(value: str) -> bool:
    """Whether what stands for a key is none."""
    return value.strip().lower() in NO_KEYS
