"""Prompts that are too long, as providers say it; and what is quoted of a sender whose prompt is about such prompts."""

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.retry import ACTION
from anabranch.gateway.providers.provider import classify
from anabranch.gateway.providers.too_long import _KNOWN, LETTERS, says_too_long
from anabranch.gateway.providers.vocabulary import hint_of
from cloud_providers import keys, made

__all__ = ["keys"]


def google(message):
    return {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}


# Whole errors that say it by status, `code` or `type`.
IN_A_WORD = [
    ("OpenAI", 400, {"error": {"message": "m", "type": "invalid_request_error", "code": "context_length_exceeded"}}),
    ("Groq", 400, {"error": {"message": "m", "param": "messages", "code": "context_length_exceeded"}}),
    (
        "Groq",
        413,
        {"error": {"message": "Request too large for model", "type": "tokens", "code": "rate_limit_exceeded"}},
    ),
    ("Anthropic", 413, {"type": "error", "error": {"type": "request_too_large", "message": "m"}}),
    ("GitHub Models", 413, {"error": {"code": "tokens_limit_reached", "message": "Request body too large. Max: 8000"}}),
    ("Copilot", 400, {"error": {"message": "m", "code": "model_max_prompt_tokens_exceeded"}}),
    ("llama.cpp", 400, {"error": {"code": 400, "message": "m", "type": "exceed_context_size_error", "n_ctx": 4096}}),
    ("Z.AI", 400, {"error": {"code": "1261", "message": "Prompt 超长"}}),
    ("Cloudflare", 413, {"success": False, "errors": [{"code": 5021, "message": "m"}]}),
]

# What they say where they say it in words alone.
IN_WORDS = [
    ("OpenAI", "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens."),
    ("OpenAI", "This model's maximum context length has been exceeded. Please reduce the length of the messages."),
    ("OpenAI", "Your input exceeds the context window of this model. Please adjust your input and try again."),
    (
        "Azure",
        "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 509178 tokens. Please reduce the length of"
        " the messages.",
    ),
    (
        "DeepSeek",
        "This model's maximum context length is 131072 tokens. However, you requested 131134 tokens (122942 in the messages, 8192 in the"
        " completion). Please reduce the length of the messages or completion.",
    ),
    ("Anthropic", "prompt is too long: 208310 tokens > 200000 maximum"),
    ("Anthropic", "prompt is too long"),
    (
        "Anthropic",
        "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length or `max_tokens` and try again",
    ),
    ("Claude on Vertex", "Prompt is too long"),
    ("Gemini", "The input token count (1196265) exceeds the maximum number of tokens allowed (1048576)."),
    ("Gemini", "Input token count 9000 exceeds the maximum number of tokens allowed (8192)"),
    ("Gemini", "The input token count exceeds the maximum number of tokens allowed 1048576."),
    ("Gemini", "The input token count exceeds the maximum number of tokens allowed (1048576)."),
    (
        "Vertex",
        "Unable to submit request because the input token count is 1124680 but model only supports up to 1048576. Reduce the input token"
        " count and try again. You can also use the CountTokens API to calculate prompt token count and billable characters.",
    ),
    ("Bedrock", "Input is too long for requested model."),
    ("Claude on Bedrock", "The model returned the following errors: Input is too long for requested model."),
    (
        "Claude on Bedrock",
        "The model returned the following errors: prompt is too long: 212345 tokens > 200000 maximum",
    ),
    (
        "Claude on Bedrock",
        "The model returned the following errors: input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
    ),
    (
        "Nova",
        "Input Tokens Exceeded: Number of input tokens exceeds maximum length. Please update the input to try again.",
    ),
    ("Titan", "400 Bad Request: Too many input tokens. Max input tokens: 8192, request input token count: 9001"),
    (
        "Llama on Bedrock",
        "This model's maximum context length is 8192 tokens. Please reduce the length of the prompt",
    ),
    (
        "Cohere",
        "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 4567. Try using a shorter prompt, or enable"
        " prompt truncating.",
    ),
    ("Cohere", "too many tokens: total number of tokens (prompt and prediction) cannot exceed 2048 - received 6354."),
    (
        "Cohere",
        "too many tokens: size limit exceeded by 12345 tokens. Try using shorter or fewer inputs. The limit for this model is 132096"
        " tokens.",
    ),
    ("Cohere", "too many tokens: minimal context could not be added to prompt (size limit exceeded by 280 tokens)"),
    ("Cohere", "too many tokens: multi-hop prompt is too long even after truncation"),
    ("Cohere", "too many tokens: total tokens 9000 is over 8192"),
    (
        "Mistral",
        "Prompt contains 65673 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
    ),
    ("Groq", "Please reduce the length of the messages or completion."),
    ("Cerebras", "Please reduce the length of the messages or completion. Current length is 9001 while limit is 8192"),
    ("Cerebras", "Current length is 9001 while limit is 8192"),
    ("Together", "The input (516368 tokens) is longer than the model's context length (262144 tokens)."),
    (
        "Together",
        "Failed to start generation: The input token count (11) plus the requested output count (1048573) exceeds the model's maximum"
        " context length (1048576)",
    ),
    ("Fireworks", "The prompt is too long: 140000, model maximum context length: 131071"),
    ("xAI", "This model's maximum prompt length is 131072 but the request contains 537812 tokens."),
    ("Z.AI", "Prompt exceeds max length"),
    ("Z.AI", "Prompt too long"),
    ("MiniMax", "invalid params, context window exceeds limit (2013)"),
    ("Moonshot", "Invalid request: Your request exceeded model token limit: 262144 (requested: 269030)"),
    ("DashScope", "Range of input length should be [1, 30720]"),
    ("DashScope", "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 983616]"),
    (
        "OpenRouter",
        "This endpoint's maximum context length is 128000 tokens. However, you requested about 150000 tokens (149000 of text input, 1000"
        " in the output). Please reduce the length of either one.",
    ),
    ("Poolside", "Input length 131393 exceeds the maximum allowed input length of 131040 tokens."),
    ("DeepInfra", "Requested input length 140000 exceeds maximum input length 131072"),
    ("Volcengine", "Input length 203743 exceeds the maximum length 202752"),
    ("SiliconFlow", "length of prompt_tokens (57535) must be less than max_seq_len (32768)."),
    ("SiliconFlow", "max_total_tokens (33802) must be less than or equal to max_seq_len (32768)"),
    ("Perplexity", "The total length of all messages is too long."),
    ("GitHub Copilot", "prompt token count of 130000 exceeds the limit of 128000"),
    ("Databricks", "Bad request: prompt token count (9000) cannot exceed 8192."),
    (
        "Cloudflare",
        "3010: AiError: The estimated number of input and maximum output tokens (35000) exceeded this model context window limit (24000)",
    ),
    (
        "Meta and vLLM 0.14 to 0.17",
        "You passed 9001 input tokens and requested 1 output tokens. However, the model's context length is only 8192 tokens, resulting"
        " in a maximum input length of 8191 tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=9001)",
    ),
    (
        "vLLM 0.14 to 0.17",
        "You passed 74655 input characters and requested 32000 output tokens. However, the model's context length is only 32000 tokens,"
        " resulting in a maximum input length of 0 tokens (at most 0 characters).",
    ),
    (
        "vLLM 0.18",
        "This model's maximum context length is 8192 tokens. However, you requested 1024 output tokens and your prompt contains at least"
        " 7169 input tokens, for a total of at least 8193 tokens. Please reduce the length of the input prompt or the number of requested"
        " output tokens. (parameter=input_tokens, value=7169)",
    ),
    (
        "vLLM 0.11",
        "'max_tokens' or 'max_completion_tokens' is too large: 8000. This model's maximum context length is 4096 tokens and your request"
        " has 2778 input tokens (8000 > 4096 - 2778).",
    ),
    (
        "vLLM 0.7 to 0.11",
        "The decoder prompt (length 9001) is longer than the maximum model length of 8192. Make sure that `max_model_len` is no smaller"
        " than the number of text tokens.",
    ),
    (
        "vLLM's engine",
        "The decoder prompt (length 8192) plus the number of requested output tokens (at least 1) is longer than the maximum model length"
        " of 8192.",
    ),
    ("vLLM", "The prompt (total length 9001) is too long to fit into the model (context length 8192)."),
    ("vLLM 0.12", "Input length (9001) exceeds model's maximum context length (8192)."),
    ("llama.cpp", "request (9001 tokens) exceeds the available context size (8192 tokens), try increasing it"),
    ("llama.cpp", "the request exceeds the available context size, try increasing it"),
    ("llama.cpp", "input (9001 tokens) is larger than the max context size (8192 tokens). skipping"),
    ("llama.cpp", "input is larger than the max context size. skipping"),
    ("llama-cpp-python", "Requested tokens (2065) exceed context window of 1800"),
    ("Ollama", "the input length exceeds the context length"),
    ("Ollama", "input length exceeds maximum context length"),
    ("Ollama", "input after truncation exceeds maximum context length"),
    ("Ollama", "input length (40000 tokens) exceeds the model's maximum context length (32768 tokens)"),
    (
        "Ollama",
        "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the context length in"
        " settings, or use a model with a longer context length",
    ),
    ("Ollama's cloud", "prompt too long; exceeded max context length by 120 tokens"),
    (
        "LM Studio",
        "Trying to keep the first 9001 tokens when context the overflows. However, the model is loaded with context length of only 4096"
        " tokens, which is not enough.",
    ),
    (
        "LM Studio",
        "The number of tokens to keep from the initial prompt is greater than the context length (n_keep: 9001>= n_ctx: 4096). Try to load"
        " the model with a larger context length, or provide a shorter input",
    ),
    (
        "SGLang",
        "Requested token count exceeds the model's maximum context length of 64000 tokens. You requested a total of 71897 tokens: 7897"
        " tokens from the input messages and 64000 tokens for the completion.",
    ),
    ("SGLang", "The input (9001 tokens) is longer than the model's context length (8192 tokens)."),
    ("SGLang", "Input length (9001 tokens) exceeds the maximum allowed length (8192 tokens). Use a shorter input."),
    (
        "TGI",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193. Given: 9000 `inputs` tokens and 512 `max_new_tokens`",
    ),
    ("TGI", "Input validation error: `inputs` must have less than 8192 tokens. Given: 9000"),
    ("TensorRT-LLM", "Prompt length (5056) exceeds maximum sequence length (2048)"),
    ("TensorRT-LLM", "The sum of prompt length (9351.0), query length (0) should not exceed max_num_tokens (8192)"),
    ("DS4", "Prompt has 5,958,968 tokens, but the configured context size is 256,000 tokens"),
    (
        "LiteLLM",
        "litellm.ContextWindowExceededError: litellm._pre_call_checks: Context Window exceeded for given call. No models have context"
        " window large enough for this call.",
    ),
]
MESSAGES = [message for _, message in IN_WORDS]
# Those that say it without a number that they counted, and without words before it.
BARE = [message for message in MESSAGES if not re.search(r"\d|: |^invalid params, ", message)]

# Bodies: where the message stands.
BODIES = [
    lambda message: {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": 400}},
    lambda message: {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400},
    lambda message: {"error": message},
    lambda message: {"code": "Client specified an invalid argument", "error": message},
    lambda message: {"detail": message},
]
# Words of those who pass an error on, which they put before it.
PASSED_ON = [
    "litellm.BadRequestError: OpenAIException - %s. Received Model Group=m\nAvailable Model Group Fallbacks=None",
    "litellm.ContextWindowExceededError: litellm.BadRequestError: Hosted_vllmException - %s",
    'litellm.BadRequestError: OpenAIException - {"error":{"message":"%s","type":"BadRequestError","code":400}}',
    "An error occurred (ValidationException) when calling the Converse operation: %s",
    "Error code: 400 - {'error': {'message': \"%s\", 'type': None}}",
    "400 %s",
    "Provider returned error: %s",
    "bedrock error: %s",
    "litellm.BadRequestError: AzureException BadRequestError - %s",
    "Error code: 400 - {'message': '%s'}",
    'litellm.BadRequestError: BedrockException - {"message":"%s"}',
    "An error occurred (ValidationException) when calling Converse: %s",
    "InvokeModel: operation error Bedrock Runtime: InvokeModel, https response error StatusCode: 400, RequestID: 3a6d9c1e-0000"
    "-4000-8000-000000000000, ValidationException: %s",
    'POST "https://api.anthropic.com/v1/messages": 400 Bad Request {"type":"error","error":{"type":"invalid_request_error",'
    '"message":"%s"}}',
    'Failed to call Bedrock: ValidationException(ValidationException { message: Some("%s")',
    "%s (Service: BedrockRuntime, Status Code: 400, Request ID: 1)",
    "botocore.errorfactory.ValidationException: An error occurred (ValidationException) when calling the InvokeModel operation: %s",
    "Error processing Bedrock stream: The model returned the following errors: %s",
    "400 - %s",
    "Error streaming response: %s",
    "error, status code: 400, status: 400 Bad Request, message: %s",
    "HTTP 400: %s",
    'VertexAIException BadRequestError - b\'{"type":"error","request_id":"r","error":{"type":"invalid_request_error","message":"%s"}}\'',
    '{"error":{"code":400,"message":"%s","type":"invalid_request_error"}}',
    '{\n  "error": {\n    "code": 400,\n    "message": "%s"\n  }\n}',
    'Provider error: "{\\"error\\":{\\"message\\":\\"%s\\"}}"',
    '{"detail":"%s"}',
    "invalid request, %s",
    "ValidationException:%s",
    "BedrockException(Message=%s)",
    "the provider refused (%s)",
    '{"errorMessage":"%s"}',
]

# Of a sender: a prompt, a tool or a schema that is about prompts that are too long.
ABOUT = [
    "What is the maximum prompt length of Grok?",
    "explain: maximum context length",
    "my prompt is too long, shorten it",
    "my prompt is too long: 3 pages, shorten it",
    "tells whether the prompt token count of a text exceeds 100",
    "explain why a prompt is too long",
    "what does 'maximum context length' mean",
    "counts how many tokens exceed the context window",
    "too many tokens, too little time",
    "property 'context window' has no type",
    "truncates what exceeds the available context size",
    "the input is too long for me to read",
]
# How an upstream quotes it.
QUOTED = [
    "Invalid value: '%s'. Supported values are: 'auto'",
    "[{'type': 'string_type', 'loc': ('body', 'messages', 0), 'msg': 'Input should be a valid string', 'input': ['%s']}]",
    "Unknown tool 'count': description '%s' is no schema",
    "the description of a tool, %s, is no schema",
    "'%s' is not one of ['system', 'user']",
    "litellm.BadRequestError: OpenAIException - Invalid value: '%s'",
]
# Not in quotes. A whole sentence of a provider would be believed there.
BEHIND = ["tools.0.custom.input_schema: %s", "Invalid schema for function 'count': %s"]
MISTAKES = [
    "Invalid 'max_tokens': the maximum prompt length plus max_tokens is fine; use an integer",
    "`inputs` must have less than 4096 characters in `stop`",
    "`inputs` must be text",
    "the prompt token count is odd",
    "max_tokens: 9000 > 8192, which is the maximum allowed number of output tokens; maximum prompt length unaffected",
    "max_tokens is too large: 9000. This model supports at most 4096 completion tokens",
    "too many tokens: max tokens must be less than or equal to 4096, the maximum output for this model - received 8192.",
    "Range of max_tokens should be [1, 8192]",
    "Too many input images",
    "x" * LETTERS + " prompt is too long: 9000 tokens > 8192 maximum",
    "schema error: prompt too long is not an allowed property",
    "Validation error: prompt is too long is no valid name of a tool",
    "400 'prompt is too long' is no role",
    *(form % text for text in ABOUT for form in (*QUOTED, *BEHIND)),
    *(form % text for text in BARE for form in QUOTED),
]


def said(status, body):
    return classify(status, {}, json.dumps(body).encode())


@pytest.mark.parametrize(("provider", "status", "body"), IN_A_WORD)
def test_a_status_or_a_word_of_a_provider_says_it(provider, status, body):
    assert said(status, body).kind == "context"


@pytest.mark.parametrize(("provider", "message"), IN_WORDS)
def test_the_words_of_a_provider_say_it_in_whatever_form_they_come(provider, message):
    for body in BODIES:
        for status in (400, 422):
            failure = said(status, body(message))
            # It is held against nobody: a sender may have written it.
            assert (failure.kind, failure.cause) == ("request", "context")
            assert ACTION[failure.cause] == "fall_back"
    assert hint_of(500, message) is None


@pytest.mark.parametrize("message", MESSAGES)
def test_so_do_they_in_the_words_of_those_who_pass_them_on(message):
    for form in PASSED_ON:
        assert said(400, {"error": {"message": form % message, "type": None, "code": "400"}}).cause == "context", form


@given(st.sampled_from(MESSAGES), st.text(), st.sampled_from([" ", "\n", ". ", ": "]))
def test_so_do_they_before_whatever_is_quoted(message, quoted, between):
    assert says_too_long(message + between + quoted)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    "raw", [None, 7, [], {"error": 7}, {"error": {"message": 7}}, "[" * 9999, "\ud800", {"message": MESSAGES}]
)
def test_what_is_no_message_behind_openrouter_says_nothing(raw):
    body = {"error": {"code": 400, "message": "Provider returned error", "metadata": {"raw": raw, "error_type": 7}}}
    assert made("openrouter").error(400, {}, json.dumps(body).encode()).cause == "request"


@pytest.mark.parametrize("message", MISTAKES)
def test_an_error_that_quotes_a_prompt_about_prompts_does_not(message):
    assert hint_of(400, message) is None
    assert said(400, {"error": {"message": message, "type": "invalid_request_error"}}).cause == "request"


@given(st.sampled_from(BARE), st.sampled_from(QUOTED), st.text(f"{string.ascii_letters} ,.", min_size=1))
def test_nor_does_one_that_quotes_more(message, form, around):
    assert not says_too_long(form % (around + message))


@pytest.mark.parametrize("pattern", _KNOWN, ids=lambda pattern: pattern.pattern[-40:])
def test_each_sentence_that_is_known_is_one_that_a_provider_sends(pattern):
    assert any(pattern.search(message.lower()) for message in MESSAGES)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *(("gemini", google(message)) for provider, message in IN_WORDS if provider == "Gemini" and message[0] == "T"),
        *(("vertex", google(message)) for provider, message in IN_WORDS if provider == "Vertex"),
        *(
            ("bedrock", {"__type": "ValidationException", "message": message})
            for provider, message in IN_WORDS
            if provider in ("Bedrock", "Nova") or (provider == "Claude on Bedrock" and "maximum" in message)
        ),
        ("openrouter", {"error": {"code": 400, "message": "m", "metadata": {"error_type": "context_length_exceeded"}}}),
    ],
)
def test_a_whole_sentence_of_a_cloud_is_believed_like_a_word(kind, body):
    assert made(kind).error(400, {}, json.dumps(body).encode()).kind == "context"


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("message", MESSAGES)
def test_what_the_provider_behind_openrouter_says_counts(message):
    for raw in (message, BODIES[0](message), json.dumps(BODIES[2](message))):
        body = {"error": {"code": 400, "message": "Provider returned error", "metadata": {"raw": raw}}}
        failure = made("openrouter").error(400, {}, json.dumps(body).encode())
        assert (failure.kind, failure.cause) == ("request", "context")
