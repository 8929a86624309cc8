"""Anabranch: routing at every scale of a learned system."""

__version__ = "0.1.0"
