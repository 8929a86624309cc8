"""The gateway over HTTP: OpenAI's surface, an admin surface, a page, and nothing that decides.

    server      the process: sockets, signals, graceful stop, limits of connections
    app         routes, and what is the same for all of them
    openai      the /v1 routes
    responses   /v1/responses as chat, and chat as /v1/responses
    admin       keys, budgets, providers, strategies, decisions, reload
    sse         server-sent events

Needs the extra ``gateway`` (aiohttp, prometheus-client).
"""
