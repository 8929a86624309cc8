"""Conformance: the official ``openai`` client against a real server process with no config at all."""

import asyncio

import pytest

from gateway_process import served

openai = pytest.importorskip("openai")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
HELLO = [{"role": "user", "content": "Say hello to the river."}]


@pytest.fixture(scope="module")
def server():
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0, timeout=60) as made:
        yield made


def test_models_are_listed(client):
    names = {model.id for model in client.models.list()}
    assert {"small", "medium", "large", "auto"} <= names
    assert any(name.startswith("auto/") for name in names)
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="small"):
        client.models.retrieve("smal")


@pytest.mark.parametrize("model", ["small", "auto", "auto/cheapest", "auto/rules", "auto/scale", "auto/router-r1"])
def test_chat(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO, max_tokens=20)
    answer = raw.parse()
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    assert raw.headers["x-request-id"]
    assert raw.headers["x-route-model"] in ("small", "medium", "large")
    assert 0 <= float(raw.headers["x-overhead-ms"]) < 1000


@pytest.mark.parametrize("with_usage", [False, True])
def test_chat_streamed(client, with_usage):
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(client.chat.completions.create(model="auto", messages=HELLO, stream=True, max_tokens=20, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert [chunk.usage is not None and chunk.usage.completion_tokens > 0 for chunk in chunks].count(True) == with_usage


def test_the_stream_says_what_the_whole_answer_says(client):
    whole = client.chat.completions.create(model="small", messages=HELLO, temperature=0, seed=1)
    stream = client.chat.completions.create(model="small", messages=HELLO, temperature=0, seed=1, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content


def test_tools(client):
    asked = [{"role": "user", "content": "What is the weather in Ghent? Use the tool."}]
    answer = client.chat.completions.create(model="large", messages=asked, tools=TOOLS, tool_choice="required")
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    follow = [*asked, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(model="large", messages=follow, tools=TOOLS).choices[0].message.content


def test_completions_and_embeddings(client):
    assert client.completions.create(model="small", prompt="Once", max_tokens=5).choices[0].text
    streamed = client.completions.create(model="small", prompt="Once", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
    made = client.embeddings.create(model="small", input=["one", "two"])
    assert len(made.data) == 2
    assert len(made.data[0].embedding) == len(made.data[1].embedding) > 0


def test_responses(client):
    made = client.responses.create(model="auto", input="Say hello.", instructions="Be kind.", max_output_tokens=20)
    assert made.output_text
    assert made.usage.output_tokens > 0
    kinds, text = [], ""
    for event in client.responses.create(model="auto", input="Say hello.", stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert text


def test_responses_with_tools(client):
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
    asked = [{"role": "user", "content": "Weather?"}]
    made = client.responses.create(model="large", input=asked, tools=[tool], tool_choice="required")
    [call] = [item for item in made.output if item.type == "function_call"]
    assert call.name == "weather"
    follow = [*asked, *made.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    assert client.responses.create(model="large", input=follow, tools=[tool]).output_text
    with client.responses.stream(model="large", input=asked, tools=[tool], tool_choice="required") as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["function_call"]


def test_responses_with_custom_and_allowed_tools(client):
    patch = {"type": "custom", "name": "patch", "description": "Change a file."}
    other = {"type": "function", "name": "other", "parameters": {"type": "object", "properties": {}}, "strict": False}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]}
    asked = [{"role": "user", "content": "Change it."}]
    fields = {"model": "large", "tools": [other, patch], "tool_choice": choice}
    made = client.responses.create(input=asked, **fields)
    [call] = made.output
    assert (call.type, call.name) == ("custom_tool_call", "patch")
    follow = [*asked, call, {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}]
    assert client.responses.create(model="large", input=follow, tools=[patch]).output_text
    with client.responses.stream(input=asked, **fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.custom_tool_call_input.done" in kinds
    assert [item.type for item in final.output] == ["custom_tool_call"]


def test_responses_are_counted_and_none_is_kept(client):
    short = client.responses.input_tokens.count(model="small", input="hello").input_tokens
    assert 0 < short < client.responses.input_tokens.count(model="small", input="hello " * 50).input_tokens
    made = client.responses.create(model="small", input="hello", max_output_tokens=20)
    for work in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="no response is kept here"):
            work(made.id)


def test_the_async_client(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="auto", messages=HELLO) for _ in range(8))
            )
            assert all(answer.choices[0].message.content for answer in answers)
            stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True)
            assert [chunk async for chunk in stream]
            made = await client.embeddings.create(model="small", input="one", encoding_format="float")
            assert made.data[0].embedding

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"model": "larg"}, openai.NotFoundError, "did you mean"),
        ({"model": "auto/rulez"}, openai.NotFoundError, "auto/rules"),
        ({"model": "small", "max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"model": "small", "messages": []}, openai.BadRequestError, "messages"),
        ({"model": "small", "temperature": 7}, openai.BadRequestError, "temperature"),
    ],
)
def test_errors_are_the_clients_own_kinds(client, fields, error, says):
    with pytest.raises(error, match=says) as caught:
        client.chat.completions.create(**{"messages": HELLO, **fields})
    assert set(caught.value.body) == {"message", "type", "code", "param"}
    assert caught.value.request_id


def test_feedback_finds_its_request(client):
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=HELLO)
    found = client.post("/feedback", body={"request_id": raw.headers["x-request-id"], "score": 0.9}, cast_to=dict)
    assert found["request_id"] == raw.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError):
        client.post("/feedback", body={"request_id": "req_unknown", "score": 0.9}, cast_to=dict)
    with pytest.raises(openai.BadRequestError, match="score"):
        client.post("/feedback", body={"request_id": "x", "score": "good"}, cast_to=dict)
