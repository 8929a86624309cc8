"""Serving over HTTP: OpenAI's surface in front of any `EngineClient`, with limits, a page and metrics.

    config              what a server is told
    app                 routes, and what is the same for all of them
    asked               one request: who asks, until when, what the log says of it
    context             the same, which came by HTTP
    inside              the same, from this process: a server's answers without its socket
    fields              what a request may say: every parameter, its type and range
    generation_request  a checked request: prompts as tokens, sampling, what to show
    frontend            the engine's life: loading, ready, crashed and restarted, draining
    generate            from a checked request to its answer
    choice              one sequence: tokens into text, stop strings, log probabilities
    shape               OpenAI's forms of an answer, whole and in events
    stream              server-sent events to readers fast and slow
    admin               drain, scale, cache, routes
    run                 the process, from its socket to its exit code

Needs the extra ``serve`` (aiohttp, prometheus-client).
"""
