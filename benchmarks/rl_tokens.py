"""How long does a step of GRPO take, acting and learning, beside TRL's?

grpo, C tokens      one rollout of 128 episodes (16 prompts of 64 tokens, 8 answers to each, C new tokens) and one optimizer step on all
                    of them: a Llama of 3 layers of 192 over 512 words, float32, no reference policy, the same loss (a mean over tokens,
                    no KL). Ours plays through the engine of `anabranch serve` in process; TRL's GRPOTrainer with transformers' generate,
                    and with transformers' continuous batching, whichever is quicker. bar: at most TRL's time

Answers are as long as they may be on both sides, since nothing ends one: equally many tokens are drawn, scored and learned from. What is
rewarded is the share of even tokens. Neither making trainers nor loading is in the time.

python benchmarks/rl_tokens.py --threads 2 --json benchmarks/results/rl_tokens.json           # needs trl, datasets, accelerate
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _harness import arguments, compare, finish, start
from anabranch.config import configclass
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.rl import GRPO
from anabranch.rl.router_r1 import word_tokenizer
from anabranch.rl.tokens import Outcome, TokenWorld, Told
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer

WORDS, PROMPT, QUESTIONS, GROUP = 512, 64, 16, 8
DIM, LAYERS, HEADS, HIDDEN = 192, 3, 6, 512
RATE, STEPS = 1e-4, 4


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


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    start(options)
    rows = []
    for tokens in (32,) if options.quick else (32, 128):
        name = f"grpo, {tokens} tokens"
        if options.only in name:
            peers = {"TRL": theirs(tokens, continuous=False)}
            if not options.quick:
                peers["TRL, continuous batching"] = theirs(tokens, continuous=True)
            row = compare(name, ours(tokens), peers, rounds=options.rounds, clock=learned_s)
            episodes = QUESTIONS * GROUP * STEPS
            rows.append({**row, "episodes_per_second": round(1e3 * episodes / row["ours"], 1)})
    finish("rl_tokens", rows, options, ["torch", "transformers", "trl"])


if __name__ == "__main__":
    main()
