"""Files of LiteLLM's for tests, in an environment that holds nothing of what LiteLLM reads."""

import yaml

from anabranch.gateway.config import import_litellm
from anabranch.gateway.config.litellm_addresses import KNOWN, LOCATIONS, PROJECTS, PROXIED, REGIONS, VERSIONS

READ = sorted(
    {
        *(name for place in KNOWN.values() for name in (*place.bases, *place.keys)),
        *(*REGIONS, *PROJECTS, *LOCATIONS, *VERSIONS, PROXIED),
        *("LITELLM_MASTER_KEY", "REQUEST_TIMEOUT", "AZURE_AD_TOKEN", "AWS_PROFILE_NAME", "VERTEXAI_CREDENTIALS"),
        *("GOOGLE_CLOUD_PROJECT", "ANTHROPIC_AUTH_TOKEN", "AWS_ROLE_NAME", "OWN"),
    }
)


def clear(monkeypatch):
    """Unset all that an import reads."""
    for name in READ:
        monkeypatch.delenv(name, raising=False)


def moved(tmp_path, *entries, info=None, **sections):
    """What models m0, m1, ... with these ``litellm_params`` become; ``info`` is their ``model_info``."""
    more = {} if info is None else {"model_info": info}
    models = [{"model_name": f"m{at}", "litellm_params": entry, **more} for at, entry in enumerate(entries)]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model_list": models, **sections}))
    return import_litellm(path)


def fields(lines, path):
    """The fields of lines of an import."""
    return [line.removeprefix(f"{path}:").partition(": ")[2].split()[0] for line in lines]
