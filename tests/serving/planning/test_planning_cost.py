"""The calculator: the paper's formulas and its table by arithmetic, shapes of every design, hardware."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from anabranch import presets
from anabranch.adapters import LowRank
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.routed import RoutedLowRank
from anabranch.errors import CapacityError, ConfigError, DataError
from anabranch.lm import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.serving.planning.cost import Workload, estimate, fitting_devices, largest_batch, op_cost
from anabranch.serving.planning.hardware import PROFILES, Efficiency, Hardware, find_hardware
from anabranch.serving.planning.shape import PUBLISHED, find_shape, shape_of

A100 = find_hardware("a100", 8)
LLAMA = find_shape("llama-2-70b")

# Table 2 of the paper: LLaMA-2-70B on 8 A100, 512 tokens in and 1024 out, B = 2048. Milliseconds by compute, memory, network; measured.
TABLE = {
    "kqv": (11.01, 1.22, 0, 16.08),
    "o": (8.81, 1.01, 0, 16.01),
    "up_gate": (61.67, 6.04, 0, 69.92),
    "down": (30.84, 3.11, 0, 34.96),
    "decode_attention": (1.47, 28.89, 0, 35.60),
    "prefill_attention": (0.37, 0.13, 0, 4.56),
    "network": (0.01, 4.70, 31.33, 47.92),
}
TOTALS = (114.17, 45.09, 31.33)
ROUNDED = 0.013  # the table has two decimals, made of gigabytes of one


def test_table_of_the_paper_row_by_row():
    ours = {op.name: op for op in estimate(LLAMA, A100).operations}
    assert ours.keys() == TABLE.keys()
    for name, row in TABLE.items():
        op = ours[name]
        found = [1e3 * seconds for seconds in (op.compute_s, op.memory_s, op.network_s)]
        assert found == pytest.approx(row[:3], abs=ROUNDED), name
        assert 1e3 * op.duration_s == pytest.approx(row[3], rel=0.02), (
            name
        )  # the profile is fitted to what was measured


def test_totals_of_the_paper():
    ops = estimate(LLAMA, A100).operations
    found = [1e3 * sum(getattr(op, name) for op in ops) for name in ("compute_s", "memory_s", "network_s")]
    assert found == pytest.approx(TOTALS, abs=0.02)


def test_kqv_by_hand():
    """2 x 2048 tokens x 8192 x (8192 + 2 x 1024) x 80 layers; weights, what goes in and what comes out in 2 bytes."""
    op = op_cost("kqv", LLAMA, A100, Workload(), 2048)
    assert op.flops == 2 * 2048 * 8192 * 10240 * 80
    assert op.bytes == (8192 * 10240 + 2048 * (8192 + 10240)) * 2 * 80
    assert op.compute_s == op.flops / (8 * 312e12)


def test_collectives_move_four_activations_to_each_other_device():
    parts = [op_cost(name, LLAMA, A100, Workload(), 2048) for name in ("ag_attention", "ag_o", "ar_down")]
    sent = 4 * 7 * 2048 * 8192 * 2 * 80
    assert sum(op.network_bytes for op in parts) == sent
    assert sum(op_cost(name, LLAMA, A100, Workload(), 2048).network_bytes for name in ("ar_o", "ar_down")) == sent
    assert estimate(LLAMA, A100).operations[-1].network_bytes == sent


def test_formulas_by_hand():
    found = estimate(LLAMA, A100.replace(sustained_compute=None), parameters=70e9)
    assert found.t_mem_s == 80 / 2000
    assert found.t_compute_s == pytest.approx(2 * 2048 * 70e9 / (8 * 312e12))
    assert found.t_net_s == pytest.approx(4 * 8 * 2048 * 8192 * 2 * 80 / (8 * 300e9))
    assert found.t_r == pytest.approx((312e12 / 2000e9) * (80e9 * 8 / 70e9) / (2 * 2048))
    assert found.bound == "compute"


@pytest.mark.parametrize(("tflops", "tokens"), [(280, 2000), (260, 1857)])
def test_optimum_is_compute_over_two_parameters(tflops, tokens):
    """280 TFLOP/s give 2,000 tokens/s a device by arithmetic; the paper's 1,857 are 260."""
    found = estimate(LLAMA, A100.replace(sustained_compute=tflops * 1e12), parameters=70e9)
    assert found.optimal_per_device == pytest.approx(tflops * 1e12 / (2 * 70e9))
    assert round(found.optimal_per_device) == tokens


@pytest.mark.parametrize("lengths", [(512, 512), (1024, 512), (512, 1024), (102, 222)])
@pytest.mark.parametrize("batch", [256, 2048])
def test_optimum_does_not_depend_on_lengths_batch_or_bandwidth(lengths, batch):
    slow = A100.replace(memory_bandwidth=1e11, network_bandwidth=1e10)
    workload = Workload(prompt=lengths[0], output=lengths[1], dense_batch=batch)
    expected = A100.best_compute * 8 / (2 * LLAMA.active_parameters)
    assert estimate(LLAMA, slow, workload).optimal_tokens_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-70b", 8),
        ("llama-3-70b", 8),
        ("qwen2-72b", 8),
        ("deepseek-67b", 8),
        ("mixtral-8x7b", 8),
        ("llama-3-8b", 1),
    ],
)
def test_the_models_of_the_paper_are_bound_by_compute(name, count):
    shape = find_shape(name)
    hardware = find_hardware("a100")
    assert fitting_devices(shape, hardware) == count
    hardware = hardware.replace(num_devices=count)
    batch = largest_batch(shape, hardware, 1024, 512)
    found = estimate(shape, hardware, Workload(prompt=1024, output=512, dense_batch=batch))
    assert found.t_r < 1
    assert found.pays
    assert found.fits_batch


def test_small_batches_are_bound_by_memory():
    found = estimate(find_shape("llama-3-8b"), find_hardware("a100"), Workload(dense_batch=64))
    assert found.t_r > 1
    assert found.bound == "memory"
    assert not found.pays


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("llama-2-70b", 68.98, 68.7),
        ("llama-3-8b", 8.03, 7.50),
        ("llama-3-70b", 70.6, 69.5),
        ("qwen2-72b", 72.7, 71.5),
        ("deepseek-67b", 67.4, 66.6),
        ("mixtral-8x7b", 46.7, 12.75),
        ("olmoe-1b-7b", 6.92, 1.18),
        ("smollm2-135m", 0.1345, 0.1345),
        ("qwen3-30b-a3b", 30.5, 3.0),
        ("deepseek-moe-16b", 16.4, 2.6),
    ],
)
def test_parameters_of_published_models(name, billions, active):
    shape = find_shape(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_shapes_of_our_designs_agree_with_their_counts(preset):
    # What stands beside matrices is not of a shape.
    config = presets.find(preset)("tiny").model.replace(linears={})
    shape, count = shape_of(config, preset), config.count()
    assert shape.num_layers == config.num_layers
    extra = config.replace(streams=None).count().parameters if config.streams is not None else count.parameters
    # What the formulas know, without norms, is all but little of it; what merges streams is not of the layers.
    assert shape.matrix_parameters == pytest.approx(extra, rel=0.03)
    assert abs(shape.other_parameters) <= 0.03 * extra + count.parameters - extra
    if (
        config.streams is None
    ):  # an active parameter counts as often as a token goes through it; FLOPs without attention's
        attention = sum(
            config.attention.count(each, 2).flops - 2 * shape.attention_parameters for each in config.contexts()
        )
        assert 2 * shape.active_parameters == pytest.approx(config.count(2).flops - attention, rel=0.03)


def test_weights_of_touched_experts_are_read():
    part = find_shape("mixtral-8x7b").feed_forwards[0]
    assert part.touched_dim(1) == pytest.approx(2 * 14336)  # one token: two of eight
    assert part.touched_dim(4096) == pytest.approx(8 * 14336)
    one = op_cost("up_gate", find_shape("mixtral-8x7b"), find_hardware("a100"), Workload(), 1)
    assert one.bytes == pytest.approx(2 * 4096 * 2 * 14336 * 32 * 2, rel=0.01)


def test_tiles_fill_rounds():
    """KQV of one of 8 devices: 2048 x 1280 are 16 x 10 tiles on 108 processors, two rounds of which 160 / 216 are used."""
    assert A100.fill(2048, 1280) == pytest.approx(160 / 216)
    assert A100.fill(100, 128) == pytest.approx(100 / 128 / 108)
    assert A100.replace(num_units=0).fill(1, 1) == 1.0


def test_memory_that_does_not_suffice_is_told_in_bytes():
    with pytest.raises(CapacityError, match=r"137,950,658,560 of weights.*1 x a100 have 80,000,000,000"):
        estimate(LLAMA, find_hardware("a100"))
    tight = A100.replace(memory_bytes=18e9)  # the batch's keys and values do not fit, one request's do
    assert not estimate(LLAMA, tight).fits_batch


def test_workload_by_hand():
    load = Workload(prompt=512, output=1024, dense_batch=2048)
    assert (load.num_decodes, load.num_prefills, load.decode_context) == (1365, 683, 1024.5)
    with pytest.raises(ConfigError, match="at least 1"):
        Workload(dense_batch=0)


def test_hardware_by_name_file_and_mistake(tmp_path):
    assert len(PROFILES) == 13
    assert find_hardware("h100", 2).num_devices == 2
    path = tmp_path / "mine.json"
    mine = A100.replace(name="mine", efficiency=Efficiency(gemm=0.5))
    mine.save(path)
    assert find_hardware(str(path)) == mine
    assert json.loads(path.read_text())["name"] == "mine"
    for name, error, message in (
        ("a10", ConfigError, "did you mean 'a100'"),
        (str(tmp_path / "none.json"), DataError, "cannot read"),
    ):
        with pytest.raises(error, match=message):
            find_hardware(name)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Hardware.load(path)
    path.write_text('{"name": "x", "speed": 1}')
    with pytest.raises(ConfigError, match="no profile of a device"):
        Hardware.load(path)
    with pytest.raises(ConfigError, match="network_bandwidth is 0"):
        A100.replace(network_bandwidth=0.0)
    with pytest.raises(ConfigError, match=r"efficiency\.gemm"):
        Efficiency(gemm=0)
    with pytest.raises(ConfigError, match="did you mean 'llama-3-8b'"):
        find_shape("lama-3-8b")


def test_streams_multiply_rows_and_keys():
    parallel = replace(PUBLISHED["llama-3-8b"], streams=4)
    one = op_cost("kqv", PUBLISHED["llama-3-8b"], A100, Workload(), 256)
    assert op_cost("kqv", parallel, A100, Workload(), 256).flops == 4 * one.flops
    assert parallel.kv_bytes_per_token == 4 * PUBLISHED["llama-3-8b"].kv_bytes_per_token


def test_planning_needs_neither_torch_nor_numpy():
    script = (
        "import sys, anabranch.serving.planning as n\n"
        "n.search(n.find_shape('llama-3-8b'), n.find_hardware('a100'), n.Workload(dense_batch=512), evaluations=20)\n"
        "print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def _stored(config, dtype=torch.float32):
    return sum(parameter.numel() * dtype.itemsize for parameter in build_empty(config).parameters())


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_weights_is_that_of_the_built_model(preset, dtype):
    """Norms, routers, prefixes of streams, and what stands beside matrices (DynMoLE, MHR, LoRA-Mixer) among them."""
    config = presets.find(preset)("tiny").model
    shape = shape_of(config, preset, weight_bytes=dtype.itemsize, kv_bytes=dtype.itemsize)
    assert shape.weights_bytes == pytest.approx(_stored(config, dtype), abs=0.5)


BESIDE = {
    "lora": {"linears": {"*.attention.*": LowRank.Config(rank=3), "head": LowRank.Config(rank=2)}},
    "pool": {"linears": {"*": RoutedLowRank.Config(ranks=(2, 5, 3))}},
    "a table for all": {
        "linears": {
            "*.attention.*": MultiHeadRouted.Config(tasks=("a", "b"), heads=2, rank=2, granularity="coarsegrained")
        }
    },
    "tied": {"tie_embeddings": True, "linears": {"*.feed_forward.*": LowRank.Config(rank=2)}},
    "biases and norms of heads": {"attention": SelfAttention.Config(num_heads=4, qkv_bias=True, qk_norm="head")},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_matrices_is_counted_once(name):
    config = Decoder.Config(
        vocab_size=61,
        dim=32,
        num_layers=3,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=48),
    ).replace(**BESIDE[name])
    shape, plain = (shape_of(one, weight_bytes=4, kv_bytes=4) for one in (config, config.replace(linears={})))
    assert shape.weights_bytes == pytest.approx(_stored(config), abs=0.5)
    # It makes no matrix wider.
    assert shape.feed_forwards == plain.feed_forwards
    assert shape.matrix_parameters == plain.matrix_parameters


def test_what_is_no_matrix_is_not_stored_in_few_bits():
    config = presets.find(next(iter(presets.PRESETS)))("tiny").model
    shape = shape_of(config, weight_bytes=0.5, kv_bytes=2)
    assert shape.weights_bytes == shape.matrix_parameters / 2 + shape.other_parameters * 2
    assert replace(shape, other_bytes=4).weights_bytes == shape.matrix_parameters / 2 + shape.other_parameters * 4


def test_memory_that_the_rest_alone_passes_is_too_little():
    """A pool so large that it does not fit is refused with its bytes, where the matrices alone would do."""
    small = Decoder.Config(
        vocab_size=61,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=48),
    )
    large = small.replace(linears={"*": RoutedLowRank.Config(ranks=(64,) * 40)})
    hardware = find_hardware("a100").replace(memory_bytes=2e6)
    workload = Workload(prompt=8, output=8, dense_batch=64)
    assert estimate(shape_of(small), hardware, workload).kv_tokens > 0
    with pytest.raises(CapacityError, match=f"{shape_of(large).weights_bytes:,.0f} of weights"):
        estimate(shape_of(large), hardware, workload)
