"""One request's life, and what is asked of models beside it."""
