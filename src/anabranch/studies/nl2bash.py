"""Requests for shell commands (NL2Bash, Lin et al. 2018, 12,607 pairs): read, split, and answers measured without a judge.

Token overlap favours handing out a neighbour's command word for word. What users lose with it are the arguments of their own request, so
the first measure here is: is it the right command, and does it hold the request's literals (paths, patterns, numbers) that belong in it?
"""

import gzip
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from anabranch.places import data_file
from anabranch.routers.ic_cache.example import literals
from anabranch.routers.wording import letters_and_digits

PAIRS, PAIRS_SOURCE = "qa/nl2bash.jsonl.gz", "TellinaTool/nl2bash, all.nl and all.cm"
TOKEN = re.compile(r"[^\s|;&()<>'\"`{}=,]+|[|;&<>]")
FENCE = re.compile(r"```(?:\w+\n|\n)?(.*?)(?:```|$)", re.S)


@dataclass(frozen=True)
class Pair:
    """A request and the command that answers it."""

    request: str
    command: str


def load_pairs(path: Path | None = None) -> list[Pair]:
    """All pairs, in the file's order, each request once (as `letters_and_digits` has it)."""
    with gzip.open(path or data_file(PAIRS, PAIRS_SOURCE), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found: dict[str, Pair] = {}
    for row in rows:
        found.setdefault(letters_and_digits(row["query"]), Pair(row["query"].strip(), row["command"].strip()))
    return list(found.values())


def split(pairs: list[Pair], held_out: int, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Held-out requests and the rest."""
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    return [pairs[at] for at in order[:held_out]], [pairs[at] for at in sorted(order[held_out:])]


def clean(answer: str) -> str:
    """The command in an answer: what a fence holds, else the first line that is not empty; without prompt sign and back-ticks."""
    fenced = FENCE.search(answer)
    lines = [line.strip() for line in (fenced[1] if fenced else answer).splitlines()]
    line = next((line for line in lines if line), "")
    return line.strip("`").removeprefix("$ ").strip()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the tokens, each as often as it occurs."""
    ours, theirs = Counter(TOKEN.findall(answer)), Counter(TOKEN.findall(reference))
    both = sum((ours & theirs).values())
    return 2 * both / (sum(ours.values()) + sum(theirs.values())) if both else 0.0


def first_command(text: str) -> str:
    """The first word, without sudo and a path before it."""
    words = [word for word in text.split() if word != "sudo"]
    return words[0].rpartition("/")[2] if words else ""


def wanted_literals(request: str, reference: str) -> frozenset[str]:
    """Literals of the request that belong in the command: those that its reference holds."""
    return frozenset(item for item in literals(request) if item in reference)


def argument_recall(answer: str, request: str, reference: str) -> float | None:
    """Share of those literals that the answer holds; None if there are none."""
    wanted = wanted_literals(request, reference)
    return sum(item in answer for item in wanted) / len(wanted) if wanted else None


def measure(answer: str, pair: Pair) -> dict[str, float | None]:
    """All measures of one answer. ``score`` is the mean of right command and argument recall, or the first alone."""
    right = float(first_command(answer) == first_command(pair.command))
    recall = argument_recall(answer, pair.request, pair.command)
    return {
        "right": right,
        "recall": recall,
        "f1": token_f1(answer, pair.command),
        "exact": float(answer.split() == pair.command.split()),
        "score": right if recall is None else (right + recall) / 2,
    }


# The generated work, in which the nearest answer is wrong by construction

OPPOSITE_TEMPLATES = (
    (
        "enable the {x} service at boot",
        "systemctl enable {x}",
        "disable the {x} service at boot",
        "systemctl disable {x}",
    ),
    ("start the {x} service", "systemctl start {x}", "stop the {x} service", "systemctl stop {x}"),
    ("mount the volume /mnt/{x}", "mount /mnt/{x}", "unmount the volume /mnt/{x}", "umount /mnt/{x}"),
    ("lock the account of user {x}", "passwd -l {x}", "unlock the account of user {x}", "passwd -u {x}"),
    ("compress the file {x}.log", "gzip {x}.log", "decompress the file {x}.log.gz", "gunzip {x}.log.gz"),
    ("create the directory {x}", "mkdir {x}", "remove the empty directory {x}", "rmdir {x}"),
    ("install the package {x}", "apt-get install {x}", "remove the package {x}", "apt-get remove {x}"),
    (
        "print lines of {x} that match error",
        "grep error {x}",
        "print lines of {x} that do not match error",
        "grep -v error {x}",
    ),
    ("sort {x}.csv in ascending order", "sort {x}.csv", "sort {x}.csv in descending order", "sort -r {x}.csv"),
    ("show the first 5 lines of {x}.txt", "head -n 5 {x}.txt", "show the last 5 lines of {x}.txt", "tail -n 5 {x}.txt"),
    (
        "add user {x} to the group docker",
        "gpasswd -a {x} docker",
        "remove user {x} from the group docker",
        "gpasswd -d {x} docker",
    ),
    ("allow port {n} in the firewall", "ufw allow {n}", "deny port {n} in the firewall", "ufw deny {n}"),
    (
        "find files in {x} newer than {n} days",
        "find {x} -mtime -{n}",
        "find files in {x} older than {n} days",
        "find {x} -mtime +{n}",
    ),
    (
        "bring the network interface {x} up",
        "ip link set {x} up",
        "bring the network interface {x} down",
        "ip link set {x} down",
    ),
    ("load the kernel module {x}", "modprobe {x}", "unload the kernel module {x}", "modprobe -r {x}"),
)
NAMES = (
    "alpha bravo cedar delta ember falcon garnet harbor indigo juniper kestrel lumen maple nectar onyx pepper quartz raven sierra tundra "
    "umber violet willow xenon yarrow zephyr"
).split()


@dataclass(frozen=True)
class Reversal:
    """A request, and the wrong answer that its nearest neighbour has.

    Attributes:
        pair: the request and its right command.
        reversed_command: of the stored request that differs in the one word that matters.
    """

    pair: Pair
    reversed_command: str


def reversals(count: int, *, seed: int = 0, opposites: bool = True) -> tuple[list[Reversal], list[Pair]]:
    """Requests, and the pool they meet: the same and the opposite request with other names and, with ``opposites``, the opposite with
    the same names, which then is the nearest.
    """
    draw = random.Random(seed)
    cases: list[Reversal] = []
    pool: dict[str, Pair] = {}
    for number in range(count):
        yes, yes_command, no, no_command = OPPOSITE_TEMPLATES[number % len(OPPOSITE_TEMPLATES)]
        if draw.random() < 0.5:
            yes, yes_command, no, no_command = no, no_command, yes, yes_command
        values = {"x": f"{draw.choice(NAMES)}{draw.randrange(10, 100)}", "n": str(draw.randrange(20, 9000))}
        others = [
            {"x": f"{draw.choice(NAMES)}{draw.randrange(100, 1000)}", "n": str(draw.randrange(9001, 9999))}
            for _ in "12"
        ]
        cases.append(Reversal(Pair(yes.format(**values), yes_command.format(**values)), no_command.format(**values)))
        stored = [(yes, yes_command, others[0]), (no, no_command, others[1])]
        for text, command, fill in [(no, no_command, values), *stored] if opposites else stored:
            pool.setdefault(text.format(**fill), Pair(text.format(**fill), command.format(**fill)))
    asked = {case.pair.request for case in cases}
    return cases, [pair for pair in pool.values() if pair.request not in asked]
