"""`MultiRoundRouteEnv`: many episodes at once, with a pool that is a table, a function, or anything that replies.

    env = MultiRoundRouteEnv(pool, about={"small": "good at capitals; price 0.2"})
    prompts = env.reset(["Who ...?", "When ...?"])
    while not env.is_done:
        observations = env.step(policy(env.texts))          # a text for each episode that is not done, None for the others

Text in, text out; nothing here is random, so that the same texts and the same pool give the same episodes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from anabranch.errors import AnabranchError, BackendError, DataError, InputError, LimitError
from anabranch.routers.router_r1.episode import Asked, Episode, Rules, words
from anabranch.routers.router_r1.prompts import router_prompt
from anabranch.routers.router_r1.reward import Basis, raw_cost

# Questions of one step that are asked at a time.
AT_A_TIME = 10


@dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens, in dollars.

    Attributes:
        completion, prompt: tokens of the answer, of the question.
    """

    completion: float
    prompt: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model of the pool said.

    Attributes:
        text: of it.
        prompt_tokens, completion_tokens: that it took.
        is_counted: they were told; else they are the words of question and text, and what it cost is not known.

    Raises BackendError for a text or a count that is none: a pool is anybody's code, and what is no reply is a model that said nothing.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_counted: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise BackendError(f"a model replied with a {type(self.text).__name__}; it must be a text")
        counts = (self.prompt_tokens, self.completion_tokens)
        if not all(isinstance(count, int | float) and 0 <= count < float("inf") for count in counts):
            raise BackendError(
                f"a reply has {counts[0]!r} and {counts[1]!r} tokens; they must be numbers of at least 0"
            )


class RoutePool(Protocol):
    """Models that may be asked."""

    @property
    def prices(self) -> Mapping[str, Price]:
        """Of each, by name; all that may be asked are here."""

    def reply(self, model: str, query: str) -> Reply:
        """What a model says. Raises an AnabranchError where it says nothing; it may be called from several threads.

        A LimitError says that nobody may be asked any more, and ends whatever asked.
        """


class FunctionPool:
    """A pool that is a function of model and question.

    Args:
        reply: gives a `Reply`, or a text, whose words count as its tokens.
        prices: of each model. One without a price is refused here, not taken for free.
    """

    def __init__(self, reply: Callable[[str, str], "Reply | str"], prices: Mapping[str, Price | float]) -> None:
        self._reply = reply
        self.prices = {name: _price(name, price) for name, price in prices.items()}
        if not self.prices:
            raise InputError("a pool needs at least one model with a price")

    def reply(self, model: str, query: str) -> Reply:
        """See `RoutePool`. Raises BackendError for whatever the function fails with."""
        try:
            found = self._reply(model, query)
            return found if isinstance(found, Reply) else Reply(found, len(query.split()), len(found.split()))
        except AnabranchError:
            raise
        except Exception as error:
            raise BackendError(f"{model} did not reply: {type(error).__name__}: {str(error)[:200]}") from error


class RecordedPool(FunctionPool):
    """A pool that is a table: what each model said to each question, so that nothing is asked of anybody.

    Args:
        rows: (model, question) to its reply; questions are looked up as they are, then by their words in any case.
        prices: of each model.
        other: what models say to questions that are not in the table; None has them fail.
    """

    def __init__(
        self,
        rows: Mapping[tuple[str, str], Reply | str],
        prices: Mapping[str, Price | float],
        *,
        other: str | None = None,
    ) -> None:
        unknown = sorted({model for model, _ in rows} - set(prices))
        if unknown:
            raise InputError(f"the table has {unknown[0]!r}, which has no price; priced: {', '.join(prices)}")
        self._rows, self._other = dict(rows), other
        self._folded = {(model, folded(query)): reply for (model, query), reply in rows.items()}
        super().__init__(self._look_up, prices)

    def _look_up(self, model: str, query: str) -> Reply | str:
        found = self._rows.get((model, query))
        found = self._folded.get((model, folded(query)), self._other) if found is None else found
        if found is None:
            raise DataError(f"{model} was not recorded with this question")
        return found


def folded(query: str) -> str:
    """A question as tables look it up: its words, in any case."""
    return " ".join(query.casefold().split())


def _price(name: str, price: Price | float) -> Price:
    made = price if isinstance(price, Price) else Price(float(price))
    if not (0 <= made.completion < float("inf") and 0 <= made.prompt < float("inf")):
        raise InputError(
            f"the price of {name} is {price!r}; it must be a number of at least 0, in dollars a million tokens"
        )
    return made


@dataclass(frozen=True, slots=True)
class Observation:
    """What a step of an episode came to.

    Attributes:
        text: that the environment wrote; "" for nothing.
        is_done: the episode is over.
        info: what the turn did (``action``), and of a call its ``model``, tokens and raw ``cost``.
    """

    text: str
    is_done: bool
    info: Mapping[str, Any] = field(default_factory=dict)


class MultiRoundRouteEnv:
    """See the module.

    Attributes:
        episodes: of the last `reset`.
        prompts: likewise.

    Args:
        pool: that is asked.
        about: descriptions of its models, all that a router knows of them.
        rules: of episodes.
        basis: what calls cost.
        warns: the prompt for base models.
        clip: a text's first so many tokens; None for its first so many words.
        prompt_characters: most of a prompt; a longer one is refused, never cut.

    Raises InputError for a description of a model that is not in the pool.
    """

    def __init__(
        self,
        pool: RoutePool,
        about: Mapping[str, str] | None = None,
        *,
        rules: Rules | None = None,
        basis: Basis = "completion",
        warns: bool = False,
        clip: Callable[[str, int], str] | None = None,
        prompt_characters: int = 100_000,
    ) -> None:
        self.pool, self.about, self.rules = pool, dict(about or {}), rules or Rules()
        self.basis, self._warns, self._clip, self._longest = basis, warns, clip or words, prompt_characters
        router_prompt("?", list(pool.prices), self.about)
        self.episodes: list[Episode] = []
        self.prompts: list[str] = []
        self._costs: list[float] = []

    def reset(self, questions: Sequence[str], about: Sequence[Mapping[str, str]] | None = None) -> list[str]:
        """Begin anew; the prompt of each question.

        Args:
            questions: at least one.
            about: other descriptions of the pool for each, in another order too: a router that learns should read them.

        Raises InputError for no question, an empty one, and a prompt that is too long.
        """
        if not questions:
            raise InputError("there is no question to begin with")
        each = [self.about] * len(questions) if about is None else list(about)
        if len(each) != len(questions):
            raise InputError(f"there are {len(questions)} questions and {len(each)} descriptions of the pool")
        prompts, episodes = [], []
        for row, (question, told) in enumerate(zip(questions, each, strict=True)):
            names = [name for name in told if name in self.pool.prices]
            names += [name for name in self.pool.prices if name not in told]
            prompt = router_prompt(question, names, told, warns=self._warns)
            if len(prompt) > self._longest:
                raise InputError(
                    f"the prompt of question {row} has {len(prompt):,} characters; {self._longest:,} are allowed, and none is cut"
                )
            prompts.append(prompt)
            episodes.append(Episode(question, self.rules, tuple(self.pool.prices), self._clip))
        self.prompts, self.episodes, self._costs = prompts, episodes, [0.0] * len(episodes)
        return list(prompts)

    @property
    def is_done(self) -> bool:
        """All are over."""
        return all(episode.is_done for episode in self.episodes)

    @property
    def texts(self) -> list[str | None]:
        """Prompt and all that was written, of each episode; None of one that is over."""
        return [
            None if episode.is_done else prompt + episode.text
            for prompt, episode in zip(self.prompts, self.episodes, strict=True)
        ]

    @property
    def costs(self) -> list[float]:
        """c of each episode so far, in raw units."""
        return list(self._costs)

    def step(self, texts: Sequence[str | None]) -> list[Observation | None]:
        """A turn of each episode: what the router wrote in, what the environment writes out; None for those that were over.

        Questions of one step are asked at the same time. Raises InputError for another number of texts, for one where an episode is over,
        and for none where it is not.
        """
        if len(texts) != len(self.episodes):
            raise InputError(f"there are {len(self.episodes)} episodes and {len(texts)} texts")
        for row, (text, episode) in enumerate(zip(texts, self.episodes, strict=True)):
            if (text is None) != episode.is_done:
                raise InputError(
                    f"episode {row} is {'over' if episode.is_done else 'not over'}; give {'None' if episode.is_done else 'a text'}"
                )
        before = [len(episode.parts) for episode in self.episodes]
        asked = {row: self.episodes[row].feed(text) for row, text in enumerate(texts) if text is not None}
        replies = self._replies({row: one for row, one in asked.items() if one is not None})
        found: list[Observation | None] = []
        for row, episode in enumerate(self.episodes):
            found.append(None if row not in asked else self._observed(row, episode, before[row], asked[row], replies))
        return found

    def _replies(self, asked: Mapping[int, Asked]) -> dict[int, Reply | None]:
        def reply(one: Asked) -> Reply | None:
            try:
                return self.pool.reply(one.model, one.query)
            except LimitError:
                raise
            except AnabranchError:
                return None

        if not asked:
            return {}
        with ThreadPoolExecutor(min(AT_A_TIME, len(asked))) as threads:
            return dict(zip(asked, threads.map(reply, asked.values()), strict=True))

    def _observed(
        self, row: int, episode: Episode, before: int, asked: Asked | None, replies: Mapping[int, Reply | None]
    ) -> Observation:
        info: dict[str, Any] = {}
        if asked is not None:
            reply = replies[row]
            episode.inform(None if reply is None else reply.text)
            info = {"model": asked.model, "query": asked.query}
            if reply is not None:
                price = self.pool.prices[asked.model]
                call = (reply.prompt_tokens, reply.completion_tokens, price.prompt, price.completion)
                cost = raw_cost([call], self.basis)
                self._costs[row] += cost
                info |= {
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                    "cost": cost,
                }
        text = "".join(part for part, is_router in episode.parts[before:] if not is_router)
        return Observation(text, episode.is_done, {"action": episode.actions[-1], **info})
