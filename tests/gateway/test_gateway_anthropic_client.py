"""The official ``anthropic`` and ``openai`` clients through a real gateway, on recorded conversations of both their APIs."""

import json

import pytest

from gateway_process import served
from recorded_conversations import KEY, exchanges, played

anthropic, openai = pytest.importorskip("anthropic"), pytest.importorskip("openai")
MARK = {"type": "ephemeral"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
ASKED = {
    "max_tokens": 2048,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": MARK}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "What is the weather here?"}, PICTURE]}],
    "tools": [{"name": "weather", "description": "Of today.", "input_schema": SCHEMA}],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}
CHAT = {
    "max_tokens": 2048,
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": MARK}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is the weather here?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            ],
        },
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "Of today.", "parameters": SCHEMA}}],
    "reasoning_effort": "medium",
}
THOUGHT = "The picture shows Ghent. I ask the tool."


@pytest.fixture(scope="module")
def upstream():
    with played(exchanges("anthropic"), exchanges("openai")) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(upstream, tmp_path_factory):
    path = tmp_path_factory.mktemp("gateway") / "gateway.json"
    claude = {"kind": "anthropic", "model": "claude-sonnet-4-5-20250929", "base_url": upstream.url}
    gpt = {"kind": "openai", "model": "gpt-5.1", "base_url": f"{upstream.url}/openai/v1", "responses": True}
    models = [{"name": name, "deployments": [{"provider": one}]} for name, one in (("claude", claude), ("gpt", gpt))]
    fields = {
        "retries": {"attempts": 1},
        "cache": {"exact": False},
        "store": str(path.with_name("gateway.db")),
        "require_key": False,
    }
    path.write_text(json.dumps({"models": models, **fields}))
    with served("--config", str(path), environment={"ANTHROPIC_API_KEY": KEY, "OPENAI_API_KEY": KEY}) as running:
        yield running


@pytest.fixture
def messages(gateway, upstream):
    with anthropic.Anthropic(base_url=gateway.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client.messages
    assert upstream.faults == []


@pytest.fixture
def chats(gateway, upstream):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client.chat.completions
    assert upstream.faults == []


@pytest.fixture
def responses(gateway, upstream):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client.responses
    assert upstream.faults == []


def final(messages, is_streamed, model):
    if not is_streamed:
        return messages.create(model=model, **ASKED)
    with messages.stream(model=model, **ASKED) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_claude_asked_in_its_own_form_loses_nothing(messages, is_streamed):
    found = final(messages, is_streamed, "claude")
    kinds = ["thinking", "redacted_thinking", "text", "tool_use"]
    assert ([block.type for block in found.content], found.id) == (kinds, "msg_01Aq9w938a90dw8q")
    assert (found.content[0].thinking, found.content[0].signature[:5]) == (THOUGHT, "EqQBC")
    assert (found.content[3].input, found.stop_reason) == ({"city": "Ghent"}, "tool_use")
    usage = found.usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.output_tokens) == (472, 1200, 89)
    assert (usage.cache_creation.ephemeral_5m_input_tokens, usage.service_tier) == (1200, "standard")
    # What it thought goes back with the result: the upstream knows this turn only if it is whole.
    result = {
        "type": "tool_result",
        "tool_use_id": found.content[3].id,
        "content": [{"type": "text", "text": "Rain."}, PICTURE],
    }
    said = [block.to_dict() for block in found.content]
    said = [
        {name: value for name, value in block.items() if value is not None and name != "citations"} for block in said
    ]
    turns = [*ASKED["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    answer = messages.create(model="claude", **{**ASKED, "messages": turns})
    assert (answer.content[0].text, answer.usage.cache_read_input_tokens) == ("It rains in Ghent.", 1672)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_claude_asked_by_openais_client_thinks_on_through_a_tools_turn(chats, is_streamed):
    if is_streamed:
        message = {"role": "assistant", "content": "", "thinking_blocks": [], "tool_calls": []}
        for chunk in chats.create(model="claude", stream=True, stream_options={"include_usage": True}, **CHAT):
            usage = chunk.usage
            for choice in chunk.choices:
                reason, delta = choice.finish_reason, choice.delta.to_dict()
                message["content"] += delta.get("content") or ""
                message["thinking_blocks"] += delta.get("thinking_blocks") or []
                for call in delta.get("tool_calls") or []:
                    if "id" in call:
                        message["tool_calls"].append(
                            {"id": call["id"], "type": "function", "function": dict(call["function"])}
                        )
                    else:
                        message["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]
    else:
        answer = chats.create(model="claude", **CHAT)
        usage, reason, message = answer.usage, answer.choices[0].finish_reason, answer.choices[0].message.to_dict()
        assert message["reasoning_content"] == THOUGHT
    assert (message["content"], reason, usage.prompt_tokens, usage.completion_tokens) == (
        "I look it up.",
        "tool_calls",
        1672,
        89,
    )
    [call] = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Ghent"}
    shown = [{"type": "text", "text": "Rain."}, CHAT["messages"][1]["content"][1]]
    turns = [*CHAT["messages"], message, {"role": "tool", "tool_call_id": call["id"], "content": shown}]
    assert (
        chats.create(model="claude", **{**CHAT, "messages": turns}).choices[0].message.content == "It rains in Ghent."
    )


def test_claude_answers_in_a_schema(chats):
    form = {
        "type": "json_schema",
        "json_schema": {"name": "place", "schema": {**SCHEMA, "additionalProperties": False}},
    }
    asked = [{"role": "user", "content": "Which city is it?"}]
    answer = chats.create(model="claude", max_tokens=64, messages=asked, response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"city": "Ghent"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_another_model_asked_in_anthropics_form(messages, is_streamed):
    found = final(messages, is_streamed, "gpt")
    [call] = found.content
    assert (call.type, call.name, call.input, found.stop_reason) == (
        "tool_use",
        "weather",
        {"city": "Ghent"},
        "tool_use",
    )
    assert (found.usage.input_tokens, found.usage.cache_read_input_tokens, found.usage.output_tokens) == (18, 64, 17)
    said = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
    turns = [*ASKED["messages"], {"role": "assistant", "content": [said]}, {"role": "user", "content": [result]}]
    answer = messages.create(model="gpt", **{**ASKED, "messages": turns})
    assert (answer.content[0].text, answer.stop_reason) == ("It rains in Ghent.", "end_turn")


def test_errors_are_those_that_the_client_knows(messages):
    hello = {"max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(anthropic.NotFoundError, match="claud"):
        messages.create(model="claud", **hello)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: 999999 > 64000") as caught:
        messages.create(model="claude", **{**hello, "max_tokens": 999_999})
    assert (caught.value.body["error"]["type"], caught.value.request_id[:4]) == ("invalid_request_error", "req_")
    with pytest.raises(anthropic.BadRequestError, match="role"):
        messages.create(model="claude", max_tokens=9, messages=[{"role": "tool", "content": "x"}])
    with pytest.raises(anthropic.RateLimitError):
        messages.create(model="gpt", max_tokens=9, messages=[{"role": "user", "content": "too many"}])


def test_tokens_are_counted(messages):
    fields = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    short = messages.count_tokens(model="claude", messages=[{"role": "user", "content": "hello"}]).input_tokens
    assert 0 < short < messages.count_tokens(model="claude", **fields).input_tokens
    with pytest.raises(anthropic.NotFoundError):
        messages.count_tokens(model="none", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_response_is_asked_for_where_it_is_at_home_and_comes_as_it_is(responses, is_streamed):
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    fields = {
        "model": "gpt",
        "tools": [tool],
        "store": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "max_output_tokens": 900,
    }
    asked = [{"role": "user", "content": "What is the weather in Ghent?"}]
    if is_streamed:
        events = list(responses.create(input=asked, stream=True, **fields))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        found = events[-1].response
        assert (
            "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
            == '{"city":"Ghent"}'
        )
    else:
        found = responses.create(input=asked, **fields)
    thought, call = found.output
    assert (found.id[:8], thought.summary[0].text, thought.encrypted_content[:5]) == (
        "resp_682",
        "**Asking the tool**",
        "gAAAA",
    )
    assert (found.usage.input_tokens, found.usage.output_tokens_details.reasoning_tokens) == (55, 24)
    said = [item.to_dict(exclude_none=True) for item in found.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    assert responses.create(input=[*asked, *said, result], **fields).output_text == "It rains in Ghent."
