"""What a language model is asked for an instruction: a few examples, two sentences, no name of a data set."""

from collections.abc import Sequence

from anabranch.bounds import shown
from anabranch.errors import ConfigError

__all__ = ["Example", "prompt_of"]

# (input, output) of a task.
Example = tuple[str, str]
_MOST = 3
_ASKED = (
    "In one or two sentences, describe the task that these examples are of and the skills that it takes. Write it as an instruction. "
    "Do not name a data set."
)


def prompt_of(examples: Sequence[Example]) -> str:
    """The question for a model that writes instructions, with the first three examples. Raises ConfigError for what is no example."""
    if not examples:
        raise ConfigError("there are no examples to make an instruction of")
    for example in examples[:_MOST]:
        if len(example) != 2 or not all(isinstance(part, str) for part in example):
            raise ConfigError(f"an example is {shown(example)}; it must be (input, output), two texts")
    shown_ones = [f"Input: {asked}\nOutput: {answer}" for asked, answer in examples[:_MOST]]
    return "\n\n".join([_ASKED, *shown_ones, "Instruction:"])
