"""tbd."""


def study() -> None:
    """Tbd."""
