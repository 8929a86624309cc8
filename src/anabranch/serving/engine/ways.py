"""`Ways`: how requests go through the model, by its compiled form or by its modules, and which of them alike."""

from dataclasses import replace

from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.passes import Variant
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.fast import FastDecoder, Watch

__all__ = ["Ways"]


class Ways:
    """Says it of each step anew, as listeners come and go.

    Args:
        requests: that the runner has.
        fast: the compiled form of the model; None where there is none.
        watch: who listens inside the model.
    """

    def __init__(self, requests: UnderWay, fast: FastDecoder | None, watch: Watch) -> None:
        self._requests, self._fast, self.watch = requests, fast, watch

    @property
    def is_watched(self) -> bool:
        """Whether anyone listens inside the model, or to routers beside it."""
        adapters = self._requests.adapters
        return self.watch.is_watched or (adapters is not None and adapters.is_watched)

    @property
    def is_one(self) -> bool:
        """Whether no request goes another way than the others."""
        requests = self._requests
        if requests.variants or requests.overrides is not None:
            return False
        adapters = requests.adapters
        return adapters is None or not (adapters.is_used or adapters.tasks)

    def of(self, chunk: Chunk) -> Variant:
        """How a request runs the model."""
        requests = self._requests
        own = requests.variants.of(chunk.id)
        if requests.overrides is not None:
            own = requests.overrides.variant_of(chunk.id, own)
        adapters = requests.adapters
        if adapters is None:
            return own
        own = replace(own, task=adapters.task_of(chunk.id)) if adapters.tasks else own
        if not adapters.is_of(chunk.id):
            return own
        is_usual = own.path is None and own.chooser is None and not own.is_pruned
        is_compiled = is_usual and self.compiled() is not None and adapters.is_compiled(chunk)
        return own if is_compiled else replace(own, is_adapted=True)

    def compiled(self) -> FastDecoder | None:
        """The compiled step where there is one, and nobody listens whom it would run past."""
        return None if self._fast is None or self.watch.is_watched else self._fast

    def compiled_for(self, variant: Variant) -> FastDecoder | None:
        """The same, for requests that run the model so: it knows no path but the usual one."""
        is_usual = variant.path is None and variant.chooser is None and not variant.is_adapted and variant.task is None
        return self.compiled() if is_usual and not variant.is_pruned else None
