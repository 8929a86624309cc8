"""What an exception that a provider may not raise is called."""

import logging

from anabranch.gateway.logged_error import plain
from anabranch.gateway.providers.provider import Failure, UpstreamError

__all__ = ["as_failure"]

logger = logging.getLogger(__name__)


def as_failure(error: Exception, name: str) -> UpstreamError:
    """What went wrong at deployment ``name``. An exception that a provider may not raise is a fault of the provider, not of the request."""
    if isinstance(error, UpstreamError):
        return error
    logger.error("the provider of deployment %s failed", name, exc_info=error)
    return UpstreamError(
        Failure(
            kind="garbage", message=f"the provider of {name} failed ({type(plain(error)).__name__}); the log says how"
        )
    )
