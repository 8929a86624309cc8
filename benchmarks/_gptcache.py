"""What does GPTCache itself answer, given the same vectors? Run in an environment of its own (gptcache==0.1.44, faiss-cpu, sqlalchemy).

    python benchmarks/_gptcache.py IN.npz OUT.json

IN: ``stored_ND`` and ``asked_QD`` (float32, length 1) and ``answer_N`` (strings). OUT: for each request the answer served, or null for a
miss, at GPTCache's own defaults: FAISS by squared L2, `SearchDistanceEvaluation`, similarity_threshold 0.8. Its score is (4 - d) / 4 =
(1 + cosine) / 2, so that 0.8 is a cosine of 0.6.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from gptcache import Cache, Config
from gptcache.adapter.api import get, put
from gptcache.manager import CacheBase, VectorBase, get_data_manager
from gptcache.similarity_evaluation.distance import SearchDistanceEvaluation


def main() -> None:
    given = np.load(sys.argv[1])
    stored_ND, asked_QD, answer_N = given["stored_ND"], given["asked_QD"], given["answer_N"].tolist()
    vectors = {f"s{row}": vector for row, vector in enumerate(stored_ND)} | {
        f"q{row}": vector for row, vector in enumerate(asked_QD)
    }
    folder = tempfile.mkdtemp()  # left there: GPTCache writes to it once more at exit
    manager = get_data_manager(
        CacheBase("sqlite", sql_url=f"sqlite:///{folder}/cache.db"),
        VectorBase("faiss", dimension=stored_ND.shape[1], index_path=f"{folder}/faiss.index"),
        max_size=len(stored_ND) + 1,
    )
    cache = Cache()
    cache.init(
        pre_embedding_func=lambda data, **_: data["prompt"],
        embedding_func=lambda name, **_: vectors[name],
        data_manager=manager,
        similarity_evaluation=SearchDistanceEvaluation(),
        config=Config(similarity_threshold=0.8),
    )
    for row, answer in enumerate(answer_N):
        put(f"s{row}", answer, cache_obj=cache)
    served = [get(f"q{row}", cache_obj=cache) for row in range(len(asked_QD))]
    Path(sys.argv[2]).write_text(json.dumps(served))


if __name__ == "__main__":
    main()
