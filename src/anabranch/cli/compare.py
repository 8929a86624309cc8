"""tbd."""


def compare() -> None:
    """Tbd."""
