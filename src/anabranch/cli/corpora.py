"""Which text a command reads: a file that was named, or the held-out text of the run a model comes from."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.cli.options import Passes
from anabranch.cli.output import say
from anabranch.cli.progress import Progress
from anabranch.data import Batch, DataConfig, Document, Stdlib, Tokenizer, Windows, corpus_at, corpus_windows
from anabranch.data.split import VALIDATION, labels_cut_inside, split
from anabranch.run_folder import task_kind
from anabranch.train import RunConfig, read_run_config, read_task_run_config

DEFAULT_LENGTH = 1024

# Tokens of one forward pass.
FORWARD_TOKENS = 4096

# Of the standard library that are told apart.
PACKAGES = 6


def run_of(model: str) -> RunConfig | None:
    """The config of the run that ``model`` is, or is a checkpoint of; None if it is no run on text.

    A run that learned routes is measured as the model that it began as.
    """
    path = Path(model)
    for folder in (path, path.parent.parent):
        if (folder / "checkpoints").is_dir() and (folder / "config.json").is_file():
            if task_kind(folder) is None:
                return read_run_config(folder)
            source = getattr(read_task_run_config(folder).task, "source", None)
            return None if source is None else run_of(source)
    return None


def default_length(run: RunConfig | None, max_positions: int) -> int:
    """Tokens of a window: as in training, else what the model reads, up to 1024."""
    return run.data.sequence_length if run else min(max_positions, DEFAULT_LENGTH)


def passes_of(model: str, length: int | None, *, all_logits: bool) -> Passes:
    """What `windows_of` this ``length`` (None for the default) make a model compute. Raises as `load_config`."""
    from anabranch.lm import load_config
    from anabranch.serving.memory.work import FLOAT, SCORED

    config = load_config(model)
    length = length or default_length(run_of(model), config.max_positions)
    tokens = max(FORWARD_TOKENS // length, 1) * length
    # Of pieces there are the parts, too.
    row = (SCORED + FLOAT) * config.vocab_size if all_logits else 0
    return Passes(tokens, tokens * row)


def say_defaults(model: str, text: str, length: int, *, run: RunConfig | None, is_chosen: bool) -> None:
    """Say on what a model is measured that is no training run, such as a converted one, where not all of it was chosen."""
    if run is None and not is_chosen:
        say(
            f"note: {model} is no training run: windows of {length} tokens of {text}; choose with --data and --sequence-length"
        )


def windows_of(
    data: str | None, run: RunConfig | None, tokenizer: Tokenizer, length: int, tokens: int | None = None
) -> tuple[Windows, str]:
    """Windows of ``length`` over all of ``data``, or over the run's (else the standard library's) held-out text; and its name."""
    options = {"batch_size": max(FORWARD_TOKENS // length, 1), "num_windows": tokens and max(tokens // length, 1)}
    if data is not None:
        return corpus_windows(corpus_at(data).build(), tokenizer, length, **options), data
    config = run.data if run else DataConfig()
    name = f"held-out text of {config.corpus.build().describe()}"
    return config.build(tokenizer).validation(sequence_length=length, **options), name


def labelled_windows(
    data: str | None, run: RunConfig | None, tokenizer: Tokenizer, length: int, tokens: int
) -> tuple[Windows, str]:
    """As `windows_of`, but where the text is the standard library's code alone, its largest packages are the domains."""
    windows, name = windows_of(data, run, tokenizer, length, tokens)
    config = run.data if run else DataConfig()
    if data is not None or len(windows.domains) > 1 or not isinstance(config.corpus, Stdlib.Config):
        return windows, name
    packages = _Packages(config)
    options = {"batch_size": max(FORWARD_TOKENS // length, 1), "num_windows": max(tokens // length, 1)}
    return corpus_windows(packages, tokenizer, length, **options), name


class _Packages(Stdlib):
    """The held-out documents of the standard library, labelled with the package they are in; small packages are ``other``."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config.corpus)
        self._fraction = config.validation_fraction

    def documents(self) -> Iterator[Document]:
        """See `Corpus`."""
        cut_inside = labels_cut_inside(super().documents(), self._fraction)
        kept = [
            replace(document, label=document.key.partition("/")[0] if "/" in document.key else "modules")
            for side, document in split(super().documents(), self._fraction, cut_inside)
            if side == VALIDATION
        ]
        sizes: dict[str, int] = {}
        for document in kept:
            sizes[document.label] = sizes.get(document.label, 0) + len(document.text)
        large = sorted(sizes, key=lambda label: -sizes[label])[:PACKAGES]
        for document in kept:
            yield document if document.label in large else replace(document, label="other")


class Tracked:
    """Windows whose reading is shown as progress."""

    def __init__(self, windows: Windows, quiet: bool) -> None:
        self._windows, self._quiet = windows, quiet
        self.domains = windows.domains

    def __iter__(self) -> Iterator[Batch]:
        done, total = 0, len(self._windows)
        with Progress(total, "window", quiet=self._quiet) as progress:
            for batch in self._windows:
                yield batch
                done += len(batch.token_BL)
                progress.update(done)


def domain_names(windows: Any, batch: Batch) -> Iterable[str]:
    """The name of each sequence's domain."""
    return [windows.domains[place] for place in batch.domain_B.tolist()]
