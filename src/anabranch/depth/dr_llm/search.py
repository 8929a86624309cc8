"""Search of paths: for each question the shortest list of blocks on which the model answers rightly (Dr.LLM, arXiv 2510.12773).

One tree for each question, from the whole model; see `anabranch.depth.dr_llm.mcts` for selection and `moves` for what may be changed. A
path's reward is computed once, from its longest prefix that is known. Each question has a seed of its own, so that neither the order of
questions nor a stop in the middle changes what is found.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anabranch.depth.dr_llm.flips import Flip, FlipReport, decoys_of, probe_of
from anabranch.depth.dr_llm.mcts import TreeSearch
from anabranch.depth.dr_llm.moves import Steps, in_common, moves_of
from anabranch.depth.dr_llm.questions import Question, check_questions
from anabranch.depth.dr_llm.records import PathRow, PathsFile, digits_of, read_paths
from anabranch.depth.dr_llm.rewards import Reward, checked, identity_of, name_of
from anabranch.depth.dr_llm.runner import QuestionRuns
from anabranch.depth.dr_llm.settings import SearchConfig, seed_of
from anabranch.depth.stack import BlockStack
from anabranch.errors import DataError
from anabranch.lm.generate import evaluating

__all__ = ["SearchReport", "control_file", "control_of", "search_paths", "search_question"]

# Is told how many questions are done, of how many, and what is being done.
Progress = Callable[[int, int, str], None]


@dataclass
class SearchReport:
    """What a search found.

    Attributes:
        rows: of all questions, in their order.
        control: the null control of flips; None where it was not asked for.
        keeps_flips: whether flips may become labels.
    """

    rows: list[PathRow] = field(default_factory=list)
    control: FlipReport | None = None
    keeps_flips: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Numbers for people: counts, mean saving of what the whole model answers, and what prefixes saved."""
        right = [row for row in self.rows if row.base_right]
        saved = [row.num_blocks - len(row.path) for row in right if row.path is not None]
        flips = [row for row in self.rows if not row.base_right and row.path is not None]
        blocks, naive = (sum(getattr(row, name) for row in self.rows) for name in ("blocks", "blocks_naive"))
        return {
            "questions": len(self.rows),
            "base_right": len(right),
            "flips": len(flips),
            "keeps_flips": self.keeps_flips,
            "mean_saving": sum(saved) / len(saved) if saved else None,
            "shorter_by_3": sum(saving >= 3 for saving in saved) / len(saved) if saved else None,
            "evaluations": sum(row.evaluations for row in self.rows),
            "blocks": blocks,
            "blocks_naive": naive,
            "prefix_gain": naive / blocks if blocks else None,
            "control": None if self.control is None else self.control.to_dict(),
        }


def search_question(
    stack: BlockStack,
    question: Question,
    reward: Reward,
    config: SearchConfig | None = None,
    *,
    search: str = "",
    flips: bool = True,
) -> PathRow:
    """The tree of one question.

    Args:
        stack: of the model, in evaluation.
        question: what is asked.
        reward: of a path.
        config: settings; None for the paper's.
        search: what the row says of model and settings.
        flips: whether to search where the whole model is wrong; otherwise the row of such a question has its reward alone.

    Raises DataError for a reward that is not a finite number.
    """
    config = config or SearchConfig()
    num_blocks, whole = stack.num_blocks, tuple(range(stack.num_blocks))
    seed = seed_of(config.seed, question.id)
    runs = QuestionRuns(stack, config.keep_bytes)
    known: dict[Steps, float] = {}

    def value(path: Steps) -> float:
        if path not in known:
            known[path] = checked(reward(question, runs.on(path)), question)
        return known[path]

    tree = TreeSearch(
        whole,
        moves=lambda path: moves_of(path, num_blocks),
        cost=lambda path: len(path) / num_blocks,
        draw=random.Random(seed),
        exploration=config.exploration,
        penalty=config.penalty,
        random_share=config.random_share,
        widening=config.widening,
        weight=lambda path, move: (in_common(path, move) + 1) ** config.late,
    )
    base = value(whole)
    tree.back_up(tree.root, base)
    searched = flips or base >= config.right
    done = tree.run(value, config.simulations if searched else 0, stop=_stop(base, num_blocks, config))
    good = sorted((path for path, got in known.items() if got >= config.right), key=_preference)
    return PathRow(
        id=question.id,
        base_reward=base,
        base_right=base >= config.right,
        path=good[0] if good else None,
        good=tuple(digits_of(path, num_blocks) for path in good),
        evaluations=len(known),
        simulations=done,
        blocks=runs.blocks,
        blocks_naive=runs.naive,
        seed=seed,
        num_blocks=num_blocks,
        searched=searched,
        prompt=question.prompt,
        search=search,
        question=question.content(),
        model=stack.fingerprint(),
    )


def _stop(base: float, num_blocks: int, config: SearchConfig) -> Callable[[Steps, float], bool]:
    """Whether a path ends the search: any right one where the whole model is wrong, else one that is short enough."""

    def stop(path: Steps, reward: float) -> bool:
        if reward < config.right:
            return False
        if base < config.right:
            return True
        return config.stop_saving is not None and len(path) + config.stop_saving <= num_blocks

    return stop


def _preference(path: Steps) -> tuple[int, int, Steps]:
    """Shorter before longer, fewer different blocks before more, then in order of blocks."""
    return len(path), len(set(path)), path


def control_file(out: str | Path) -> Path:
    """Where the null control of a file of paths lies: beside it."""
    place = Path(out)
    return place.with_name(f"{place.name.removesuffix('.jsonl')}.control.jsonl")


def control_of(out: str | Path, rows: Sequence[PathRow], significance: float = 0.05) -> FlipReport | None:
    """The null control that lies beside a file of paths, of whose rows it is; None where there is none, or it has not begun.

    Raises DataError where it is of another search, or no file of paths.
    """
    place = control_file(out)
    if not place.is_file():
        return None
    truth = {row.id: row for row in rows}
    decoys = read_paths(place, least=0)
    if not decoys:
        return None
    if decoys[0].search != rows[0].search:
        raise DataError(f"{place} is the control of another search than {out}; remove it, or search again")
    for row in decoys:
        if row.id in truth and truth[row.id].question != row.question:
            raise DataError(f"{place} has question {row.id!r} with another prompt or answer than {out}; search again")
    pairs = [
        Flip(row.id, truth[row.id].path is not None, row.path is not None)
        for row in decoys
        if row.id in truth and truth[row.id].searched
    ]
    return FlipReport.of(pairs, significance)


def search_paths(
    stack: BlockStack,
    questions: Sequence[Question],
    reward: Reward,
    config: SearchConfig | None = None,
    out: str | Path | None = None,
    *,
    progress: Progress = lambda done, total, what: None,
) -> SearchReport:
    """Search all questions, one row each.

    Questions that the whole model answers come first. The others, where flips are kept or asked for, are held against the null control:
    the same search towards an answer that is wrong (see `anabranch.depth.dr_llm.flips`).

    Args:
        stack: of the model, which is in evaluation meanwhile and is not changed.
        questions: each with an id of its own.
        reward: of a path, see `anabranch.depth.dr_llm.rewards`; with ``out``, one that has a name.
        config: settings; None for the paper's.
        out: file of JSON lines, which is gone on with if it is there; None keeps rows in memory. The control lies in `control_file`.
        progress: is told of each question.

    Raises DataError: no question, an id twice, a file of another search or of the same ids with other prompts or answers; ConfigError for a
    reward without a name where there is a file; what the reward and the model raise.
    """
    config = config or SearchConfig()
    if not questions:
        raise DataError("there are no questions to search; give at least one")
    check_questions(questions, "the questions", stack.vocabulary)
    search = config.digest(stack.fingerprint(), name_of(reward) if out is None else identity_of(reward))
    content = {question.id: question.content() for question in questions}
    with evaluating(stack.module):
        job = _Search(stack, questions, reward, config, search, progress)
        if out is None:
            return job.run({}, {}, lambda row: None, lambda row: None)
        with PathsFile.open(out, search) as paths, PathsFile.open(control_file(out), search) as control:
            paths.check_questions(content)
            control.check_questions(content)
            return job.run(paths.rows, control.rows, paths.add, control.add)


class _Search:
    """The order in which the questions of one set are done."""

    def __init__(
        self,
        stack: BlockStack,
        questions: Sequence[Question],
        reward: Reward,
        config: SearchConfig,
        search: str,
        progress: Progress,
    ) -> None:
        self._stack, self._questions, self._reward = stack, questions, reward
        self._config, self._search, self._progress = config, search, progress
        # What the whole model says of questions that it does not answer, as long as they are in no file.
        self._pending: dict[str, PathRow] = {}

    def run(
        self,
        rows: dict[str, PathRow],
        control: dict[str, PathRow],
        add: Callable[[PathRow], None],
        add_control: Callable[[PathRow], None],
    ) -> SearchReport:
        """All of it; ``rows`` and ``control`` are those that earlier runs left."""
        config = self._config
        found = dict(rows)

        def keep(row: PathRow) -> None:
            found[row.id] = row
            add(row)

        wrong = self._right_ones(found, keep)
        report = SearchReport(keeps_flips=config.flip_labels == "keep")
        if config.flip_labels == "auto":
            report.control = self._control(wrong, found, control, keep, add_control)
            report.keeps_flips = report.control.is_real
        self._wrong_ones(wrong, found, keep, searched=report.keeps_flips)
        # A file may hold questions that were asked for before and are not now.
        report.rows = [found[question.id] for question in self._questions if question.id in found]
        return report

    def _right_ones(self, found: dict[str, PathRow], keep: Callable[[PathRow], None]) -> list[Question]:
        """Search what the whole model answers; gives back the other questions."""
        config, wrong, total = self._config, list[Question](), len(self._questions)
        kept = 0
        for number, question in enumerate(self._questions):
            self._progress(number, total, "questions")
            row = found.get(question.id)
            if row is None:
                if config.quota is not None and kept >= config.quota:
                    break
                row = self._of(question, flips=False)
                if row.base_right:
                    keep(row)
                else:
                    self._pending[question.id] = row
            if row.base_right:
                kept += 1
            else:
                wrong.append(question)
        self._progress(total, total, "questions")
        return wrong

    def _control(
        self,
        wrong: list[Question],
        found: dict[str, PathRow],
        control: dict[str, PathRow],
        keep: Callable[[PathRow], None],
        add_control: Callable[[PathRow], None],
    ) -> FlipReport:
        """Search the questions of the probe towards their answer and towards a decoy."""
        config = self._config
        pairs: list[Flip] = []
        # One that earlier questions made needless to search stays so; one that was searched stays in the control.
        open_ones = [question for question in wrong if question.id not in found or found[question.id].searched]
        earlier = [question for question in open_ones if question.id in control]
        probe = earlier + [question for question in probe_of(open_ones, config) if question.id not in control]
        for number, question in enumerate(probe):
            self._progress(number, len(probe), "null control")
            row = control.get(question.id)
            if row is None:
                decoy = self._decoy(question)
                if decoy is None:
                    continue
                # A row of the control is of the question, whichever wrong answer it was searched towards.
                row = replace(self._of(decoy), question=question.content())
                add_control(row)
            pairs.append(
                Flip(question.id, self._searched(question, found, keep).path is not None, row.path is not None)
            )
        return FlipReport.of(pairs, config.significance)

    def _decoy(self, question: Question) -> Question | None:
        """The question with another wrong answer, which the whole model does not give either; None where there is none."""
        for decoy in decoys_of(question, self._questions, self._config.seed):
            if not self._answers(decoy):
                return decoy
        return None

    def _answers(self, question: Question) -> bool:
        """Whether the whole model gives the answer."""
        run = QuestionRuns(self._stack, 0).on(tuple(range(self._stack.num_blocks)))
        return checked(self._reward(question, run), question) >= self._config.right

    def _searched(self, question: Question, found: dict[str, PathRow], keep: Callable[[PathRow], None]) -> PathRow:
        row = found.get(question.id)
        if row is None:
            row = self._of(question)
            keep(row)
        return row

    def _wrong_ones(
        self, wrong: list[Question], found: dict[str, PathRow], keep: Callable[[PathRow], None], *, searched: bool
    ) -> None:
        """What the whole model does not answer: searched where flips are kept, else only written down."""
        for number, question in enumerate(wrong):
            self._progress(number, len(wrong), "flips")
            if question.id in found:
                continue
            if searched:
                self._searched(question, found, keep)
            else:
                keep(self._pending[question.id])

    def _of(self, question: Question, *, flips: bool = True) -> PathRow:
        return search_question(self._stack, question, self._reward, self._config, search=self._search, flips=flips)
