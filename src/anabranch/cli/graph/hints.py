"""Advice in faults of files, in options of commands instead of arguments of Python."""

from collections.abc import Iterator
from contextlib import contextmanager

from anabranch.errors import DataError, InputError

# What `read_graph` says, and what may be typed instead; nothing where no option does it and the rest says what to do.
OPTIONS = {
    "weight=None leaves it out, weight=COLUMN takes another": "--columns 0,1 leaves it out, --columns 0,1,COLUMN takes another",
    "ids='text' reads": "--ids text reads",
    "ids='numbers' as": "--ids numbers as",
    "`directed` says what all are": "--directed or --undirected says what all are",
    ", or say which they are": ", or say which they are by --columns SOURCE,TARGET",
    "; or `delimiter` says which": "",
    "; or `header` says which": "",
    "; or header=False says that it is a row": "; or --columns 0,1,2 says that it is a row",
    "; `delimiter` says what else": "; write it with commas or tabs",
    " (give `format` if it is of another kind)": "",
    " (give `format`)": "",
    "; `comment` says what comments begin with": ", or put # and a blank in front of it",
}
# Of tables of several kinds, whose ends no option says.
OF_KINDS = {", or say which they are if no id is in both": "", **OPTIONS, ", or say which they are": ""}


@contextmanager
def in_options(words: dict[str, str] = OPTIONS) -> Iterator[None]:
    """Faults of what is read within say options of commands, as ``words`` has them by what they stand for."""
    try:
        yield
    except (DataError, InputError) as error:
        text = str(error)
        for python, option in words.items():
            text = text.replace(python, option)
        if text == str(error):
            raise
        raise type(error)(text) from None
