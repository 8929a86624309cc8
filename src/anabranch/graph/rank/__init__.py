"""G-Rank."""
