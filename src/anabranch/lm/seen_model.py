"""The files of a model as they are at one time, for whoever reads it at several: an engine and its front end, or an engine again."""

from pathlib import Path

from anabranch.errors import CheckpointError
from anabranch.lm.checkpoint import find_model
from anabranch.lm.gguf_file import part_files
from anabranch.lm.tensors import weight_files
from anabranch.seen_files import SeenFiles

__all__ = ["check_unchanged", "parts_of", "see_model"]

# What is read of a folder beside its weights: by `load_config`, `load_tokenizer`, `generation_defaults`, and of a model of sentences.
_READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "1_Pooling/config.json",
)


def parts_of(model: Path) -> list[Path]:
    """The files that a model is read from, of a folder or a file as `find_model` gives it; of a GGUF file all parts.

    What else lies beside them is no part of the model. Raises CheckpointError for an index of weights that cannot be read.
    """
    if not model.is_dir():
        return part_files(model)
    return sorted([*(model / name for name in _READ if (model / name).is_file()), *weight_files(model)])


def see_model(path: str | Path) -> SeenFiles:
    """What ``path``, as `anabranch.lm.load_model` takes it, is read from now. Raises CheckpointError if there is no model."""
    return SeenFiles.of(parts_of(find_model(path)))


def check_unchanged(seen: SeenFiles, where: str | Path) -> None:
    """Raise CheckpointError where the files of the model at ``where``, as `see_model` gave them, are no longer the same.

    A checkpoint of a training run that is newer than the one that was seen is no change of that.
    """
    paths = [Path(one.path) for one in seen.files]
    # Of the two that may be there the one in the folder itself is the shorter.
    folder = min((path.parent for path in paths if path.name == "config.json"), default=None)
    changed = seen.difference(SeenFiles.of(paths))
    if not changed and folder is not None and (new := sorted(set(parts_of(folder)) - set(paths))):
        changed = str(new[0])
    if changed:
        raise CheckpointError(
            f"{changed} is another file than when {where} was first read, so what was read of the model does not fit together; start "
            "again, once it is written"
        )
