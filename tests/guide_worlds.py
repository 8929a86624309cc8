"""What stands in the folder of whoever follows a guide: small files by the names it has; and how its commands are made small."""

import csv
import gzip
import json

from guides import Guide, Reader

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    name = 'thing'\n\n\n"
# A model, text and batches that take a second.
TINY = "--set model.dim=32 --set data.sequence_length=32 --set train.batch_size=4 --set train.eval_tokens=256 --data my-texts"
STEPS = f"--steps 2 {TINY}"
ON_MACHINES = "it names other machines; tests/cli/test_cluster_master.py, test_cluster_coordinate.py and test_two_hosts.py run the same"
FROM_INDEX = "it reads what the package index brings; tests/lm/test_small_models.py runs the same"
# A corridor of so many places, at whose end there is a reward.
MAZE = """
import gymnasium

class Maze(gymnasium.Env):
    def __init__(self, size=5):
        self.size, self.place = size, 0
        self.observation_space = gymnasium.spaces.Discrete(size)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return self.place, {}

    def step(self, action):
        self.place = min(max(self.place + (1 if action else -1), 0), self.size - 1)
        done = self.place == self.size - 1
        return self.place, float(done), done, False, {}

gymnasium.register("Maze-v0", entry_point=Maze, max_episode_steps=50)
"""
# What decides the sizes of Qwen3-30B-A3B, of its config.json.
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "use_sliding_window": False,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

GUIDES = {
    guide.page: guide
    for guide in (
        Guide("graph-guide.md"),
        Guide(
            "rl-guide.md",
            smaller={
                "anabranch rl train cartpole --samples": "--samples 4096",
                "anabranch rl eval": "--episodes 2",
                "anabranch rl train Acrobot-v1": "--samples 1024",
                "anabranch rl train package:Maze-v0": "--samples 1024",
                "anabranch rl train Pendulum-v1": "--samples 4096",
                "anabranch rl train grpo": "--samples 16 --set task.questions=4 --set task.group=4 --set task.world.turn_tokens=4 "
                "--set task.eval_episodes=4",
            },
        ),
        Guide(
            "quickstart.md",
            smaller={
                "anabranch eval runs/demo": "--tokens 512 --data my-texts",
                "anabranch report runs/demo": "--tokens 512 --data my-texts",
                "anabranch report path": "--tokens 512 --sequence-length 32 --data my-texts",
                "anabranch train demo --data": "--steps 2 --set model.dim=32 --set data.sequence_length=32",
                "anabranch train moe --data": "--steps 2 --set model.dim=32 --set data.sequence_length=32",
                "anabranch train demo --out runs/mine --resume": "--steps 3",
                "anabranch train dense": STEPS,
                "anabranch train moe --from": "--steps 2 --set train.batch_size=4 --data my-texts",
            },
            left_out={
                "torchrun": "tests/cli/test_torchrun.py runs the same",
                "anabranch chat small": FROM_INDEX,
                "anabranch generate gemma": FROM_INDEX,
                "anabranch eval qwen": FROM_INDEX,
                "anabranch doctor --build": "it compiles for a minute; tests/native runs the same",
            },
        ),
        Guide(
            "adapters-guide.md",
            smaller={
                "anabranch eval": "--tokens 256 --sequence-length 32",
                "anabranch adapt SmolLM2-135M": "--steps 2",
                "anabranch adapt --out runs/mine": "--steps 3",
                "anabranch adapters cluster pool": "--clusters 2 --method svd",
                "anabranch adapters report SmolLM2-135M pool": "--rows 2",
                "anabranch adapters eval SmolLM2-135M pool": "--answers 2",
            },
        ),
        Guide(
            "cluster-guide.md",
            smaller={
                "torchrun --nproc-per-node 4 -m anabranch train moe": STEPS,
                "torchrun --nproc-per-node 4 -m anabranch train demo": STEPS,
                "torchrun --nproc-per-node 2 -m anabranch train demo": "--steps 3",
                "torchrun --nproc-per-node 4 -m anabranch train tiny": f"{STEPS} --set train.batch_size=8",
                "torchrun --nproc-per-node 2 -m anabranch train --out runs/exact": "--steps 3",
            },
            left_out={
                "torchrun --nnodes": ON_MACHINES,
                "anabranch cluster coordinate": ON_MACHINES,
                "anabranch cluster master": ON_MACHINES,
            },
        ),
        Guide("gateway-guide.md"),
        Guide("thinking-guide.md"),
        Guide(
            "serving-guide.md",
            smaller={"anabranch report": "--tokens 512 --data my-texts"},
            left_out={
                "torchrun --nproc-per-node 2 -m anabranch serve": "tests/cli/test_serve_context.py runs the same"
            },
        ),
    )
}


def graph(reader: Reader) -> None:
    """Characters of a novel, a few edges more, labels, and clicks."""
    import networkx

    network = networkx.les_miserables_graph()
    edges = [(left, right, data["weight"]) for left, right, data in network.edges(data=True)]
    write(reader, "edges.csv", ["source", "target", "weight"], edges)
    write(reader, "new.csv", ["source", "target"], [("Valjean", "Somebody"), ("Somebody", "Javert")])
    sides = [(name, "many" if network.degree(name) > 6 else "few") for name in network]
    write(reader, "labels.csv", ["node", "label"], sides)
    users = ("alice", "bob", "carol")
    clicks = [
        (user, term, f"{term}-{(number * 7 + at) % 5}")
        for at, user in enumerate(users)
        for number in range(6)
        for term in ("jazz", "rock")
    ]
    write(reader, "clicks.csv", ["node", "term", "item"], clicks)


def answers(reader: Reader) -> None:
    """Which of sixteen answers to each of forty questions were right, of the tasks one in two, one in eight and none."""
    rows = [
        {
            "question": f"What is {number} * 23?",
            "task": ("sums", "proofs", "riddles")[number % 3],
            "samples": [number % 3 < 2 and (number * 5 + at * 7) % (2, 8)[number % 3] == 0 for at in range(16)],
        }
        for number in range(40)
    ]
    (reader.folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(reader: Reader) -> None:
    """Text to train on, and a trained model."""
    for folder, ending in (("my-texts", "py"), ("notes", "md")):
        (reader.folder / folder).mkdir()
        for number in range(30):
            (reader.folder / folder / f"{number}.{ending}").write_text(TEXT.replace("Thing", f"Thing{number}") * 4)
    (reader.folder / "letters.txt").write_text(TEXT * 8)
    reader.types(["anabranch", "train", "demo", "--out", "runs/demo", *STEPS.split()], ["lm"])


def models(reader: Reader) -> None:
    """Text, a trained model, and a mixture of experts in a folder of Hugging Face's."""
    from adapter_models import CONFIGS
    from anabranch.data import ByteTokenizer
    from anabranch.lm import export_huggingface

    texts(reader)
    model = CONFIGS["olmoe"]().replace(vocab_size=257).build(seed=0)
    export_huggingface(reader.folder / "path/to/olmoe", model, ByteTokenizer.Config().build(), family="olmoe")


def served(reader: Reader) -> None:
    """Text, a trained model and what was trained for it, a small model with adapters by the name of a larger one, a large one's config."""
    from anabranch.depth.ftp import TokenSkipper
    from anabranch.lm import load_model
    from depth_banks import saved_bank
    from skipped_models import router

    texts(reader)
    adapters(reader)
    (reader.folder / "adapters").mkdir()
    for name in ("french", "sql"):
        (reader.folder / f"{name}-lora").rename(reader.folder / "adapters" / name)
    (reader.folder / "runs" / "mhr").mkdir()
    (reader.folder / "my-mhr").rename(reader.folder / "runs" / "mhr" / "adapter")
    demo, _ = load_model(reader.folder / "runs" / "demo")
    saved_bank(reader.folder / "routers", demo)
    TokenSkipper(demo, [0.5] * len(demo.blocks), router()).save(reader.folder / "skipper.safetensors")
    (reader.folder / "Qwen3-30B-A3B").mkdir()
    (reader.folder / "Qwen3-30B-A3B" / "config.json").write_text(json.dumps(QWEN3))


def adapters(reader: Reader) -> None:
    """A small model by the name of a larger one, adapters for it, a pool of them, and rows of tasks."""
    from adapter_models import make_adapter
    from anabranch.data import ByteTokenizer
    from anabranch.lm import save_model
    from served_adapters import ATTENTION, INSTRUCTIONS, TASKS, layers_of, make_model, make_routers

    save_model(reader.folder / "SmolLM2-135M", make_model(), ByteTokenizer.Config().build())
    for name in ("my-lora", "french-lora", "sql-lora"):
        make_adapter(reader.folder / name, layers_of(ATTENTION), rank=4, seed=name)
    make_routers(reader.folder)
    (reader.folder / "multi_head_routed").rename(reader.folder / "my-mhr")
    (reader.folder / "notes.txt").write_text(TEXT * 20)
    rows = [
        {"task": name, "input": f"{INSTRUCTIONS[name]} Number {number}.", "output": f"Yes, {number}."}
        for number in range(12)
        for name in TASKS
    ]
    for name, some in (("rows.jsonl", rows), ("few-rows.jsonl", rows[:4])):
        (reader.folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))


def policies(reader: Reader) -> None:
    """A package with an environment, a small model by the name of a larger one, and questions."""
    from anabranch.data import ByteTokenizer
    from anabranch.lm import save_model
    from served_adapters import make_model

    save_model(reader.folder / "SmolLM2-135M-Instruct", make_model(), ByteTokenizer.Config().build())
    (reader.folder / "package.py").write_text(MAZE)
    asked = [{"question": f"What is {number} plus 4?", "answer": str(number + 4)} for number in range(30)]
    (reader.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def gateway(reader: Reader) -> None:
    """The config of another proxy, and recorded outcomes."""
    (reader.folder / "config.yaml").write_text(
        "model_list:\n"
        "  - model_name: local\n"
        "    litellm_params: {model: openai/small, api_base: 'http://127.0.0.1:9/v1', api_key: os.environ/LOCAL_KEY}\n"
        "    model_info: {input_cost_per_token: 0.000001, output_cost_per_token: 0.000002}\n"
        "router_settings: {num_retries: 2, timeout: 30}\n"
    )
    reader.environment["LOCAL_KEY"] = "a-key-of-the-operator"
    lines = [
        {
            "query": f"question {number} about {('cats', 'sums', 'code')[number % 3]}",
            "scores": {"small": number % 2, "large": number % 3 / 2},
        }
        for number in range(60)
    ]
    with gzip.open(reader.folder / "outcomes.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))


def write(reader: Reader, name: str, header: list[str], rows: list[tuple]) -> None:
    """A file of comma-separated values."""
    with open(reader.folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


WORLDS = {
    "graph-guide.md": graph,
    "quickstart.md": models,
    "adapters-guide.md": adapters,
    "rl-guide.md": policies,
    "cluster-guide.md": texts,
    "gateway-guide.md": gateway,
    "serving-guide.md": served,
    "thinking-guide.md": answers,
}
