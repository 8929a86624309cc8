"""Small models that write what a test taught them, for trainings on questions of one's own."""

import json

import torch

from anabranch.lm import save_model
from anabranch.rl.router_r1 import word_tokenizer
from anabranch.routers.router_r1.grammar import TAGS
from rl_router_small import tiny_decoder
from scripted_endpoint import chat

WORDS = (
    "- : ? ; Question small large who wrote book Ann Bob None nothing of it knows all dollars a million tokens 1 2 0.5 4 yes no"
).split()
ASKS = "<think> who </think> <search> small : who wrote it ? </search>"
ANSWERS = "<think> it </think> <answer> Ann </answer>"
QUESTIONS = [{"question": f"who wrote book {number} ?", "answers": ["Ann", "Ann Smith"]} for number in range(1, 25)]
FEW = ["--set", "task.questions=4", "--set", "task.world.instruction={models}", "--set", "task.world.turn_tokens=16"]
FEW += [
    "--set",
    "task.world.max_turns=2",
    "--set",
    "task.eval_episodes=2",
    "--set",
    "task.world.held_out=0.2",
    "--quiet",
]


def tokenizer():
    return word_tokenizer([*(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), *WORDS])


def taught(folder, texts, *, steps=80, vocabulary=None):
    """A model that has learned to write these texts, (prompt, what is written) each; saved in ``folder``."""
    words = vocabulary or tokenizer()
    model = tiny_decoder(words.vocab_size).build(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = [(words.encode(prompt), words.encode(said)) for prompt, said in texts]
    for step in range(steps):
        # Two at a time, so that a prompt that stands there with two answers is answered with either.
        loss = sum(_loss(model, *rows[(2 * step + place) % len(rows)]) for place in (0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(folder, model, words)
    return folder


def _loss(model, prompt, said):
    tokens = torch.tensor([prompt + said])
    logits_LV = model(tokens).logits_BLV[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits_LV, tokens[0, len(prompt) :])


def router(folder, models, *, question="who wrote book {} ?"):
    """One that asks ``small`` who wrote it, and then answers Ann, whatever it is told; ``models`` are lines of its prompt."""
    lines = "".join(f"- {name}: {about}\n" for name, about in models.items())
    informed = "\n\n<information> {} </information>\n\n"
    texts = [
        (f"{lines}\nQuestion: {question.format(number)}\n", ASKS + informed.format(said) + ANSWERS)
        for number in (1, 2)
        for said in ("Ann", "Bob", "nothing", "None")
    ]
    return taught(folder, texts)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(path, body):
    """An endpoint's model that knows who wrote it."""
    usage = {"prompt_tokens": 30, "completion_tokens": 5}
    return 200, chat("Ann") | {"usage": usage}, {}


def pool_file(files, url, **small):
    table = {"base_url": f'"{url}"', "reply_tokens": "8"}
    models = [
        '[models.small]\nabout = "knows all"\nprice = { input_usd = 1, output_usd = 4 }',
        *(f"{name} = {value}" for name, value in small.items()),
        "[models.large]\nprice = { output_usd = 2 }",
    ]
    text = "\n".join([*(f"{name} = {value}" for name, value in table.items()), *models])
    (files / "pool.toml").write_text(text + "\n")
    return files / "pool.toml"


def line(policy, out, *more, pool="pool.toml", name="router-r1", samples=8):
    return [
        "rl",
        "train",
        name,
        "--model",
        policy,
        "--data",
        "q.jsonl",
        "--pool",
        pool,
        "--samples",
        samples,
        "--out",
        out,
        *FEW,
        *more,
    ]
