"""Vectors by PecanPy's walks and gensim's skip-gram with negative sampling, as a baseline that takes minutes: can be stopped and goes on.

    python benchmarks/_skip_gram.py GRAPH.npz FOLDER --rounds 8

needs pecanpy and gensim (extra ``bench``, or another environment: nothing of ours is imported). DeepWalk's usual setting: 80 walks a
node of length 40, window 10, 128 dimensions, 5 negatives, the learning rate falling from 0.025. The work is cut into rounds of 10 walks
a node, each written to FOLDER when it is done, with the processor seconds it took; the learning rate goes on where it was.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

LENGTH, WINDOW, DIM, WALKS = 40, 10, 128, 10
FIRST_RATE, LAST_RATE = 0.025, 0.0001


def walks_of(edges_file: str, seed: int) -> list[list[str]]:
    """10 walks from each node with an edge."""
    from pecanpy import pecanpy

    graph = pecanpy.FirstOrderUnweighted(p=1, q=1, workers=1, verbose=False, random_state=seed)
    graph.read_edg(edges_file, weighted=False, directed=False)
    return graph.simulate_walks(num_walks=WALKS, walk_length=LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path, help="npz of source, target (integers) and num_nodes")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=8, help="of 10 walks a node each (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from gensim.models import Word2Vec

    options.folder.mkdir(parents=True, exist_ok=True)
    model_file, state_file = options.folder / "model.w2v", options.folder / "state.json"
    state = {"rounds": options.rounds, "seed": options.seed, "done": 0, "walk_cpu_s": 0.0, "train_cpu_s": 0.0}
    if state_file.exists():
        found = json.loads(state_file.read_text())
        if (found["rounds"], found["seed"]) != (options.rounds, options.seed):
            raise SystemExit(
                f"{options.folder} holds a run of {found['rounds']} rounds, seed {found['seed']}; choose another folder"
            )
        state = found
    given = np.load(options.graph)
    with tempfile.TemporaryDirectory() as scratch:
        edges_file = str(Path(scratch) / "graph.edg")
        np.savetxt(edges_file, np.column_stack([given["source"], given["target"]]), fmt="%d", delimiter="\t")
        walks_of(edges_file, 0)  # PecanPy's kernels are compiled before the clock counts
        for number in range(state["done"], options.rounds):
            started = time.process_time()
            walks = walks_of(edges_file, 1000 * options.seed + number)
            middle = time.process_time()
            if number:
                model = Word2Vec.load(str(model_file))
            else:
                model = Word2Vec(
                    vector_size=DIM,
                    window=WINDOW,
                    sg=1,
                    negative=5,
                    min_count=0,
                    workers=1,
                    seed=options.seed,
                    sample=0,
                )
                model.build_vocab(walks)
            fall = (LAST_RATE - FIRST_RATE) / options.rounds
            model.train(
                walks,
                total_examples=len(walks),
                epochs=1,
                start_alpha=FIRST_RATE + number * fall,
                end_alpha=FIRST_RATE + (number + 1) * fall,
            )
            state["walk_cpu_s"] += middle - started
            state["train_cpu_s"] += time.process_time() - middle
            state["done"] = number + 1
            model.save(str(model_file))
            state_file.with_suffix(".new").write_text(json.dumps(state))
            os.replace(state_file.with_suffix(".new"), state_file)
            print(f"round {number + 1} of {options.rounds}: {state}", flush=True)
    model = Word2Vec.load(str(model_file))
    vectors = np.zeros((int(given["num_nodes"]), DIM), np.float32)  # nodes without an edge stay 0
    for place, name in enumerate(model.wv.index_to_key):
        vectors[int(name)] = model.wv.vectors[place]
    np.save(options.folder / "vectors.npy", vectors)


if __name__ == "__main__":
    main()
