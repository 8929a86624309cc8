"""What every HTTP server of ours is made of; it knows neither the gateway nor the engine.

    server      the process: sockets, signals, bounds of connections, uvloop
    readers     who does not read what is written to them is cut off
    answers     reading a body, answering in JSON, errors in OpenAI's form
    endpoint    an address that is asked, by the standard library alone
    api_error   `ApiError`, an answer that is an error
    body        JSON that is checked, and how an error shows a value
    json_text   JSON of whatever a client sent
    large_json  JSON of megabytes, in steps
    slices      answers of any size, made and written while all else goes on
    sse         server-sent events
    responses   /v1/responses as chat, and chat as /v1/responses
    ids         of requests

`server`, `answers` and `slices` need aiohttp (extras ``gateway`` and ``serve``).
"""
