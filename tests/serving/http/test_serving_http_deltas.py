"""Calls of tools in a stream: their pieces make the whole answer's, however the model's text is cut; OpenAI's client joins them."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import ByteTokenizer
from anabranch.gateway.providers.assembling import assembled
from anabranch.serving.chat import FORMATS, Dialect, Tools
from anabranch.serving.chat.events import TextDelta, ToolCallStarted
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.request import Finish, Output, Request, Sampling, TokenLogprob
from anabranch.serving.http import shape as shaped
from anabranch.serving.http.choice import Choice
from anabranch.serving.http.deltas import MessageDeltas, message_of
from anabranch.serving.http.deltas import joined as joined_deltas
from anabranch.serving.http.generation_request import GenerationRequest
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.shape import MOST_APART, ChatShape
from anabranch.web.said_order import said as said_pieces
from fake_engine import Script
from serving_models import serve_process
from serving_thread import events, serving

INFO = EngineInfo(model="small", vocab_size=257, max_positions=4096, block_tokens=16, num_blocks=64)


def tool(name, **properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER, CLOCK = tool("weather", city={"type": "string"}), tool("clock")
CITY = '{"city": "Gh\\"ent\\u00e9 \\ud83d\\ude00 é😀 \\\\END"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
NOW = '<tool_call>{"name": "clock", "arguments": "{ }"}</tool_call>'
UNKNOWN = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
TEXTS = [
    CALL,
    f"Let me see. {CALL}\n{NOW}\n",
    f"{NOW}{CALL}{CALL}",
    f'[TOOL_CALLS][{{"name": "weather", "arguments": {CITY}}}]',
    f"<function=weather>{CITY}</function>",
    f'{{"name": "weather", "parameters": {CITY}}}; {{"name": "clock", "arguments": {{}}}}',
    f'<tool_call>{{"name": "weather", "arguments": {json.dumps(CITY)}}}</tool_call>',
    f'<tool_call>{{"arguments": {CITY}, "name": "weather"}}</tool_call>',
    f'<tool_call>{{"name": "launch", "arguments": {CITY}}}</tool_call> Done.',
    "<tool_call>weather(Ghent)</tool_call>é",
    '<tool_call>{"name": "weather", "arguments": {"city": Ghent,}}</tool_call>',
    '{"name": "Ann", "arguments": "END"}',
    "Plain é😀 text.",
    f"One. {NOW} Two. {NOW}{UNKNOWN} END {CALL} Four.",
]


def outputs_of(cuts, finish):
    """Outputs that tell bytes, cut like this, with a log probability each."""
    for piece in cuts:
        scores = tuple(TokenLogprob(token=token, logprob=-0.5) for token in piece)
        yield Output(id="a", tokens=tuple(piece), logprobs=scores)
    yield Output(id="a", finish=finish)


def check_joined(tools, reader, pieces):
    """However many of its first deltas are kept as one, the message is the same."""
    message = MessageDeltas(tools, reader.dialect.parser(tools.offered, None))
    deltas = [delta for piece in pieces for delta in message.push(piece.text)] + message.end()
    for count in range(1, len(deltas) + 1):
        assert message_of([*joined_deltas(deltas[:count]), *deltas[count:]]) == message_of(deltas)


def answered(outputs, *, stop=(), finish=Finish.STOP, is_parallel=True):
    """The message and the reason of the whole answer, and those that the deltas of a stream make."""
    tools = Tools((WEATHER, CLOCK), is_parallel=is_parallel)
    request = GenerationRequest(
        kind="chat", model="small", prompts=((1,),), tools=tools, stop=stop, sampling=Sampling(logprobs=0), logprobs=0
    )
    reader = Reader(ByteTokenizer())
    choice, pieces = Choice(0, Request(id="a", prompt=(1,), sampling=request.sampling), request.text(reader)), []
    for output in outputs_of(outputs, finish):
        change = choice.push(output)
        pieces += [] if change is None else [change]
        # A stop string ends it before the engine does.
        if choice.finish is not None:
            break
    check_joined(tools, reader, pieces)
    whole, stream = (ChatShape(request, [choice], reader, INFO) for _ in range(2))
    for piece in pieces:
        whole.take(piece)
    [told] = whole.whole()["choices"]
    chunks = [chunk for piece in pieces for chunk in stream.chunks(piece)]
    parts = [chunk["choices"][0] for chunk in chunks]
    streamed = assembled(chunks)["choices"][0]["message"]
    assert in_order(told["message"]) == in_order(streamed)
    assert told["message"].get("extra_content") == streamed.get("extra_content")
    rows = [row for part in parts for row in (part["logprobs"] or {"content": []})["content"]]
    assert rows == told["logprobs"]["content"]
    return (unnamed(told["message"]), told["finish_reason"]), (joined(parts), parts[-1]["finish_reason"])


def in_order(message):
    """Texts, and names of calls with their arguments."""
    return [
        piece if kind == "text" else (piece["function"]["name"], piece["function"]["arguments"])
        for kind, piece in said_pieces(message)
    ]


def unnamed(message):
    """Content, and name and arguments of calls."""
    calls = message.get("tool_calls") or []
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    return message["content"], [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def joined(parts):
    """What a client makes of the deltas of one choice, as strict as can be about their form."""
    content, calls = "", []
    for part in parts:
        assert part["finish_reason"] is None or part["delta"] == {}
        content += part["delta"].get("content") or ""
        for call in part["delta"].get("tool_calls", ()):
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                assert call["function"]["arguments"] == ""
                calls.append([call["function"]["name"], ""])
            else:
                assert call["index"] == len(calls) - 1
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                assert call["function"]["arguments"]
                calls[-1][1] += call["function"]["arguments"]
    return content if content or not calls else None, [tuple(call) for call in calls]


@given(
    st.sampled_from(TEXTS),
    st.sampled_from([(), ("END",), ("\\END", 'END"'), ("}}",)]),
    st.booleans(),
    st.sampled_from([Finish.STOP, Finish.LENGTH]),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_stream_says_what_the_whole_answer_says(text, stop, is_parallel, finish, data):
    raw = text.encode()
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]  # cut off anywhere
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    outputs = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
    whole, stream = answered(outputs, stop=stop, finish=finish, is_parallel=is_parallel)
    assert stream == whole
    assert (
        whole == answered([raw], stop=stop, finish=finish, is_parallel=is_parallel)[0]
    )  # nor does it depend on the cuts
    assert whole == answered([bytes([byte]) for byte in raw], stop=stop, finish=finish, is_parallel=is_parallel)[1]
    if not is_parallel:
        assert len(whole[0][1]) <= 1


@pytest.mark.parametrize(
    ("text", "stop", "finish", "wanted"),
    [
        (CALL, (), Finish.STOP, ((None, [("weather", CITY)]), "tool_calls")),
        (f"{CALL}\n{NOW}", (), Finish.STOP, ((None, [("weather", CITY), ("clock", "{ }")]), "tool_calls")),
        # Cut off within arguments: they end there, and nothing says that the call is whole.
        (CALL, ("END",), Finish.STOP, ((None, [("weather", CITY.partition("END")[0])]), "stop")),
        (CALL[: CALL.index("Gh")], (), Finish.LENGTH, ((None, [("weather", '{"city": "')]), "length")),
        (CALL, (), Finish.LENGTH, ((None, [("weather", CITY)]), "length")),
        (
            "<tool_call>call(weather)</tool_call>",
            (),
            Finish.STOP,
            (("<tool_call>call(weather)</tool_call>", []), "stop"),
        ),
        (UNKNOWN, (), Finish.STOP, ((UNKNOWN, []), "stop")),
    ],
)
def test_how_answers_end(text, stop, finish, wanted):
    assert answered([text.encode()], stop=stop, finish=finish) == (wanted, wanted)


def test_a_whole_answer_says_the_order_of_text_and_calls_as_its_stream_does():
    """It was told without, and all text stood before all calls for whoever made items or blocks of it."""
    text = f"One. {NOW} Two. {NOW}"
    message = whole_of(text.encode())
    assert message["content"] == "One. Two."
    order = [{"text": 4}, {"call": 0}, {"text": 5}, {"call": 1}]
    assert message["extra_content"] == {"gateway": {"order": order}}
    assert "extra_content" not in whole_of(f"One. {NOW}{NOW}".encode())


def whole_of(raw, size=1):
    """The message of the whole answer that says these bytes, so many at a time."""
    tools = Tools((WEATHER, CLOCK))
    request = GenerationRequest(kind="chat", model="small", prompts=((1,),), tools=tools)
    reader = Reader(ByteTokenizer())
    choice = Choice(0, Request(id="a", prompt=(1,), sampling=request.sampling), request.text(reader))
    whole = ChatShape(request, [choice], reader, INFO)
    for output in outputs_of([raw[at : at + size] for at in range(0, len(raw), size)], Finish.STOP):
        if (change := choice.push(output)) is not None:
            whole.take(change)
    return whole.whole()["choices"][0]["message"]


def test_an_answer_in_which_text_and_calls_alternate_is_not_looked_at_again_for_each(monkeypatch):
    """Its deltas cannot be made fewer; put together at each that comes they cost the square of their number."""
    looked = []
    real = shaped.joined_deltas
    monkeypatch.setattr(shaped, "joined_deltas", lambda deltas: looked.append(len(deltas)) or real(deltas))
    count = 3 * MOST_APART
    raw = f"a{NOW}".encode() * count
    message = whole_of(raw, size=len(raw) // count)
    assert len(message["extra_content"]["gateway"]["order"]) == 2 * count
    assert looked
    # Doubled each time, and of each text and call there are some deltas.
    assert sum(looked) < 12 * count


BLANKS = st.sampled_from(["", " ", "\n", "\n\n", " \n  "])
SAID = st.lists(st.tuples(st.sampled_from(["I", "called", "it.", "-", "5", "é"]), BLANKS), max_size=8)


@pytest.mark.parametrize("format", FORMATS)
@given(said=SAID, blanks=BLANKS, is_parallel=st.booleans(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_said_after_a_call_keeps_its_blanks_however_it_is_cut(format, said, blanks, is_parallel, data):
    after = "".join(itertools.chain.from_iterable(said))
    begin = "<|call|><|start|>assistant<|channel|>final<|message|>" if format == "harmony" else ""
    text = FORMATS[format].written([("add", '{"a": 1}')]) + begin + blanks + after
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    made = []
    for cuts in ([text], [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])], list(text)):
        tools = Tools((tool("add", a={"type": "integer"}),), is_parallel=is_parallel)
        deltas = MessageDeltas(tools, Dialect(tools=format).parser(tools.offered))
        message = message_of([delta for piece in cuts for delta in deltas.push(piece)] + deltas.end())
        [call] = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        made.append(message["content"] or "")
    assert made[0] == made[1] == made[2]
    assert made[0].lstrip() == (blanks + after).strip()


class Blanks:
    """Reads text as a call, and then as it comes."""

    is_cut = False

    def push(self, text):
        return [ToolCallStarted("add")] if text == "call" else [TextDelta(text)]

    def end(self):
        return []


def test_blanks_after_a_call_are_held_and_not_copied_for_each_that_comes():
    deltas = MessageDeltas(Tools((tool("add"),)), Blanks())
    deltas.push("call")
    assert deltas.push("a\n") == [{"content": "a"}]
    held = deltas._blanks
    for _ in range(50):
        assert deltas.push(" \n") == []
        assert deltas._blanks is held
    assert deltas.push("\nb ") == [{"content": "\n" + " \n" * 50 + "\nb"}]
    assert deltas.push(" ") + deltas.end() == []


def test_a_second_call_that_is_not_wanted_changes_nothing():
    half = NOW + CALL[: CALL.index("Gh")]
    assert answered([half.encode()], is_parallel=False)[1] == ((None, [("clock", "{ }")]), "tool_calls")
    assert answered([half.encode()])[1] == ((None, [("clock", "{ }"), ("weather", '{"city": "')]), "stop")


def test_arguments_arrive_before_the_call_has_ended():
    with serving(Script(say=f"I ask. {CALL}")) as running:
        made = [event["choices"][0] for event in events(running.chat(tools=[WEATHER], stream=True)[2])[:-1]]
        deltas = [call for part in made for call in part["delta"].get("tool_calls", ())]
        begin, *more = deltas
        assert begin == {
            "index": 0,
            "id": begin["id"],
            "type": "function",
            "function": {"name": "weather", "arguments": ""},
        }
        assert len(more) > len(CITY) / 2  # the engine says a byte at a time
        assert joined(made) == ("I ask.", [("weather", CITY)])
        assert unnamed(running.chat(tools=[WEATHER])[2]["choices"][0]["message"]) == joined(made)


# -- OpenAI's own client, and a server as users start it

TOOLS = [
    tool("weather", city={"enum": ["Ghent é😀", 'a "b" \\ c']}, warm={"type": "boolean"}),
    tool("clock", zone={"type": "integer"}),
]
ASKED = {
    "model": "small-moe",
    "messages": [{"role": "user", "content": "hello"}],
    "tools": TOOLS,
    "max_tokens": 600,
    "seed": 3,
}


@pytest.fixture(scope="module")
def client():
    openai = pytest.importorskip("openai")
    with (
        serve_process("--set", "engine.num_blocks=256") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as made,
    ):
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_the_official_client_joins_what_a_server_streams(client, choice, is_parallel):
    request = {**ASKED, "tool_choice": choice, "parallel_tool_calls": is_parallel}
    whole = client.chat.completions.create(**request).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert len(calls) > 1 if is_parallel and choice == "required" else len(calls) == 1
    with client.chat.completions.stream(**request) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        end = stream.get_final_completion().choices[0]
    assert [(call.function.name, call.function.arguments) for call in end.message.tool_calls] == calls
    assert end.finish_reason == whole.finish_reason
    assert "".join(pieces) == "".join(arguments for _, arguments in calls)
    assert len(pieces) > 3 * len(calls)
    if whole.finish_reason == "tool_calls":
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
