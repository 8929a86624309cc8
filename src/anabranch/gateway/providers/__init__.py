"""What upstreams are asked and what they answer, in one vocabulary."""

from anabranch.gateway.providers.provider import Answer, Failure, Provider, UpstreamError, UpstreamRequest, Usage

__all__ = ["Answer", "Failure", "Provider", "UpstreamError", "UpstreamRequest", "Usage"]
