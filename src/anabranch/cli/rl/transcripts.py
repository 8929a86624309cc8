"""What policies of tokens wrote: ``anabranch rl replay`` of their runs, and ``routers route`` by a router that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.output import fact, print_json, shell_word, wrote
from anabranch.cli.rl.own import kept_at
from anabranch.errors import ConfigError
from anabranch.files import atomic_write_text

if TYPE_CHECKING:
    from anabranch.rl.tokens.runs import Policy
    from anabranch.rl.tokens.trajectory import Trajectory

__all__ = ["route_question", "write_transcripts"]

_FORMS = (".txt", ".jsonl")


def write_transcripts(
    run: Path, out: Path, episode: int | None, episodes: int, seed: int | None, *, as_json: bool
) -> None:
    """Play episodes of an evaluation, one or all, and write down what was written in them."""
    from anabranch.rl.tokens.runs import judge_policy, load_policy

    if out.suffix.lower() not in _FORMS:
        raise ConfigError(
            f"--out is {out}; the run in {run} is of a model that writes: name a file that ends in .txt or .jsonl"
        )
    policy = load_policy(run, kept_at(run))
    first, many = (0, episodes) if episode is None else (episode, 1)
    played, rewards = judge_policy(policy, episodes=many, seed=seed, first=first)
    rows = [
        _row(policy, number, trajectory, reward)
        for number, (trajectory, reward) in enumerate(zip(played, rewards, strict=True), first)
    ]
    made = "".join(map(_as_text if out.suffix.lower() == ".txt" else _as_line, rows))
    atomic_write_text(out, made)
    if as_json:
        print_json({"folder": str(run), "file": str(out), "episodes": len(rows), "reward": sum(rewards) / len(rewards)})
        return
    fact("episodes", f"{len(rows)}, reward {sum(rewards) / len(rewards):.3f} on average")
    wrote(str(out), f"anabranch rl eval {shell_word(run)}")


def _row(policy: Policy, number: int, played: Trajectory, reward: float) -> dict[str, Any]:
    """An episode: what the world tells of it, and its texts in order with who wrote them."""
    assert played.outcome is not None
    return {
        "episode": number,
        **policy.task.world.row(played.outcome),
        "reward": reward,
        "is_cut": played.is_cut,
        "texts": _texts(policy, played),
    }


def _texts(policy: Policy, played: Trajectory) -> list[dict[str, str]]:
    """Prompt, turns and what was told, each as one text; ids where tokens mean no text."""
    tokenizer = policy.task.world.tokenizer
    parts: list[tuple[bool, list[int]]] = [(False, list(played.prompt))]
    for token, own in zip(played.tokens, played.own, strict=True):
        # The prompt is a text of its own, whoever writes first.
        if len(parts) == 1 or parts[-1][0] != own:
            parts.append((own, []))
        parts[-1][1].append(token)
    return [
        {
            "by": "policy" if own else "world",
            "text": " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids),
        }
        for own, ids in parts
    ]


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _as_text(row: dict[str, Any]) -> str:
    """To be read: what is told of the episode, then the texts, each under who wrote it."""
    facts = "".join(f"{name}: {value}\n" for name, value in row.items() if name != "texts")
    texts = "".join(f"\n[{one['by']}]\n{one['text'].strip()}\n" for one in row["texts"])
    return f"{'=' * 80}\n{facts}{texts}\n"


def route_question(run: Path, text: str, *, as_json: bool) -> None:
    """Let a router that was trained answer a question, asking the pool of its run: whom it asked what, and the answer.

    Raises ConfigError for a run that asks no pool of one's own.
    """
    from anabranch.rl.router_r1.own import OwnWorld
    from anabranch.rl.tokens.runs import load_policy, play_once

    policy = load_policy(run, kept_at(run))
    world = policy.task.world
    if not isinstance(world, OwnWorld):
        raise ConfigError(
            f"the run in {run} asks no pool of models: {type(world).__name__}; train one: anabranch rl train router-r1 --pool pool.toml"
        )
    played = play_once(policy, world.asked(text))
    assert played.outcome is not None
    facts: Any = played.outcome.facts
    calls = [{"model": name, "query": query} for name, query in facts.calls]
    if as_json:
        told = {
            "router": str(run),
            "answer": facts.answer,
            "calls": calls,
            "raw_cost": facts.cost,
            "turns": facts.turns,
        }
        print_json(told | {"faults": list(facts.faults), "texts": _texts(policy, played)})
        return
    fact("router", f"{run}, step {policy.step}")
    for call in calls:
        fact("asked", f"{call['model']}: {call['query']}")
    fact("answer", facts.answer or "none")
    fact("cost", f"{facts.cost:g} (tokens times dollars a million), {facts.turns} turns")
