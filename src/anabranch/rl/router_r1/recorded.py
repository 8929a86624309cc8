"""Router-R1 with questions of your own and a pool that was recorded: what each model said to each question stands in a file.

    {"question": "Who wrote the book?", "answers": ["Ann", "Ann Smith"]}                                     a line of questions.jsonl
    {"model": "small", "query": "Who wrote it?", "text": "Ann", "completion_tokens": 1}                      a line of table.jsonl

A router that asks what was not recorded is told nothing, so tables are of what routers ask: `LiveWorld` writes one.
"""

from __future__ import annotations

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.rl.router_r1.own import OwnWorld
from anabranch.routers.router_r1 import RecordedPool
from anabranch.routers.router_r1.kept_pool import read_table

__all__ = ["RecordedWorld"]


class RecordedWorld(OwnWorld, kind="recorded"):
    """See the module. Raises DataError for files that are not there or damaged, ConfigError for a model without a price."""

    @configclass
    class Config(OwnWorld.Config):
        """Of `OwnWorld`, and the pool.

        Attributes:
            table: file of what models said.
            prices: of a million completion tokens of each model; all that may be asked are here.
        """

        table: str = Field(min_length=1)
        prices: dict[str, float] = Field(min_length=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        try:
            self.begin(RecordedPool(read_table(config.table), config.prices))
        except InputError as error:
            raise ConfigError(str(error)) from None
