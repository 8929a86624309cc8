"""How long does a step of GRPO take, acting and learning, beside TRL's?

grpo, C tokens      one rollout of 128 episodes (16 prompts of 64 tokens, 8 answers to each, C new tokens) and one optimizer step on all
                    of them: a Llama of 3 layers of 192 over 512 words, float32, no reference policy, the same loss (a mean over tokens,
                    no KL). Ours plays through the engine of `anabranch serve` in process; TRL's GRPOTrainer with transformers' generate,
                    and with transformers' continuous batching, whichever is quicker. bar: at most TRL's time

Does routing replay bring training and rollout together where experts decide?

replay, an engine in bfloat16
                    a mixture of experts (16, of which 2 work, in 3 layers of 192; 300 steps on the standard library's bytes) is played by
                    an engine in bfloat16 and scored in float32, as where a server in low precision plays for a trainer: the same 64
                    answers of 96 tokens to beginnings of files that it has not seen, with the experts of the rollout forced and
                    without. Compared is KL(engine || model), by Schulman's third estimator over the tokens that were drawn; spread is
                    over five models of other seeds. bar: half of what it is without. It ends where replay flips a single expert
replay, an engine in float32       likewise, as `anabranch rl train` plays: both are rounding, and nothing is asked

Answers are as long as they may be on both sides, since nothing ends one: equally many tokens are drawn, scored and learned from. What is
rewarded is the share of even tokens. Neither making trainers nor loading is in the time.

python benchmarks/rl_tokens.py --threads 2 --json benchmarks/results/rl_tokens.json           # needs trl, datasets, accelerate
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _harness import arguments, compare, finish, start
from anabranch.config import configclass
from anabranch.data import ByteTokenizer, DataConfig
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.nn.moe import MoE
from anabranch.rl import GRPO
from anabranch.rl.router_r1 import word_tokenizer
from anabranch.rl.tokens import Drawn, Outcome, PolicyEngine, TokenPolicy, TokenWorld, Told, padded
from anabranch.rl.tokens.scoring import compared, joined
from anabranch.routing import Router, TopK
from anabranch.train import Constant, RunConfig, TaskRunConfig, TrainConfig, Trainer

WORDS, PROMPT, QUESTIONS, GROUP = 512, 64, 16, 8
DIM, LAYERS, HEADS, HIDDEN = 192, 3, 6, 512
RATE, STEPS = 1e-4, 4
EXPERTS, CHOSEN, ANSWERS, ANSWER_TOKENS, LEARNED, SEEDS = 16, 2, 64, 96, 300, 5
# The standard library's own source, as bytes.
TEXT = DataConfig(sequence_length=128)
# Of the engine that plays.
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def prompts() -> np.ndarray:
    """Of as many questions as all steps take, int64 ``[questions, PROMPT]``."""
    return np.random.default_rng(0).integers(2, WORDS, (QUESTIONS * STEPS, PROMPT))


def worth(tokens: Sequence[int]) -> float:
    """The share of even tokens."""
    return sum(token % 2 == 0 for token in tokens) / max(len(tokens), 1)


class _Play:
    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt, self.said = prompt, ()

    def ends(self, turn: Sequence[int]) -> bool:
        return False

    def step(self, turn: tuple[int, ...]) -> Told:
        self.said = turn
        return Told()

    def outcome(self) -> Outcome:
        return Outcome(worth(self.said), {})


class Even(TokenWorld, kind="even"):
    """Write even tokens, as many as may be."""

    @configclass
    class Config(TokenWorld.Config):
        """Attributes: ``tokens`` of an answer."""

        tokens: int = 32

    vocab_size, num_questions, num_tests = WORDS, QUESTIONS * STEPS, 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.turn_tokens, self._prompts = config.tokens, prompts()

    def play(self, question: int, *, seed: int, split: str = "train") -> _Play:
        """See `TokenWorld`."""
        return _Play(tuple(int(token) for token in self._prompts[question]))


# Seconds in which contestants acted and learned.
_learned_s = 0.0


def learned_s() -> float:
    """A clock that stands still where nobody learns."""
    return _learned_s


def ours(tokens: int) -> Callable[[], None]:
    """So many steps, from new weights."""
    model = Decoder.Config(
        vocab_size=WORDS,
        dim=DIM,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=HEADS),
        feed_forward=SwiGLU.Config(hidden_dim=HIDDEN),
        tie_embeddings=True,
        max_positions=256,
    )
    task = GRPO.Config(
        world=Even.Config(tokens=tokens), model=model, questions=QUESTIONS, group=GROUP, slots=64, eval_episodes=1
    )
    train = TrainConfig(
        steps=STEPS,
        batch_size=QUESTIONS * GROUP,
        learning_rate=RATE,
        schedule=Constant.Config(),
        weight_decay=0.0,
        checkpoint_every=None,
        eval_every=None,
        device="cpu",
    )

    def work() -> None:
        global _learned_s
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(TaskRunConfig(task=task, train=train), Path(folder) / "run")
            # Of the steps alone: neither the evaluation nor the checkpoint at the end.
            _learned_s += trainer.fit().seconds
            trainer.stream.close()

    return work


def theirs(tokens: int, *, continuous: bool) -> Callable[[], None]:
    """The same by TRL."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = [f"w{number}" for number in range(WORDS - 2)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(words)._backend, pad_token="<unk>", eos_token="<eos>"
    )
    texts = [" ".join(words[token - 2] for token in row) for row in prompts()]
    shape = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [worth(each) for each in completion_ids]

    def work() -> None:
        global _learned_s
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            options = GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=QUESTIONS * GROUP,
                num_generations=GROUP,
                max_completion_length=tokens,
                generation_kwargs={"min_new_tokens": tokens},
                max_steps=STEPS,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                beta=0.0,
                loss_type="dapo",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                use_transformers_continuous_batching=continuous,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=LlamaForCausalLM(shape),
                reward_funcs=rewards,
                args=options,
                train_dataset=Dataset.from_dict({"prompt": texts}),
                processing_class=tokenizer,
            )
            begin = time.perf_counter()
            trainer.train()
            _learned_s += time.perf_counter() - begin

    return work


def case_of(precision: str) -> str:
    """The name of a row."""
    return f"replay, an engine in {precision}"


def mixture(seed: int, steps: int) -> Decoder:
    """A small mixture of experts that has learned so many steps of the standard library."""
    model = Decoder.Config(
        vocab_size=ByteTokenizer.vocab_size,
        dim=DIM,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=HEADS),
        feed_forward=MoE.Config(
            num_experts=EXPERTS, hidden_dim=HIDDEN // 4, router=Router.Config(select=TopK.Config(top_k=CHOSEN))
        ),
        max_positions=256,
    )
    train = TrainConfig(
        steps=steps, batch_size=16, learning_rate=2e-3, seed=seed, eval_every=None, checkpoint_every=None, device="cpu"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(RunConfig(model=model, data=TEXT, train=train), Path(folder) / "run")
        trainer.fit()
    made: Decoder = trainer.model
    return made.eval()


def beginnings(count: int) -> list[tuple[int, ...]]:
    """Of windows of files that nothing was learned from."""
    windows = (row_L for batch in TEXT.build().validation(batch_size=32) for row_L in batch.token_BL.tolist())
    return [tuple(row_L[:PROMPT]) for row_L in islice(windows, count)]


@torch.no_grad()
def apart(model: Decoder, dtype: torch.dtype, prompts: list[tuple[int, ...]], seed: int) -> dict[str, dict[str, float]]:
    """How far what an engine in ``dtype`` played is from what the model itself holds it for: with replay and without."""
    engine = PolicyEngine(copy.deepcopy(model).to(dtype), slots=64, max_positions=256, records=True)
    try:
        draws = [seed * len(prompts) + number for number in range(len(prompts))]
        played = engine.play([_Play(prompt) for prompt in prompts], draws, Drawn(turn_tokens=ANSWER_TOKENS))
        samples = padded(played, engine.layers)
    finally:
        engine.close()
    policy, found = TokenPolicy(model), {}
    for name, is_replayed in (("replay", True), ("without", False)):
        said, flipped, of = [], 0, 0
        for rows in torch.arange(len(prompts)).split(32):
            part = samples.rows(rows)
            scored = policy(
                part.token_BL,
                part.own_BL,
                real_BL=part.real_BL,
                route_BLAK=part.route_BLAK,
                is_replayed=is_replayed,
                commits=False,
            )
            said.append(scored.log_prob_BL)
            flipped, of = flipped + scored.flipped[0], of + scored.flipped[1]
        notes = compared(samples.rollout_BL, joined(said, samples), samples.own_BL)
        found[name] = {"kl": notes["rollout_divergence"], "gap": notes["rollout_gap"], "flipped": flipped / of}
    return found


def replay_rows(*, is_quick: bool) -> list[dict[str, Any]]:
    """A row for an engine of each precision. Raises SystemExit where replay flips an expert."""
    steps, answers, seeds = (60, 32, 2) if is_quick else (LEARNED, ANSWERS, SEEDS)
    prompts, rows = beginnings(answers), []
    models = [mixture(seed, steps) for seed in range(seeds)]
    for name, dtype in PRECISIONS.items():
        found = [apart(model, dtype, prompts, seed) for seed, model in enumerate(models)]
        if any(each["replay"]["flipped"] for each in found):
            raise SystemExit(f"an expert was flipped under replay by an engine in {name}: {found}")
        ours, theirs = ([each[how]["kl"] for each in found] for how in ("replay", "without"))
        # Where both are rounding there is no ratio to speak of, and one of them may be 0.
        ratios = [other / own if own > 0 else 1.0 for own, other in zip(ours, theirs, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row = {
            "case": case_of(name),
            "ours": statistics.median(ours),
            "peer": statistics.median(theirs),
            "ratio": round(statistics.median(ratios), 3),
            "spread": round(high - low, 3),
            "unit": "nats a token",
            "peer_name": "without replay",
            "flipped_replay": 0.0,
            "flipped_without": statistics.median(each["without"]["flipped"] for each in found),
            "gap_replay": max(each["replay"]["gap"] for each in found),
            "gap_without": max(each["without"]["gap"] for each in found),
            "models": seeds,
            "tokens": answers * ANSWER_TOKENS,
        }
        print(
            f"{row['case']:<34} KL {row['ours']:.3g} with, {row['peer']:.3g} without   ratio {row['ratio']:.2f} "
            f"± {row['spread'] / 2:.2f}   flipped 0 and {row['flipped_without']:.2%}",
            file=sys.stderr,
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    start(options)
    rows, packages = [], ["torch"]
    for tokens in (32,) if options.quick else (32, 128):
        name = f"grpo, {tokens} tokens"
        if options.only in name:
            packages = ["torch", "transformers", "trl"]
            peers = {"TRL": theirs(tokens, continuous=False)}
            if not options.quick:
                peers["TRL, continuous batching"] = theirs(tokens, continuous=True)
            row = compare(name, ours(tokens), peers, rounds=options.rounds, clock=learned_s)
            episodes = QUESTIONS * GROUP * STEPS
            rows.append({**row, "episodes_per_second": round(1e3 * episodes / row["ours"], 1)})
    if any(options.only in case_of(name) for name in PRECISIONS):
        rows += [row for row in replay_rows(is_quick=options.quick) if options.only in row["case"]]
    finish("rl_tokens", rows, options, packages)


if __name__ == "__main__":
    main()
