"""The gateway over HTTP: OpenAI's surface, an admin surface, a page, and nothing that decides.

    app         routes, and what is the same for all of them
    openai      the /v1 routes
    admin       keys, budgets, providers, strategies, decisions, reload
    sse         whole answers as streams, and streams as whole answers

The process, sockets and bodies are those of `anabranch.web`.

Needs the extra ``gateway`` (aiohttp, prometheus-client).
"""
