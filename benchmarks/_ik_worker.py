"""ik_llama.cpp as a contestant: this file runs in an environment with ``ik-llama-cpp-python`` and is spoken to through pipes.

The package has no server and its own loop samples in Python, token by token of the vocabulary; so its library is called here as its server
does it: prompts in pieces, then one token of every sequence in each step, the largest logit chosen by numpy.

    python _ik_worker.py MODEL.gguf THREADS STREAMS CONTEXT [-rtr]

CONTEXT: tokens of all streams; ``-rtr``: weights are repacked as they are loaded, into memory of their own.

A line of JSON with work in (of each stream its requests: prompt, tokens to make), a line with answers out; see `_serving.Worker`.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any


def main(path: str, threads: int, streams: int, context: int, is_repacked: bool) -> None:
    # What the library prints of the model and the processor belongs to the log, not to the answers.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import IkContext, IkModel

    # The wrapper binds neither.
    library = api._lib
    system = library.llama_print_system_info
    system.restype = ctypes.c_char_p
    remove = library.llama_kv_cache_seq_rm
    remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    if is_repacked:
        # The wrapper passes this on to nobody.
        usual = api.llama_model_default_params

        def repacking() -> Any:
            params = usual()
            params.repack_tensors = True
            return params

        api.llama_model_default_params = repacking
    model = IkModel(path, use_mmap=not is_repacked)
    # Flash attention ends with "GGML_ASSERT(S > 0) failed" where several sequences share a step, built for this processor; from their
    # wheel the wrapper takes it off by itself.
    made = IkContext(model, n_ctx=context, n_threads=threads, flash_attn=False, n_seq_max=streams)
    most = min(made._n_ubatch, 512)

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Of entries (token, position, sequence, whether it is answered) the next token of each that is answered."""
        batch = api.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for place, (token, position, sequence, is_answered) in enumerate(entries):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = int(is_answered)
            if code := made.decode(batch):
                raise SystemExit(f"llama_decode gave {code}")
        finally:
            api.llama_batch_free(batch)
        found = []
        for place, entry in enumerate(entries):
            if entry[3]:
                logits = np.ctypeslib.as_array(made.get_logits(place), shape=(model.n_vocab,))
                found.append(int(logits.argmax()))
        return found

    print(f"system_info: {(system() or b'').decode()}", file=sys.stderr, flush=True)
    said.write("ready\n")
    said.flush()
    for line in sys.stdin:
        work = json.loads(line)
        answers = [[] for _ in work]
        # Of each stream the request it is at: tokens to read, position, tokens left to make.
        waiting = [list(requests) for requests in work]
        prompt: list[list[int]] = [[] for _ in work]
        position, left, last = [0] * len(work), [0] * len(work), [0] * len(work)
        while any(waiting) or any(left):
            for stream, requests in enumerate(waiting):
                if not left[stream] and requests:
                    remove(made.ctx, stream, -1, -1)
                    given, left[stream] = requests.pop(0)
                    prompt[stream], position[stream] = list(given), 0
                    answers[stream].append({"sent": time.perf_counter(), "times": [], "text": "", "ids": []})
            entries, room = [], most
            for stream in range(len(work)):
                if not left[stream]:
                    continue
                if not prompt[stream]:
                    entries.append((last[stream], position[stream], stream, True))
                    position[stream] += 1
                    room -= 1
            for stream in range(len(work)):
                piece = prompt[stream][: max(room, 0)]
                if not left[stream] or not piece:
                    continue
                prompt[stream] = prompt[stream][len(piece) :]
                is_whole = not prompt[stream]
                for number, token in enumerate(piece):
                    is_last = is_whole and number == len(piece) - 1
                    entries.append((token, position[stream] + number, stream, is_last))
                position[stream] += len(piece)
                room -= len(piece)
            found = decode(entries)
            now = time.perf_counter()
            for stream, token in zip([entry[2] for entry in entries if entry[3]], found, strict=True):
                answers[stream][-1]["times"].append(now)
                answers[stream][-1]["ids"].append(token)
                last[stream], left[stream] = token, left[stream] - 1
        said.write(json.dumps([answer for part in answers for answer in part]) + "\n")
        said.flush()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), "-rtr" in sys.argv[5:])
