"""`Vocabulary`: the tokens of a tokenizer, in the form in which llguidance walks them."""
# Shapes: V tokens

import weakref

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError
from anabranch.serving.core.text import marks_of
from anabranch.serving.grammar.library import llguidance

__all__ = ["Vocabulary", "vocabulary_of"]


class Vocabulary:
    """Tokens by their bytes. Ids without a token and special tokens stand for no bytes and are never allowed.

    But for the marks that models say (`anabranch.serving.core.text.MARKS`): they stand for their text.

    Args:
        pieces: bytes of each token.

    Attributes:
        pieces: see above.
        size: V.
        end: a token after the last, which stands for the end of a text; a tokenizer may have none of its own, or several.
        walked: llguidance's own object.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.size = self.end = len(pieces)
        library = llguidance()
        # Slices make masks faster that take a millisecond anyway, and twice as long to begin.
        self.walked = library.LLTokenizer(library.TokenizerWrapper(_Pieces([*pieces, b"<end>"])), slices=[])


class _Pieces:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """No tokens: what a grammar forces is not tokenised."""
        return []


_known: "weakref.WeakKeyDictionary[Tokenizer, Vocabulary]" = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tokens of ``tokenizer``, walked once: half a second for 150,000.

    Raises InputError if they do not stand for fixed bytes (WordPiece), MissingExtraError without llguidance.
    """
    if tokenizer not in _known:
        marks = {token: text.encode() for token, text in marks_of(tokenizer).items()}
        pieces = [marks.get(token) or tokenizer.inner_bytes(token) for token in range(tokenizer.vocab_size)]
        if any(piece is None for piece in pieces):
            raise InputError(
                "a grammar needs tokens that stand for fixed bytes; this tokenizer's text depends on neighbours"
            )
        _known[tokenizer] = Vocabulary([piece or b"" for piece in pieces])
    return _known[tokenizer]
