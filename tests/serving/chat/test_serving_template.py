"""Prompts of conversations: by the model's own template, with tools where it takes them, and as text where it does not."""

import json

import pytest
import tokenizers

from anabranch.data.bpe import train_bpe
from anabranch.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from anabranch.errors import InputError
from anabranch.serving import chat
from anabranch.serving.chat.errors import FieldError
from anabranch.serving.chat.messages import read_messages

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALLED = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "5"},
    {"role": "tool", "tool_call_id": "c2", "content": "6"},
]
# Qwen2.5's way of saying tools, shortened
WITH_TOOLS = (
    "{%- if tools %}{%- for tool in tools %}[{{ tool | tojson }}]{%- endfor %}\n{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_chatml(template=None):
    backend = tokenizers.Tokenizer.from_str(train_bpe(["abc"], 257)._backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return HuggingFaceTokenizer(backend, eos_id=backend.token_to_id("<|im_end|>"), chat_template=template)


def test_without_a_template_plain_lines_or_chatml():
    assert chat.render(ByteTokenizer(), ASK) == "System: Be brief.\nUser: 2+3?\nAssistant:"
    assert chat.render(with_chatml(), ASK[1:], add_generation_prompt=False) == "<|im_start|>user\n2+3?<|im_end|>\n"


def test_parts_of_text_are_joined_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert chat.render(ByteTokenizer(), messages) == chat.render(ByteTokenizer(), ASK)


def test_a_template_that_takes_tools_gets_them_and_calls_as_objects():
    tokenizer = with_chatml(WITH_TOOLS)
    assert chat.takes_tools(tokenizer)
    prompt = chat.render(tokenizer, CALLED, tools=[ADD])
    assert prompt.startswith(f"[{json.dumps(ADD)}]<|im_start|>system\n")
    assert '<|im_start|>assistant\n<tool_call>add {"a": 2}</tool_call><|im_end|>' in prompt
    assert "<|im_start|>tool\n5<|im_end|>" in prompt
    assert "[" not in chat.render(tokenizer, ASK)


def test_it_renders_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_chatml(
        WITH_TOOLS + "{% generation %}{{ tools | tojson(indent=1) }}{% endgeneration %}{{ enable_thinking }}"
    )
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = chat.template._as_text(ASK, [])
    expected = theirs.apply_chat_template(
        messages, tools=[ADD], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert chat.render(tokenizer, ASK, tools=[ADD], enable_thinking=False) == expected


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"]
)
def test_other_models_get_tools_calls_and_results_as_text(template):
    tokenizer = with_chatml(template)
    assert not chat.takes_tools(tokenizer)
    turns = chat.render(tokenizer, CALLED, tools=[ADD], add_generation_prompt=False).split("<|im_end|>\n")
    assert turns[0].startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert f"<tools>\n{json.dumps(ADD)}\n</tools>" in turns[0]
    assert turns[2] == '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert turns[3] == "<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response>"
    alone = chat.render(tokenizer, ASK[1:], tools=[ADD], add_generation_prompt=False)
    assert alone.startswith("<|im_start|>system\nYou may call")


def test_a_models_own_calls_are_read_back_from_its_prompt():
    text = chat.render(with_chatml(), CALLED[:3], tools=[ADD], add_generation_prompt=False)
    parser = chat.parser_for([ADD])
    said = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    assert [*parser.push(said), *parser.end()] == [chat.ToolCallStarted("add"), chat.ArgumentsDelta('{"a": 2}')]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (["x"], r"messages\[0\] is 'x'"),
        ([{"role": "robot", "content": ""}], r"messages\[0\].role is 'robot'"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        (
            [*ASK, {"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[2\].content\[0\].type is 'image_url'",
        ),
        ([{"role": "user", "content": "", "tool_calls": [{}]}], r"messages\[0\].tool_calls belongs to"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "x"}]}],
            r"tool_calls\[0\] must be an object with id, type and a function",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "a: 5"}}]}],
            r"tool_calls\[0\].function.arguments is no JSON",
        ),
    ],
)
def test_messages_that_are_malformed_are_refused(messages, message):
    with pytest.raises(InputError, match=message):
        chat.render(ByteTokenizer(), messages)


@pytest.mark.parametrize(
    "arguments",
    [
        "[" + "[]," * 40_000 + "[]]",
        "[" + "1," * 70_000 + "1]",
        "{" + ",".join(f'"{n}":{{}}' for n in range(20_000)) + "}",
        "[" + "1" * 600_000 + "]",
    ],
)
def test_arguments_with_too_much_in_them_are_not_parsed(arguments, monkeypatch):
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("parsed"))
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(FieldError, match=r"more than .* as many as may be") as raised:
        chat.render(ByteTokenizer(), [*ASK, {"role": "assistant", "tool_calls": [call]}])
    assert raised.value.param == f"messages[{len(ASK)}].tool_calls[0].function.arguments"


def test_the_arguments_of_all_calls_count_together():
    call = {"id": "1", "function": {"name": "f", "arguments": "[" + "[]," * 3000 + "[]]"}}
    assert chat.render(ByteTokenizer(), [*ASK, {"role": "assistant", "tool_calls": [call] * 10}])
    with pytest.raises(FieldError, match=r"messages\[5\].tool_calls\[0\]"):
        chat.render(ByteTokenizer(), [{"role": "assistant", "tool_calls": [call] * 2}] * 9)
    # What stands in texts is none of it.
    call["function"]["arguments"] = json.dumps({"code": "[{:," * 100_000})
    assert chat.render(ByteTokenizer(), [*ASK, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": "a", "refusal": "no"}, "a"),
        ({"reasoning": "hm"}, ""),
        ({"content": None, "reasoning_content": "hm"}, ""),
        ({"tool_calls": [{"function": {"name": "f"}}], "refusal": None}, ""),
    ],
)
def test_an_assistant_needs_no_content_where_it_says_something_else(said, content):
    [made] = read_messages([{"role": "assistant", **said}])
    assert made["content"] == content
    for wrong in ({"role": "user", **said, "content": None}, {"role": "assistant", "content": None}):
        with pytest.raises(FieldError):
            read_messages([{**wrong}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "cannot be read|refused"),
        ("{{ messages[0].content + 1 }}", "refused the messages"),
        ("{{ messages.__class__.__mro__ }}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
    ],
)
def test_templates_that_refuse_are_an_error_of_the_input(template, message):
    with pytest.raises(InputError, match=message):
        chat.render(with_chatml(template), ASK)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "retrieval"}], r"tools\[0\].type is 'retrieval'; only functions"),
        ([{"type": "function"}], r"tools\[0\].function.name is None"),
        ([{"type": "function", "function": {"name": "no blanks"}}], r"tools\[0\].function.name is 'no blanks'"),
        ([ADD, ADD], "tools has two functions of the name 'add'"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "must be a JSON schema"),
    ],
)
def test_tools_that_are_malformed_are_refused(tools, message):
    with pytest.raises(InputError, match=message):
        chat.render(ByteTokenizer(), ASK, tools=tools)
