"""What the router and the models of its pool are told. All that a router knows of the pool are the descriptions here."""

from collections.abc import Mapping, Sequence

from anabranch.errors import InputError

INSTRUCTION = """Answer the question below. You may ask other models, several times, each for what it is good at.

Whenever you have learned something, first think, between <think> and </think>. Then do one of two things:
- If you need to know something that one of the models knows, write <search>llm-name:your-query</search>, with the exact name of the model
  in place of llm-name and a question that can be understood without this one in place of your-query. What the model says will stand between
  <information> and </information>. You may do so as often as you need.
- If you know enough, write the answer between <answer> and </answer>, as short as can be, without an explanation.

The models, by their exact names:
{models}
"""
# For base models, which otherwise write out what is to be replaced.
WARNING = """
Never write llm-name or your-query themselves, and write no tags but in this way.
"""
QUESTION = "\nQuestion: {question}\n"

AGENT = """Somebody who is putting an answer together asks you the following. Answer it if you can, in few words; else say what you know
that may help. If you cannot help, say so. Use at most {tokens} tokens.

{query}"""


def router_prompt(
    question: str,
    models: Sequence[str],
    about: Mapping[str, str],
    *,
    warns: bool = False,
    instruction: str | None = None,
) -> str:
    """What the router is asked.

    Args:
        question: that is to be answered.
        models: that may be asked.
        about: descriptions of some of them, or all.
        warns: say more, for base models.
        instruction: another one than `INSTRUCTION`, with ``{models}`` where they are to stand: that a router was taught with.

    Raises InputError for an empty question, no models, a description of a model that there is not, and an instruction without models.
    """
    if instruction is not None and "{models}" not in instruction:
        raise InputError("the instruction has no {models}, where they are to stand")
    if not question.strip():
        raise InputError("the question is empty")
    if not models:
        raise InputError("a router needs at least one model to ask")
    unknown = [name for name in about if name not in models]
    if unknown:
        raise InputError(f"{unknown[0]!r} is described, and not among the models: {', '.join(models)}")
    lines = "\n".join(f"- {name}: {about.get(name) or 'nothing is known of it'}" for name in models)
    told = (INSTRUCTION if instruction is None else instruction).replace("{models}", lines)
    return told + (WARNING if warns else "") + QUESTION.format(question=question.strip())


def agent_prompt(query: str, tokens: int) -> str:
    """What a model of the pool is asked."""
    return AGENT.format(query=query, tokens=tokens)
