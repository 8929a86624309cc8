"""`InsideConfig`: what `Inside` is told. Reading it needs neither torch nor a model."""

from anabranch.config import Config, Field, configclass
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.admission import AdmissionConfig
from anabranch.serving.http.config import HttpConfig, Limits, ReasoningFormat, ToolFormat

# Bytes of a body; whoever asks from this process has held it to a limit already.
BODY_BYTES = 1 << 30


@configclass
class InsideConfig(Config):
    """An engine in this process, and what is before it. The names are those of ``anabranch serve``.

    Attributes:
        engine: see `ServingConfig`; ``model`` must be given.
        admission: how many sequences may be under way and wait; more are refused at once.
        reasoning_format, tool_format, restarts: see `HttpConfig`.
    """

    engine: ServingConfig = ServingConfig(process=False)
    admission: AdmissionConfig = AdmissionConfig()
    reasoning_format: ReasoningFormat = "auto"
    tool_format: ToolFormat = "auto"
    restarts: int = Field(default=3, ge=0)

    def check(self) -> None:
        """Read the model's config and tokenizer, not its weights. Raises as loading would; see `ServeConfig.check_model`."""
        from anabranch.serving.http.serve import ServeConfig

        ServeConfig(engine=self.engine).check_model()

    @property
    def http(self) -> HttpConfig:
        """What the parts of a server are told that has no socket."""
        return HttpConfig(
            name=self.engine.name or None,
            admission=self.admission,
            reasoning_format=self.reasoning_format,
            tool_format=self.tool_format,
            restarts=self.restarts,
            limits=Limits(body_bytes=BODY_BYTES, bodies_bytes=BODY_BYTES, deadline_s=None),
            access_log=False,
            page=False,
        )
