"""Serving over HTTP: OpenAI's surface in front of any `EngineClient`, with limits, a page and metrics.

    config      what a server is told
    fields      what a request may say: every parameter, its type and range
    asked       a checked request: prompts as tokens, sampling, what to show
    frontend    the engine's life: loading, ready, crashed and restarted, draining
    choice      one sequence: tokens into text, stop strings, log probabilities
    chat        chat completions, whole and streamed
    completions text completions, whole and streamed
    stream      server-sent events to readers fast and slow
    app         routes, and what is the same for all of them
    admin       drain, scale, cache, routes
    run         the process, from its socket to its exit code

Needs the extra ``serve`` (aiohttp, prometheus-client).
"""
