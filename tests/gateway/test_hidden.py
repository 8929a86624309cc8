"""Which models may think what they do not show: those that are said to, those that are asked to, and those of which nobody knows."""

from types import SimpleNamespace

import pytest

from anabranch.gateway.dispatch.hidden import asks_media, may_hide, may_think
from anabranch.gateway.providers.provider import Usage

SHOW = """
gpt-4o gpt-4o-mini-2024-07-18 gpt-4.1 gpt-4.1-nano gpt-4-turbo gpt-4-0613 gpt-4 gpt-3.5-turbo gpt-35-turbo chatgpt-4o-latest
ft:gpt-4o-mini:org::1 openai/gpt-4o claude-3-5-sonnet-20241022 claude-3-opus-20240229 claude-3-7-sonnet-latest claude-2.1
claude-sonnet-4-20250514 claude-opus-4-1 claude-haiku-4-5-20251001 us.anthropic.claude-sonnet-4-20250514-v1:0
anthropic.claude-v2 anthropic/claude-3.5-haiku gemini-1.5-pro gemini-2.0-flash models/gemini-2.0-flash-001 gemma-3-27b-it gemma2:9b
meta-llama/Llama-3.3-70B-Instruct meta.llama3-1-70b-instruct-v1:0 llama2 codellama-7b mistral-large-latest open-mixtral-8x22b
ministral-8b codestral-latest command-r-plus command-a-03-2025 deepseek-chat deepseek-v3 deepseek-ai/DeepSeek-V3-0324
qwen2.5-72b-instruct Qwen/Qwen2.5-7B phi-3-mini amazon.nova-lite-v1:0 grok-2 grok-3 HuggingFaceTB/SmolLM2-135M
""".split()
MAY = """
o1 o3-mini o4-mini-deep-research gpt-5 gpt-5-mini openai/gpt-5.1 gpt-oss-120b claude-opus-5 claude-sonnet-5-1 gemini-2.5-flash
gemini-3-pro gemini-2.0-flash-thinking-exp deepseek-r1 deepseek-reasoner deepseek-v3.1 deepseek-r1-distill-llama-70b qwq-32b
qwen3-30b-a3b magistral-medium grok-3-mini grok-4-fast-reasoning grok-code-fast-1 glm-4.6 kimi-k2-thinking phi-4-reasoning
command-a-reasoning-08-2025 olmo-3-32b-think llama-3.3-nemotron-super-49b-v1 gemma-4 smollm3-3b llama-5 nova-2-lite qwen-max
sonar-pro prod my-model m o-3 x gpt-45 claude-40 llama-33
""".split()


@pytest.mark.parametrize("model", SHOW)
def test_these_show_what_they_make(model):
    assert not may_think({}, model)


@pytest.mark.parametrize("model", [*MAY, ""])
def test_of_all_others_nobody_knows_that(model):
    assert may_think({}, model)


def test_what_the_config_says_is_believed():
    assert may_think({}, "gpt-4o", thinks=True)
    assert not may_think({}, "o3", thinks=False)
    assert may_think({}, "gpt-4o", is_openais=True)
    # It is none of OpenAI's: which one it is, that does not say.
    assert may_think({}, "prod", is_openais=False)
    assert not may_think({}, "gpt-4o", is_openais=False)


@pytest.mark.parametrize(
    ("asked", "thinks"),
    [
        ({"reasoning_effort": "low"}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, True),
        ({"reasoning": {"effort": "high"}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"generationConfig": {"thinkingConfig": {"thinkingBudget": 9}}}, True),
        ({"extra_body": {"reasoning_effort": "low"}}, True),
        ({"output_config": {"thinking": "on"}}, True),
        ({"extra_body": {"temperature": 1}, "output_config": {"effort": "low"}}, False),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "none", "enable_thinking": False}, False),
        ({"temperature": 1}, False),
    ],
)
def test_who_asks_for_thoughts_may_be_given_them(asked, thinks):
    assert may_think(asked, "gpt-4o", thinks=False) is thinks


@pytest.mark.parametrize(
    ("config", "thinks", "answers", "most", "hides"),
    [
        ({"model": "gpt-4o"}, None, 1, Usage(), False),
        ({"model": "gpt-4o"}, True, 1, Usage(), True),
        ({"model": "gpt-4o"}, None, 2, Usage(), True),
        ({"model": "gpt-4o"}, None, 1, Usage(pages=9), True),
        ({"model": "gpt-4o", "reasons": True}, None, 1, Usage(), True),
        ({"model": "o3", "reasons": False}, None, 1, Usage(), True),
        ({"model": None}, None, 1, Usage(), True),
        ({}, False, 1, Usage(), False),
    ],
)
def test_what_hides_some_of_what_it_makes(config, thinks, answers, most, hides):
    provider = SimpleNamespace(config=SimpleNamespace(**config))
    live = SimpleNamespace(provider=provider, deployment=SimpleNamespace(thinks=thinks))
    assert may_hide(live, {}, most, answers) is hides


@pytest.mark.parametrize(
    ("asked", "hides"),
    [
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "db"}]}, True),
        ({"tools": [{"type": "function"}, {"type": "code_execution_20250825"}]}, True),
        ({"tools": [{"type": "mcp", "server_label": "db"}]}, True),
        ({"tools": [{"type": 7}]}, True),
        ({"mcp_servers": [{"type": "url"}]}, True),
        ({"web_search_options": {}}, True),
        ({"echo": True}, True),
        (
            {"tools": [{"type": "function"}, {"type": "custom"}, {"name": "f", "input_schema": {}}, {"type": None}, 7]},
            False,
        ),
        ({"tools": None, "mcp_servers": [], "web_search_options": None, "echo": False}, False),
        ({"tools": "x"}, False),
    ],
)
def test_whose_tools_run_elsewhere_hides_what_they_are_told(asked, hides):
    """S5 of R20c: only searches did."""
    provider = SimpleNamespace(config=SimpleNamespace(model="gpt-4o"))
    live = SimpleNamespace(provider=provider, deployment=SimpleNamespace(thinks=None))
    assert may_hide(live, asked, Usage(), 1) is hides


def test_sound_and_pictures_are_asked_for():
    assert asks_media({"modalities": ["text", "audio"]})
    assert not asks_media({"modalities": ["text"]})
    assert not asks_media({"modalities": "audio"})
