"""Which addresses make a stream, and bill it, to its end, whoever closes the connection."""

from urllib.parse import urlsplit

# "Not Currently Supported" on OpenRouter's page on stream cancellation (openrouter.ai/docs/api-reference/streaming), and OpenRouter
# itself, which passes streams on to them.
MAKE_ON = tuple(
    """
    openrouter.ai groq.com mistral.ai googleapis.com amazonaws.com amazonaws.com.cn perplexity.ai sambanova.ai ai21.com huggingface.co
    nebius.com nebius.ai minimax.io minimax.chat minimaxi.com aliyuncs.com featherless.ai replicate.com inference.net kluster.ai targon.com
    """.split()
)


def makes_on(base_url: str) -> bool:
    """Whether an address is one of these, or below one."""
    host = (urlsplit(base_url).hostname or "").rstrip(".")
    return any(host == one or host.endswith(f".{one}") for one in MAKE_ON)
