"""What attackers of the simulator do: sybils that lift one term's last results, inflation of the log, and rows in the names of others."""

from dataclasses import dataclass, field
from typing import Literal

from anabranch.errors import InputError
from anabranch.graph.rank.simulated import Simulated

Kind = Literal["sybil", "inflation"]


@dataclass
class Attack:
    """Attackers, who join, wait, and then all write their rows at once.

    Attributes:
        kind: "sybil": clicks on the last result of one term; "inflation": clicks on random results of random terms.
        attackers: how many nodes.
        queries: rows that each writes.
        join_at: tick.
        attack_at: tick; from then on attackers are also among the acting nodes.
        aim: for "sybil", "last": each click goes to the last result as the attacker then has it (the paper's); "one": all go to
            one item, the globally last of the term at the time.
        forge: rows are written in the names of random honest nodes.
        term: place of the attacked term; None for "inflation". Default: the first.
        target: (term, item) places that "one" lifts, once the attack has begun.
    """

    kind: Kind = "sybil"
    attackers: int = 10
    queries: int = 100
    join_at: int = 2500
    attack_at: int = 5000
    aim: Literal["last", "one"] = "last"
    forge: bool = False
    term: int | None = 0
    target: tuple[int, int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.kind not in ("sybil", "inflation") or self.aim not in ("last", "one"):
            raise InputError(
                f"kind is {self.kind!r} and aim {self.aim!r}; they are 'sybil' or 'inflation', 'last' or 'one'"
            )
        if self.attackers < 1 or self.queries < 1 or not 0 < self.join_at <= self.attack_at:
            raise InputError("an attack has at least one attacker and one query, and its nodes join before they attack")
        if self.kind == "inflation":
            self.term = None

    def act(self, network: Simulated, attacker: int) -> None:
        """Write the rows of one attacker."""
        generator = network.generator
        if self.kind == "sybil" and self.aim == "one" and self.target is None and self.term is not None:
            of = network.of_term[self.term]
            clicks = network.global_clicks()[self.term, of]
            self.target = self.term, int(of[::-1][clicks[::-1].argmin()])
        for _ in range(self.queries):
            name = int(generator.integers(network.num_honest)) if self.forge else None
            if self.kind == "inflation":
                term = int(generator.integers(network.num_terms))
                network.write(attacker, term, network.draw(network.of_term[term]), name)
            elif self.target is not None:
                network.write(attacker, *self.target, name)
            elif self.term is not None:
                ranked = network.rank(attacker, self.term)
                if len(ranked):
                    network.write(attacker, self.term, int(ranked[-1]), name)


def paper_attack(name: str, **changes: object) -> Attack:
    """The paper's attacks: "targeted" (10 attackers, 100 queries), "inflation" (10, 1,000 random clicks), "epic" (300, 100 queries).

    Raises InputError for another name.
    """
    known: dict[str, dict[str, object]] = {
        "targeted": {},
        "inflation": {"kind": "inflation", "queries": 1000},
        "epic": {"attackers": 300},
    }
    if name not in known:
        raise InputError(f"attack is {name!r}; it is one of {', '.join(known)}")
    return Attack(**{**known[name], **changes})  # type: ignore[arg-type]
