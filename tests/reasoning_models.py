"""Tokenizers of models that reason, with chat templates as theirs, shortened; and a server that says what it is told to."""

import tokenizers

from anabranch.data.bpe import train_bpe
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.serving.http.reading import Reader
from fake_engine import FakeEngine, Script
from serving_thread import serving

# Of Qwen3: a switch, which closes the reasoning in the prompt; what was thought before is shown.
QWEN3 = (
    "{%- if tools %}{{ tools | tojson }}<tool_call>{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}<|im_end|>\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Of DeepSeek-R1: the prompt begins the reasoning.
R1 = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
# Of gpt-oss.
HARMONY = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>"
    "{%- for message in messages %}<|start|>{{ message.role }}<|channel|>final<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")


def tokenizer_of(template: str, *, has_marks: bool = True) -> HuggingFaceTokenizer:
    """Bytes, and the marks of the template as tokens where it ``has_marks``: special ones of gpt-oss, others of the rest."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(["abc"], 257)._backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if has_marks and template == HARMONY:
        backend.add_special_tokens(list(MARKS))
    elif has_marks:
        backend.add_tokens(
            [tokenizers.AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>")]
        )
    return HuggingFaceTokenizer(backend, eos_id=backend.token_to_id("<|im_end|>"), chat_template=template)


ASK = [{"role": "user", "content": "2+3?"}]


class Says(FakeEngine):
    """Says a text in the tokens of its tokenizer."""

    def __init__(self, script, tokenizer):
        super().__init__(script)
        self.tokenizer = tokenizer

    def _tokens(self, request):
        return self.tokenizer.encode(self.script.say)[: request.sampling.max_tokens]


class Spoken(Script):
    """Makes engines that say a text."""

    tokenizer = None

    def __call__(self):
        self.made.append(Says(self, self.tokenizer))
        return self.made[-1]


class Speaking:
    """A server that says what it is told to, and a client of it."""

    def __init__(self, template, *, has_marks=True, **config):
        self.tokenizer = tokenizer_of(template, has_marks=has_marks)
        self.script = Spoken()
        self.script.tokenizer = self.tokenizer
        self._serving = serving(self.script, Reader(self.tokenizer), **config)

    def __enter__(self):
        self.server = self._serving.__enter__()
        import openai

        self.client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="x", max_retries=0)
        return self

    def __exit__(self, *error):
        self.client.close()
        return self._serving.__exit__(*error)

    def ask(self, say, **fields):
        """The message and the reason of a whole answer, which those of a stream must equal; and the usage."""
        self.script.say = say
        fields = {"model": "fake", "messages": ASK, **fields}
        whole = self.client.chat.completions.create(**fields)
        stream = self.client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        [choice] = whole.choices
        told = told_of(choice.message)
        joined, finish, usage = streamed(stream)
        assert (joined, finish, usage) == (told, choice.finish_reason, whole.usage)
        return *told, finish, usage

    @property
    def prompt(self):
        return self.tokenizer.decode(self.script.requests[-1].prompt, skip_special=False)


def told_of(message):
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return getattr(message, "reasoning_content", None) or "", message.content or "", calls


def streamed(stream):
    thought, said, calls, finish, usage = "", "", [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            said += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                if call.id:
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
    return (thought, said, [tuple(call) for call in calls]), finish, usage
