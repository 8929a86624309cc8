"""`Watch`: whether anyone listens inside a model. A compiled step calls no module, so it would run past them."""

from torch import nn
from torch.nn.modules import module as everywhere

__all__ = ["Watch"]


class Watch:
    """Looks at the forward hooks of the modules that ``model`` has now; those of the model itself do not count, as no step calls it."""

    def __init__(self, model: nn.Module) -> None:
        self._hooks = [
            hooks
            for name, module in model.named_modules()
            if name
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @property
    def is_watched(self) -> bool:
        """Whether a hook is there at the moment: a recorder's (`record_routing`) or anyone else's. A few microseconds."""
        return any(self._hooks) or bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
