"""The arms of `glider` on the adapter bench: instructions of two kinds, the experts of a seed, which both arms share, and their routing."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anabranch.adapters.adapt import Lora
from anabranch.adapters.glider import describe_expert
from anabranch.config import to_dict
from anabranch.files import sha256_of
from anabranch.lm import Decoder
from anabranch.studies.adapter_bench import (
    FEW,
    LEARNED,
    Bench,
    accuracy,
    bench_words,
    kept_folder,
    name_of,
    pair_rows,
    write_rows,
)
from anabranch.studies.harness import Metrics, Progress

if TYPE_CHECKING:
    from anabranch.studies.glider import Size

Kind = Literal["bench", "paraphrased"]

# By step: of an adapter, of the same adapter once more (its pool is calibrated on them), and of a query. Those of "bench" have words in
# common, as what one author writes of one task has; those of "paraphrased" have next to none.
_WORDINGS: dict[Kind, dict[str, tuple[str, str, str]]] = {
    "bench": {
        "reverse": ("reverse the order of its letters", "reverse the whole word", "write it in reverse"),
        "rot1": (
            "replace every letter by the next one of the alphabet",
            "shift each letter to the next in the alphabet",
            "move letters on by one in the alphabet",
        ),
        "drop vowels": ("remove all vowels", "leave out every vowel", "drop its vowels"),
        "swap ends": (
            "swap the first and the last letter",
            "exchange its first letter and its last",
            "let the letters at both ends swap places",
        ),
        "repeat last": (
            "repeat the last letter",
            "write the final letter again, so that it is repeated",
            "double the last letter",
        ),
        "sort": (
            "sort its letters from a to z",
            "sort the letters alphabetically",
            "put letters in alphabetical order",
        ),
        "cut last": ("cut off the last letter", "remove the letter at the end", "cut the final letter away"),
        "rotate left": (
            "rotate it to the left by one letter",
            "rotate the letters one place left",
            "move the first letter to the end",
        ),
    },
    "paraphrased": {
        "reverse": ("read it backwards", "turn the whole word around", "reverse the order of its letters"),
        "rot1": (
            "move each letter one place on in the alphabet",
            "shift letters by one",
            "replace every letter by the next",
        ),
        "drop vowels": ("leave out its vowels", "keep consonants alone", "remove a, e, i, o and u"),
        "swap ends": (
            "exchange the first and the last letter",
            "let its ends change places",
            "swap the letters at both ends",
        ),
        "repeat last": ("write the last letter twice", "double the final letter", "repeat the letter at the end"),
        "sort": (
            "order its letters from a to z",
            "put letters in the order of the alphabet",
            "sort the letters alphabetically",
        ),
        "cut last": ("drop the final letter", "leave the letter at the end away", "cut the last letter off"),
        "rotate left": (
            "put the first letter behind the last",
            "move the letter in front to the end",
            "rotate it to the left by one",
        ),
    },
}
_AROUND: dict[Kind, tuple[str, str, str]] = {
    "bench": (
        "Given a word, {} and then {}.",
        "First {}; afterwards {}.",
        "The answer is the word after two steps: {}, and {}.",
    ),
    "paraphrased": (
        "Take a word: {} first, and then {}.",
        "You get a word. Begin: {}. After that: {}.",
        "First {}; afterwards {}.",
    ),
}


def told(kind: Kind, pair: Sequence[str], wording: int) -> str:
    """What a task is: in the first or the second wording of its adapter (0, 1), or in that of a query (2)."""
    return _AROUND[kind][wording].format(*(_WORDINGS[kind][step][wording] for step in pair))


def pool_pairs(count: int) -> tuple[Any, ...]:
    """Pairs of steps of which none is another one turned round, so that their words tell them apart."""
    order = sorted({step for pair in LEARNED for step in pair})
    ascending = [pair for pair in LEARNED if order.index(pair[0]) < order.index(pair[1])]
    return tuple(ascending[:: max(1, len(ascending) // count)][:count])


def run(kind: Kind, size: "Size", seed: int, place: Path, progress: Progress) -> Metrics:
    """Ask all ways, with instructions of one kind."""
    from anabranch.studies.glider import Asking, measured

    pairs, others = pool_pairs(size.pool), FEW[: size.others]
    progress("base")
    bench = Bench.kept(size.bench)
    shared = experts(size, seed, bench, progress)
    pool: dict[str, Path] = {}
    for number, pair in enumerate(pairs):
        # A copy, since its instruction stands beside an adapter.
        pool[name_of(pair)] = place / str(number)
        shutil.copytree(shared / str(number), pool[name_of(pair)])
        describe_expert(pool[name_of(pair)], instruction=[told(kind, pair, wording) for wording in (0, 1)])
    by_name = {name_of(pair): pair for pair in (*pairs, *others)}

    def measure(model: Decoder, task: str, telling: Any) -> float:
        return accuracy(
            model, [by_name[task]], size.bench, routed=False, telling=lambda pair, rows: telling([task] * rows)
        )

    asked = {name: told(kind, pair, 2) for name, pair in by_name.items()}
    held_in, held_out = (Asking(tuple(name_of(pair) for pair in some), asked, measure) for some in (pairs, others))
    return measured(bench.folder, pool, held_in, held_out, progress)


def experts(size: "Size", seed: int, bench: Bench, progress: Progress) -> Path:
    """The folder of the adapters of `pool_pairs` with their gates, by number: trained once on a machine for both arms of a seed."""
    from anabranch.studies import glider

    words, _ = bench_words(size.bench)
    trained_by = {
        name: getattr(size, name)
        for name in ("pool", "rank", "rows", "steps", "gate_steps", "batch_size", "learning_rate", "gate_rate")
    }

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for number, pair in enumerate(pool_pairs(size.pool)):
            progress(f"adapter {number + 1} of {size.pool}")
            made = folder / f"work-{number}"
            rows = write_rows(
                folder / f"{number}.jsonl", pair_rows([pair], words, per_task=size.rows, seed=seed + number)
            )
            trained = glider.trained_expert(
                bench.folder,
                rows,
                made,
                Lora.Config(targets=("all",), rank=size.rank),
                seed,
                steps=(size.steps, size.gate_steps),
                rates=(size.learning_rate, size.gate_rate),
                batch=size.batch_size,
                length=96,
            )
            shutil.move(trained, folder / str(number))
            shutil.rmtree(made)
        return folder

    by = [sha256_of(Path(file)) for file in (__file__, glider.__file__)]
    return kept_folder(["experts of glider", seed, trained_by, to_dict(size.bench), *by], make)
