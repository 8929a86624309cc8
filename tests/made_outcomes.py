"""What tests of the gateway's referee share: outcomes that were made up, and a small predictor that learns from them."""

import json

import numpy as np

from anabranch.config import Field, configclass
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.embed import Embedder

TOPICS = {"maths": "add the numbers", "poetry": "write verses about", "code": "fix the function"}
MODELS = ("small", "medium", "large")
# How often each model is right on a topic: no model is best at all of them.
SKILL = np.array([[0.2, 0.9, 0.6], [0.7, 0.3, 0.8], [0.1, 0.4, 0.9]])
COST = np.array([0.001, 0.004, 0.01])


def made_outcomes(num=120, seed=0):
    """Questions of three topics; which model answers well depends on the topic."""
    generator = np.random.default_rng(seed)
    topic = generator.integers(0, 3, num)
    names = list(TOPICS)
    words = [f"{TOPICS[names[at]]} {seed}.{row} {generator.integers(1000)}" for row, at in enumerate(topic)]
    score_NM = (generator.random((num, 3)) < SKILL[topic]).astype(float)
    return Recorded(
        query=tuple(words),
        models=MODELS,
        task=tuple(names[at] for at in topic),
        score_NM=score_NM,
        cost_NM=np.tile(COST, (num, 1)) * generator.uniform(0.8, 1.2, (num, 1)),
    )


def write_outcomes(path, data):
    """As JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row, text in enumerate(data.query):
            line = {
                "query": text,
                "task": data.task[row],
                "scores": dict(zip(data.models, data.score_NM[row].tolist(), strict=True)),
            }
            if data.cost_NM is not None:
                line["cost"] = dict(zip(data.models, data.cost_NM[row].tolist(), strict=True))
            file.write(json.dumps(line) + "\n")
    return path


class WordMeans(Predictor, kind="word_means"):
    """Expects of a query what those that share its first word scored; noise by the seed, where the config wants it."""

    @configclass
    class Config(Predictor.Config):
        noise: float = Field(default=0.0, ge=0)

    needs_vector = False

    def fit(self, data, *, seed=0):
        self.models = data.models
        first = [text.split()[0] for text in data.query]
        self.words = sorted(set(first))
        at_N = np.array([self.words.index(word) for word in first])
        self.mean_WM = np.array([np.nanmean(data.score_NM[at_N == at], axis=0) for at in range(len(self.words))])
        generator = np.random.default_rng(seed)
        self.mean_WM = self.mean_WM + self.config.noise * generator.normal(size=self.mean_WM.shape)
        return self

    def predict(self, data):
        at = [self.words.index(word) if word in self.words else -1 for word in (text.split()[0] for text in data.query)]
        return Prediction(quality_NM=np.vstack([self.mean_WM, self.mean_WM.mean(0)])[at])

    def explain(self, query):
        return {"word": query.text.split()[0]}

    def state(self):
        return {"mean_WM": self.mean_WM}, {"words": self.words}

    def load_state(self, arrays, facts):
        self.mean_WM, self.words = arrays["mean_WM"], facts["words"]


class Lengths(Embedder, kind="lengths"):
    """Knows of a text how long it is; learns nothing."""

    dim = 2

    def embed(self, texts):
        angle_N = np.array([len(text) for text in texts], float)
        return np.column_stack([np.cos(angle_N), np.sin(angle_N)]).astype(np.float32)
