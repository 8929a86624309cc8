"""What a text shows at a glance: code, mathematics, language, difficulty. Counting and pattern matching only, some tens of microseconds."""

import re
from dataclasses import dataclass

# Characters of a text that are looked at, so that a long one costs no more.
LOOKED_AT = 8_000


@dataclass(frozen=True)
class _Words:
    """Words, beginnings of words and phrases; looked up word by word, which is ten times as quick as one long pattern."""

    words: frozenset[str]
    stems: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()

    def count(self, text: str) -> int:
        """How often they occur in a text of lower case."""
        found = sum(word in self.words or word.startswith(self.stems) for word in _WORD.findall(text))
        return found + sum(text.count(phrase) for phrase in self.phrases)


_WORD = re.compile(r"[a-z]+")
# A line begins at its own white space: that of empty lines before it would be read anew from each of them.
_CODE = re.compile(
    r"^[^\S\n]*+(?:def|class|import|from|return|async def|public|private|static|void|const|let|var|func|fn|#include|package|using)\b"
    r"|^[^\S\n]*+(?:SELECT|INSERT|CREATE)\b|[{};]\s*$|=>|::|</?[a-z]+[^<>\n]{0,80}>|\w\([^()\n]{0,80}\)\s*[{:;]"
    r"|\bTraceback \(most recent call last\)|[a-z]Error\b|\bException\b",
    re.MULTILINE,
)
_CODE_WORDS = _Words(
    frozenset(
        "python javascript typescript java rust golang sql regex bash html css api json yaml docker kubernetes git debug function "
        "algorithm code".split()
    ),
    ("compile", "refactor"),
    ("shell script", "unit test", "stack trace", "pull request", "data structure"),
)
_LATEX = re.compile(r"\\(?:frac|sum|int|sqrt|prod|lim|begin|alpha|beta|theta|pi|infty|cdot|leq|geq)(?![a-zA-Z])")
_MATHS = re.compile(
    r"\$[^$\n]{1,200}\$|[\u2211\u222b\u221a\u221e\u2264\u2265\u2260\u2208\u2200\u2203\u03c0]"
    r"|\d\s*[-+*/\u00d7\u00f7^=]\s*\(?-?\d|\b[a-z]\s*\^\s*\d|\b[a-z]\s*=\s*-?\d|\bf\(x\)"
)
_MATHS_WORDS = _Words(
    frozenset(
        "prove proof theorem lemma equation integral derivative matrix polynomial probability algebra geometry calculus prime "
        "divisible modulo calculate compute percent triangle perimeter average".split()
    ),
    phrases=("solve for", "how many", "how much", "sum of", "product of"),
)
_HARD_WORDS = _Words(
    frozenset(
        "prove derive design strategy critique evaluate plan legal contract research essay comprehensive tradeoff tradeoffs".split()
    ),
    ("analys", "analyz", "architect", "diagnos", "optimis", "optimiz", "rigorous"),
    ("step by step", "in detail", "explain why", "compare and contrast", "trade-off", "in depth"),
)
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
)
_COMMON = {
    "en": "the of and to in is you that it for are with what how this be have not do does can which",
    "de": "der die das und ist nicht ein eine zu den mit von wie was ich sie für auf dem wird",
    "fr": "le la les et est une un des que pour dans qui pas sur au du ce vous je comment",
    "es": "el la los las y es una un que de en por para con no se como qué cómo del",
    "it": "il lo gli e è una un che di per con non si come del della sono cosa perché nel",
    "pt": "o os as e é uma um que de em por para com não se como do da você são",
    "nl": "de het een en is niet van dat op te voor met zijn hoe wat ik je aan er maar",
    "pl": "i w nie na się jest to że z do jak co dla po czy od tego",
    "sv": "och att det som en är på av för med inte den har jag hur vad ett om till kan",
}
_COMMON_OF = {language: frozenset(words.split()) for language, words in _COMMON.items()}


def has_code(text: str) -> bool:
    """Two signs of code, or a fence."""
    text = text[:LOOKED_AT]
    return "```" in text or len(_CODE.findall(text)) + _CODE_WORDS.count(text.lower()) >= 2


def has_maths(text: str) -> bool:
    """A command of LaTeX's mathematics, or two lesser signs."""
    text = text[:LOOKED_AT]
    return _LATEX.search(text) is not None or len(_MATHS.findall(text)) + _MATHS_WORDS.count(text.lower()) >= 2


def looks_hard(text: str) -> bool:
    """A word that asks for reasoning, or several questions at once."""
    text = text[:LOOKED_AT]
    return _HARD_WORDS.count(text.lower()) > 0 or text.count("?") >= 4


def language(text: str) -> str | None:
    """ISO 639-1 code: by script where that tells, else by the commonest words of nine languages; None if neither does."""
    text = text[:LOOKED_AT]
    letters = sum(character.isalpha() for character in text)
    for code, script in _SCRIPTS:
        if letters and len(script.findall(text)) >= 0.2 * letters:
            return code
    words = re.findall(r"[^\W\d_]+", text.lower())
    count = {code: sum(word in common for word in words) for code, common in _COMMON_OF.items()}
    best = max(count, key=lambda code: count[code])
    return best if count[best] >= max(1, 0.05 * len(words)) else None
