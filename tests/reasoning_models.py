"""Tokenizers of models that reason, with chat templates as theirs, shortened."""

import tokenizers

from anabranch.data.bpe import train_bpe
from anabranch.data.tokenizer import HuggingFaceTokenizer

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
