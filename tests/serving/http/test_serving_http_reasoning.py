"""Models that reason, through a server and the official client: what is thought comes apart from what is said, whole and streamed."""

import json
import keyword

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.http.fields import KWARGS
from anabranch.serving.http.reading import FUNCTIONS, RESERVED, Reader
from fake_engine import Script
from reasoning_models import ASK, HARMONY, QWEN3, R1, Speaking, tokenizer_of, told_of
from serving_models import small_moe
from serving_thread import serving

openai = pytest.importorskip("openai")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
THOUGHT = "<think>\nTwo and\nthree. So stop.\n</think>\n\n"


@pytest.fixture(scope="module")
def qwen3():
    with Speaking(QWEN3) as made:
        yield made


@pytest.fixture(scope="module")
def gpt_oss():
    with Speaking(HARMONY) as made:
        yield made


def test_what_is_thought_comes_apart(qwen3):
    thought, said, calls, finish, usage = qwen3.ask(f"{THOUGHT}It is 5.")
    assert (thought, said, calls, finish) == ("Two and\nthree. So stop.", "It is 5.", [], "stop")
    # The marks count as thought.
    assert usage.completion_tokens_details.reasoning_tokens == len("\nTwo and\nthree. So stop.\n") + 2
    assert usage.completion_tokens == usage.completion_tokens_details.reasoning_tokens + len("\n\nIt is 5.")


def test_a_model_that_does_not_think_just_answers(qwen3):
    assert qwen3.ask("It is <think>5</think>.")[:4] == ("", "It is <think>5</think>.", [], "stop")
    assert qwen3.ask("It is 5.")[4].completion_tokens_details.reasoning_tokens == 0


def test_a_tag_of_several_tokens_is_one_all_the_same():
    with Speaking(QWEN3, has_marks=False) as made:
        assert made.ask(f"{THOUGHT}It is 5.")[:2] == ("Two and\nthree. So stop.", "It is 5.")


def test_a_template_may_have_begun_the_reasoning():
    with Speaking(R1) as made:
        assert made.ask("Two and three.\n</think>\n\nIt is 5.")[:2] == ("Two and three.", "It is 5.")
        assert made.ask("cut off", max_tokens=3)[:4] == ("cut", "", [], "length")
        assert made.prompt.endswith("<think>\n")


def test_stop_strings_are_looked_for_in_the_answer_alone(qwen3):
    thought, said, _, finish, usage = qwen3.ask(f"{THOUGHT}It is 5, stop. Or so.", stop=["stop", "and"])
    assert (thought, said, finish) == ("Two and\nthree. So stop.", "It is 5, ", "stop")
    assert usage.completion_tokens - usage.completion_tokens_details.reasoning_tokens == len("\n\nIt is 5, stop")


def test_log_probabilities_are_of_all_tokens(qwen3):
    text = f"{THOUGHT}It is 5."
    qwen3.script.say = text
    fields = {"model": "fake", "messages": ASK, "logprobs": True}
    whole = qwen3.client.chat.completions.create(**fields)
    told = [row.token for row in whole.choices[0].logprobs.content]
    assert "".join(told) == text
    chunks = qwen3.client.chat.completions.create(**fields, stream=True)
    rows = [
        row.token
        for chunk in chunks
        for row in (chunk.choices[0].logprobs or chunk.choices[0]).__dict__.get("content") or []
    ]
    assert rows == told


def test_calls_come_after_what_is_thought(qwen3):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    thought, said, calls, finish, _ = qwen3.ask(THOUGHT + call, tools=TOOLS)
    assert (thought, said, calls, finish) == ("Two and\nthree. So stop.", "", [("add", '{"a": 2}')], "tool_calls")


def test_the_template_gets_what_the_request_has_for_it(qwen3):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert qwen3.ask("<think>5", extra_body=off)[:2] == ("", "<think>5")
    assert qwen3.prompt.endswith("<think>\n\n</think>\n\n")
    qwen3.ask("5", reasoning_effort="none")
    assert qwen3.prompt.endswith("<think>\n\n</think>\n\n")
    qwen3.ask("5", reasoning_effort="high")
    assert qwen3.prompt.endswith("assistant")
    before = {"role": "assistant", "content": "It is 5.", "reasoning_content": "Easy."}
    qwen3.ask("5", messages=[*ASK, before, *ASK])
    assert "<think>Easy.</think>It is 5." in qwen3.prompt
    counted = qwen3.server.ask("/tokenize", {"messages": ASK, **off})[2]["tokens"]
    assert qwen3.tokenizer.decode(counted, skip_special=False).endswith("</think>\n\n")


def test_what_the_template_does_not_know_is_told(qwen3):
    status, headers, _ = qwen3.server.chat(chat_template_kwargs={"enable_thoughts": False})
    assert (status, headers["x-warning"]) == (200, "ignored unknown fields: chat_template_kwargs.enable_thoughts")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": []},
        {"bos_token": "x"},
        {"add_generation_prompt": False},
        {f"a{n}": 1 for n in range(17)},
        {"a b": 1},
        {"": 1},
        {"a": "x" * 10_001},
        {"a": json.loads("[" * 9 + "]" * 9)},
        [],
        "x",
        {"a" * 65: 1},
    ],
)
def test_what_no_template_may_get_is_refused(qwen3, kwargs):
    status, _, body = qwen3.server.chat(chat_template_kwargs=kwargs)
    assert status == 400, body
    assert body["error"]["param"].startswith("chat_template_kwargs")


@pytest.mark.parametrize(
    "name", ["template", "self", "caller", "loop", "true", "class", "values", "source", "line", "request", "args"]
)
def test_whatever_a_value_is_called_it_is_one(qwen3, name):
    qwen3.script.say = "5"
    assert qwen3.server.chat(chat_template_kwargs={name: 1})[0] == 200


def test_what_templates_call_is_no_value(qwen3):
    for name in FUNCTIONS:
        status, _, body = qwen3.server.chat(chat_template_kwargs={name: 1})
        assert (status, body["error"]["param"]) == (400, f"chat_template_kwargs.{name}")


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,9}", fullmatch=True) | st.sampled_from(
    keyword.kwlist + dir(jinja2.Template)
)


@given(NAMES.filter(lambda name: KWARGS[0]({name: 1}) and name not in RESERVED and name not in FUNCTIONS))
@settings(max_examples=100, deadline=None)
def test_every_name_is_that_of_a_value(name):
    reader = Reader(tokenizer_of("{% for m in messages %}{{ m.content }}{% endfor %}{% set a = range(3) | list %}"))
    if name.endswith("_token"):
        return
    values, unknown = reader.template_values({"chat_template_kwargs": {name: 1}})
    assert (values, unknown) == ({name: 1}, [f"chat_template_kwargs.{name}"])
    assert reader.render(ASK, None, values=values) == "2+3?"


def test_an_effort_that_a_model_cannot_make_is_refused(qwen3, gpt_oss):
    with serving() as plain:
        status, _, body = plain.chat(reasoning_effort="low")
        assert (status, body["error"]["code"], body["error"]["param"]) == (
            400,
            "unsupported_parameter",
            "reasoning_effort",
        )
        assert plain.chat(reasoning_effort="none")[0] == 200
    assert qwen3.server.chat(reasoning_effort="much")[0] == 400
    status, _, body = gpt_oss.server.chat(reasoning_effort="none")
    assert (status, body["error"]["param"]) == (400, "reasoning_effort")
    for effort, told in (("low", "low"), ("minimal", "low"), ("xhigh", "high")):
        gpt_oss.ask("x", reasoning_effort=effort)
        assert f"Reasoning: {told}<|end|>" in gpt_oss.prompt


def test_gpt_oss_thinks_on_a_channel_and_calls_by_messages(gpt_oss):
    analysis = "<|channel|>analysis<|message|>Two, and three.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>It is 5."
    thought, said, calls, finish, usage = gpt_oss.ask(analysis + final)
    assert (thought, said, calls, finish) == ("Two, and three.", "It is 5.", [], "stop")
    assert usage.completion_tokens_details.reasoning_tokens == len("analysis") + len("Two, and three.") + 3
    call = '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2}'
    assert gpt_oss.ask(analysis + call, tools=TOOLS)[:4] == ("Two, and three.", "", [("add", '{"a": 2}')], "tool_calls")
    # No header is a stop string's, and none without tools is told.
    assert gpt_oss.ask(analysis + final, stop=["final", "5"])[:4] == ("Two, and three.", "It is ", [], "stop")
    assert gpt_oss.ask(analysis)[:4] == ("Two, and three.", "", [], "stop")
    assert gpt_oss.tokenizer.id_of("<|end|>") not in gpt_oss.tokenizer.stop_ids
    assert {gpt_oss.tokenizer.id_of(name) for name in ("<|call|>", "<|return|>")} <= set(gpt_oss.tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("before", "thought"),
    [
        ("<|channel|>commentary<|message|>Sure.<|end|><|start|>assistant", "Sure."),
        ("Sure.", "Sure."),
        ("<|channel|>analysis<|message|>I write ", "I write "),
        ("", ""),
    ],
)
def test_gpt_oss_answers_in_a_form_with_nothing_before_it(gpt_oss, before, thought):
    say = before + '<|channel|>final<|message|>{"a": 1}'
    assert gpt_oss.ask(say, response_format={"type": "json_object"})[:2] == (thought, '{"a": 1}')
    if "analysis" not in before:
        # What nobody holds to a form is all for the reader.
        assert gpt_oss.ask(say)[:2] == ("", thought + '{"a": 1}')


def test_a_call_that_was_cut_off_can_be_sent_back(qwen3):
    qwen3.script.say = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "text": "two and'
    fields = {"model": "fake", "messages": ASK, "tools": TOOLS}
    [choice] = qwen3.client.chat.completions.create(**fields, max_tokens=40).choices
    [call] = choice.message.tool_calls
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "the call was cut off"}
    again = [*ASK, choice.message.model_dump(exclude_none=True), result]
    assert qwen3.client.chat.completions.create(**{**fields, "messages": again}).choices


def test_reasoning_can_be_left_in_the_text():
    with serving(Script(say=f"{THOUGHT}5")) as plain:
        assert plain.chat()[2]["choices"][0]["message"]["content"] == f"{THOUGHT}5"


# -- with a real engine: what the grammar is of comes after what is thought

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}


def engine_of(template):
    tokenizer = tokenizer_of(template)
    model = small_moe().config.replace(vocab_size=tokenizer.vocab_size).build(seed=0).eval()
    config = ServingConfig(num_blocks=256, name="fake", dtype="float32", max_seqs=8, max_batched_tokens=64)
    return tokenizer, lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=tokenizer))


@pytest.mark.parametrize("template", [QWEN3, R1], ids=["qwen3", "r1"])
def test_a_form_holds_for_the_answer_after_the_reasoning(template):
    tokenizer, make = engine_of(template)
    # So likely that a model of no mind says it.
    bias = {str(tokenizer.id_of("</think>")): 3.0}
    with serving(make, Reader(tokenizer)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            seen = set()
            for seed in range(6):
                answer = client.chat.completions.create(
                    model="fake",
                    messages=ASK,
                    response_format=FORM,
                    max_tokens=300,
                    seed=seed,
                    logit_bias=bias,
                    extra_body={"min_tokens": 2},
                )
                [choice] = answer.choices
                thought, said, _ = told_of(choice.message)
                if choice.finish_reason == "stop":
                    assert set(json.loads(said)) == {"a"}
                    seen.add(bool(thought) or answer.usage.completion_tokens_details.reasoning_tokens > 0)
                else:
                    assert said == ""
                    seen.add("cut")
            assert (template == R1) in seen
