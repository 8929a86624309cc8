"""How providers say that a prompt is too long, where neither status, ``code`` nor ``type`` says it.

A sentence is known by the numbers that a provider puts into it, wherever it stands, and one without numbers where a message may begin:
those who pass errors on put words, statuses and bodies before it, each their own. Errors also quote what a sender wrote, mostly in quotes
or in the midst of a sentence, where it does not count. A sender who is believed all the same has one further model asked, no more.
"""

import re

# So much of a message is looked at: what providers say comes first, what they quote after.
LETTERS = 400

# All sentences are in small letters, as what is looked at is made: that is found several times faster than either case.
# With the numbers that the provider counted. Gateways put words of their own before them, so these may stand anywhere.
_COUNTED = (
    # OpenAI, Azure, DeepSeek, OpenRouter, Fireworks, Databricks, vLLM, llama-cpp-python, SGLang, Llama on Bedrock
    r"maximum context length(?: is| of|:) \d",
    # OpenAI and Azure, GPT-5
    r"input tokens exceed the configured limit of \d",
    # Anthropic, also on Bedrock and Vertex
    r"prompt is too long: \d+ tokens > \d",
    r"input length and `?max_tokens`? exceed context limit: \d",
    # Mistral, also on Bedrock
    r"too large for model with \d+ maximum context length",
    # Gemini
    r"input token count exceeds the maximum number of tokens allowed \(?\d",
    # Vertex
    r"input token count is \d+ but model only supports up to \d",
    # Gemini, Databricks, GitHub Copilot
    r"(?:input|prompt) token count (?:of )?\(?\d+\)? (?:exceeds|cannot exceed)",
    # vLLM 0.14 to 0.17, Meta, LM Studio
    r"context length (?:is|of) only \d",
    # vLLM before that
    r"prompt \((?:total )?length \d+\) .{0,80}(?:longer than the maximum model length of \d|too long to fit into the model)",
    # vLLM, SGLang, Together, llama.cpp, llama-cpp-python, Ollama, Cloudflare
    r"(?:exceed(?:s|ed)?|longer than|larger than|too (?:large|long) for) .{0,40}context (?:window|length|size|limit)\D{0,10}\d",
    # SGLang's scheduler
    r"input length \(\d+ tokens\) exceeds the maximum allowed length \(\d",
    # Baseten, Poolside
    r"input length \d+ exceeds the maximum allowed input length of \d",
    # DeepInfra
    r"input length \d+ exceeds maximum input length \d",
    # Volcengine
    r"input length \d+ exceeds the maximum length \d",
    # TensorRT-LLM
    r"prompt length \(\d+\) exceeds maximum (?:input|sequence) length \(\d",
    r"sum of prompt length \([\d.]+\), query length \([\d.]+\) should not exceed max_num_tokens \(\d",
    # TGI, Together
    r"`inputs` (?:tokens \+ `max_new_tokens` must be <= \d|must have less than \d+ tokens)",
    # Titan on Bedrock
    r"too many input tokens\. max input tokens: \d",
    # Cohere; its "max tokens must be less than" is about the answer
    r"too many tokens: (?:total|size limit|minimal context)\D{0,60}\d",
    # xAI
    r"maximum prompt length is \d",
    # Cerebras
    r"current length is \d+ while limit is \d",
    # Moonshot
    r"request exceeded model token limit: \d",
    # DashScope
    r"range of input length should be \[\d",
    # SiliconFlow
    r"length of prompt_tokens \(\d+\) must be less than max_seq_len \(\d",
    r"max_total_tokens \(\d+\) must be less than or equal to max_seq_len \(\d",
    # DS4
    r"prompt has [\d,]+ tokens?, but the configured context size is \d",
)

# Without numbers: where a message may begin.
_BARE = (
    # OpenAI's Responses
    r"your input exceeds the context window of this model",
    r"this model's maximum context length has been exceeded",
    # Anthropic, Vertex
    r"(?:the )?prompt is too long(?! is\b)\b",
    # Bedrock
    r"input is too long for requested model",
    # Nova on Bedrock
    r"input tokens exceeded: number of input tokens exceeds maximum length",
    # Cohere
    r"too many tokens: multi-hop prompt is too long",
    # llama.cpp
    r"(?:the )?request exceeds the available context size",
    r"input is larger than the max context size",
    # Ollama
    r"(?:the )?(?:input|prompt)(?: length| after truncation)? exceeds (?:the )?(?:maximum )?context length",
    r"the prompt is longer than the context length currently available to the model",
    # LM Studio
    r"(?:the number of )?tokens to keep from the initial prompt is greater than the context length",
    # MiniMax
    r"context window exceeds limit",
    # Z.AI, also Ollama's cloud
    r"prompt (?:exceeds max length|too long(?! is\b)\b|超长)",
    # Groq, Cerebras
    r"please reduce the length of the messages or completion",
    # Perplexity
    r"the total length of all messages is too long",
    # LiteLLM, which knows the words of others
    r"litellm\.contextwindowexceedederror\b",
)

# Where that is: at the beginning, or behind what ends the words of whoever passes it on.
_BEGINS = "|".join(
    (
        r"\A|\n",
        # OpenAIException: ..., AnthropicError - ..., Message=..., (ValidationException) when calling the Converse operation: ...
        r"[:=(] ?|[-\]] ",
        # 400 ..., invalid params, ...
        r"\b[45]\d\d |invalid (?:params|request), ",
        # A field of a body, which may be text in a field of another; as Python or Rust write it, too
        r"""(?:message|error|detail|reason)\\*['"]?: ?(?:some\()?\\*['"]""",
    )
)

_KNOWN = (
    *map(re.compile, _COUNTED),
    *(re.compile(rf"(?:{_BEGINS}){sentence}") for sentence in _BARE),
)


def says_too_long(message: str) -> bool:
    """Whether a provider says in the first `LETTERS` of ``message`` that the prompt is too long for its model."""
    said = message[:LETTERS].lower()
    return any(pattern.search(said) for pattern in _KNOWN)
