"""Query -> model: an OpenAI-compatible gateway whose routing is learned, judged and explained.

Nothing here imports torch unless a strategy or an embedder that needs it is used.
"""
