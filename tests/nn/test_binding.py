"""The binding of the compiled kernels: nothing goes past it, and it lets nothing in that a kernel would read or write wrongly."""

import ast
import ctypes
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import anabranch
import anabranch.nn.kernels.low_rank
import anabranch.nn.kernels.memory
import anabranch.nn.kernels.postings
import anabranch.serving.engine.paged
import anabranch.serving.expertflow.predictors.steps
import anabranch.serving.expertflow.tiers
import anabranch.serving.expertflow.token_scheduler
import anabranch.serving.fast.decoder
from anabranch.errors import AnabranchError, BackendError, CapacityError, InputError
from anabranch.native.sources import SOURCES
from anabranch.nn import RMSNorm, kernels
from anabranch.nn.expert_call import ExpertCall, Needed
from anabranch.nn.kernels import attention, expert_mlp, paged, rows
from anabranch.nn.kernels import packed as products
from anabranch.nn.kernels.binding import KERNELS, Kernel
from anabranch.nn.kernels.operands import DTYPES, address, array_address
from anabranch.nn.kernels.signature import Operand
from anabranch.nn.packed import Packed
from anabranch.nn.pool import ExpertPool
from anabranch.nn.rotary import rotate
from anabranch.routing.decision import Routing

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiled kernels on this machine")
PACKAGE = Path(anabranch.__file__).parent


# ---- every kernel has a signature, and it is that of its C function ----


def c_functions():
    """(name, result, kinds of parameters) of all functions with C linkage in the sources."""
    found = {}
    for path in SOURCES:
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for result, name, parameters in re.findall(r"(\w+ ?\*?)\s*(anabranch_\w+)\(([^)]*)\)\s*\{", text):
            kinds = [kind_of_c(part) for part in parameters.split(",") if part.strip()]
            found[name] = result.replace(" ", ""), kinds
    return found


def kind_of_c(parameter):
    return "pointer" if "*" in parameter else parameter.split()[-2]


def kind_of(c_type):
    if c_type is ctypes.c_void_p or hasattr(c_type, "contents"):
        return "pointer"
    return {ctypes.c_int: "int", ctypes.c_int64: "int64_t", ctypes.c_float: "float", ctypes.c_double: "double"}[c_type]


def test_every_kernel_is_declared_as_it_is():
    functions = c_functions()
    assert len(functions) >= 25
    assert set(functions) == set(KERNELS)
    for name, (result, kinds) in functions.items():
        kernel = KERNELS[name]
        assert [kind_of(part) for part in kernel.c_types()] == kinds, name
        wanted = {"status": "int", "int": "int", "int64": "int64_t", "handle": "void*", "none": "void"}[kernel.result]
        assert result == wanted, name


def test_what_is_not_inline_has_its_signature_too():
    text = "".join(path.read_text() for path in SOURCES)
    assert set(re.findall(r"\banabranch_\w+(?=\()", text)) <= set(KERNELS)


def test_nothing_takes_an_address_or_a_function_past_the_door():
    """Addresses come from `operands.address` and from kernels' signatures; the library's functions from no other place."""
    allowed = {
        PACKAGE / "nn/kernels/binding.py",
        PACKAGE / "nn/kernels/operands.py",
        # It asks where memory is aligned.
        PACKAGE / "serving/expertflow/arena.py",
        # They ask whether two tensors are of one memory, and hand no address on.
        PACKAGE / "nn/weight_kinds.py",
        PACKAGE / "serving/fast/decoder.py",
        PACKAGE / "train/mezo.py",
    }
    offenders = []
    for folder in ("nn", "serving/fast", "serving/expertflow", "serving/engine", "train", "lm"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Attribute) or path in allowed:
                    continue
                is_address = node.attr in ("data_ptr", "CDLL", "PyDLL") or ast.unparse(node).endswith(".ctypes.data")
                if (is_address and ast.unparse(node) != "ctypes.CDLL") or node.attr.startswith("anabranch_"):
                    offenders.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert not offenders


# ---- what the binding lets in ----

SIZES = {name: 16 * place for place, name in enumerate("BDEFGHKLNPRSTUWXZ", 1)} | {
    **{
        "Q": 4096,
        "C": 3,
        "D": 64,
        "H": 8,
        "G": 4,
        "L": 16,
        "S": 48,
        "W": 32,
        "M": 3,
        "E": 5,
        "K": 2,
        "N": 6,
        "B": 2,
        "R": 4,
        "P": 1,
        "O": 24,
    }
}


class Recorder:
    """Stands for a C function."""

    def __init__(self):
        self.calls = []

    def __call__(self, *values):
        self.calls.append(values)
        return 0


def prepared(kernel):
    """(the kernel over a function that only records, values that it takes)."""
    recorder = Recorder()
    functions = SimpleNamespace(**{kernel.symbol: recorder})
    call = kernel.bound_to(SimpleNamespace(_free=functions, _holding=functions))
    values = [value_of(kernel, part) for part in kernel.parameters]
    return recorder, call, [value for value in values if value is not ...]


def value_of(kernel, part):
    operand = Operand.of(part)
    if operand is not None:
        made = [made_for(kernel, operand) for _ in range(SIZES[operand.table] if operand.table else 1)]
        return made if operand.table else made[0]
    if part.startswith("given "):
        return SIZES[part.removeprefix("given ")]
    name, _, kind = part.partition(": ")
    if kind in kernel.structures:
        return kernel.structures[kind]()
    if not kind:
        return ...
    return SIZES[name] if name.isupper() else 1


def made_for(kernel, operand):
    sizes = [eval(part.removesuffix(".."), {}, dict(SIZES)) for part in operand.sizes]
    if "array" in operand.flags:
        return np.zeros(sizes, operand.dtype)
    place = None if operand.dtype in DTYPES else kernel.variables.index(operand.dtype)
    dtype = operand.dtype if place is None else next(iter(kernel.types))[place]
    return torch.zeros(sizes, dtype=DTYPES[dtype])


def smaller(value):
    return value[..., :-1].contiguous() if isinstance(value, torch.Tensor) else np.ascontiguousarray(value[..., :-1])


def strided(value):
    doubled = value.repeat_interleave(2, -1) if isinstance(value, torch.Tensor) else np.repeat(value, 2, -1)
    return doubled[..., ::2]


def given_back(value):
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


class Odd(torch.Tensor):
    pass


WRONG = {
    "meta": lambda value: value.to("meta"),
    "dtype": lambda value: value.to(torch.float64),
    "sign": torch._neg_view,
    "dual": lambda value: forward_ad.make_dual(value, value),
    "class": lambda value: value.as_subclass(Odd),
    "memory": given_back,
    "nothing": lambda value: None,
    "array": lambda value: value.float().numpy(),
    "axes": lambda value: value[None, None],
    "strides": strided,
    "size": smaller,
}
WRONG_ARRAY = {
    "dtype": lambda value: value.astype(np.float32 if value.dtype == np.float64 else np.float64),
    "tensor": torch.from_numpy,
    "axes": lambda value: value[None],
    "nothing": lambda value: None,
}


def wrongs(operand):
    """(name, what makes a right value a wrong one)."""
    found = dict(WRONG_ARRAY if "array" in operand.flags else WRONG)
    if operand.optional:
        found.pop("nothing")
    if operand.dtype in ("bool", "uint8", "int32", "int64"):
        found.pop("dual", None)  # only floats have tangents, and only what has a sign a negative view
        found.pop("sign", None)
    if operand.sizes and operand.sizes[0].endswith(".."):
        found.pop("axes")
    if "array" in operand.flags and operand.sizes != ("1",):
        found["strides"] = strided
    return found


@pytest.fixture
def level():
    """A level of forward differentiation, in which there are dual tensors."""
    with forward_ad.dual_level():
        yield


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch, at the first dual tensor
@pytest.mark.parametrize("symbol", sorted(KERNELS))
def test_a_kernel_takes_what_it_says_and_nothing_else(symbol, level):
    kernel = KERNELS[symbol]
    recorder, call, values = prepared(kernel)
    call(*values)
    assert len(recorder.calls) == 1
    assert len(recorder.calls[0]) == len(kernel.c_types())
    places = [place for place, part in enumerate(p for p in kernel.parameters if value_of(kernel, p) is not ...)]
    names = [part.partition(":")[0] for part in kernel.parameters if value_of(kernel, part) is not ...]
    for operand in kernel.operands:
        place = places[names.index(operand.name)]
        for reason, wrong in wrongs(operand).items():
            if reason == "size" and only_source_of_all(kernel, operand):
                continue
            changed = list(values)
            if operand.table:
                changed[place] = [*values[place][:-1], wrong(values[place][-1])]
            else:
                changed[place] = wrong(values[place])
            assert f"kernel {kernel.name}" in said_of(call, changed), (operand.name, reason)
            assert len(recorder.calls) == 1


def said_of(call, values):
    """What the binding says of these, empty if it lets them in."""
    try:
        call(*values)
    except InputError as error:
        return str(error)
    return ""


def only_source_of_all(kernel, operand):
    """Whether nothing else says how long its last axis is, so that a shorter one is another call, not a wrong one."""
    last = operand.sizes[-1]
    others = [size for one in kernel.operands if one is not operand for size in one.sizes]
    said = [
        part.partition(": ")[0].removeprefix("given ")
        for part in kernel.parameters
        if ": " in part or part.startswith("given ")
    ]
    bounded = any(re.search(rf"\b{last}\b", condition) for condition in kernel.where)
    return (
        last.isalpha()
        and not any(re.search(rf"\b{last}\b", size) for size in others)
        and last not in said
        and not bounded
    )


def test_what_is_said():
    recorder, call, (x, weight, y, _, eps) = prepared(KERNELS["anabranch_norm_forward"])
    with pytest.raises(
        InputError,
        match=re.escape(
            "weight of kernel norm_forward is float32 [64] on meta; it takes float32 [D] with D = 64, in one piece, on the CPU"
        ),
    ):
        call(x, weight.to("meta"), y, None, eps)
    with pytest.raises(
        InputError, match=r"x of kernel norm_forward is float64 .* on cpu; it takes float32 or bfloat16 "
    ):
        call(x.double(), weight, y, None, eps)
    with pytest.raises(InputError, match=r"y of kernel norm_forward is bfloat16 .*; it takes float32 "):
        call(x, weight, y.bfloat16(), None, eps)
    with pytest.raises(InputError, match=re.escape("kernel norm_forward takes D % 16 == 0; here D = 17")):
        call(torch.zeros(2, 17), torch.zeros(17), torch.zeros(2, 17), None, eps)
    with pytest.raises(InputError, match="its memory given back"):
        call(x, given_back(weight), y, None, eps)
    assert not recorder.calls


def test_rows_may_lie_in_another_order_but_all_alike():
    recorder, call, (_, weight, _, scale, eps) = prepared(KERNELS["anabranch_norm_forward"])
    x = torch.zeros(3, 64, 2).transpose(1, 2)[..., :1, :].transpose(0, 1)
    turned = torch.zeros(2, 3, 64).transpose(0, 1)
    call(turned, weight, turned.clone(), scale, eps)
    with pytest.raises(InputError, match="y of kernel"):
        call(turned, weight, turned.contiguous(), scale, eps)
    with pytest.raises(InputError, match="x of kernel"):
        call(x, weight, x, None, eps)
    with pytest.raises(InputError, match="x of kernel"):
        call(torch.zeros(2, 6, 64)[:, ::2], weight, torch.zeros(2, 3, 64), None, eps)
    assert len(recorder.calls) == 1


def test_no_two_rows_of_a_result_lie_in_one_place():
    _, call, values = prepared(KERNELS["anabranch_turn"])
    values[1] = values[1][:, :1].expand(values[1].shape)
    with pytest.raises(InputError, match="y of kernel turn"):
        call(*values)


def test_a_read_only_array_is_not_written_to():
    _, call, values = prepared(KERNELS["anabranch_regroup"])
    values[-1].flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        call(*values)


def test_addresses_for_structures():
    x = torch.zeros(4, 6)
    assert address(x, "float32", 4, None) == address(x) == x.data_ptr()
    for wrong in (x.T, torch._neg_view(x), x.as_subclass(Odd), x.to("meta"), x.double(), x[0], given_back(x)):
        with pytest.raises(InputError, match="a kernel was given"):
            address(wrong, ("float32", "bfloat16"), None, 6)
    y = np.zeros((3, 4), np.int64)
    assert array_address(y, "int64", None, 4) == y.ctypes.data
    for wrong in (y.T, y[:, ::2], y.astype(np.int32), y[0], x):
        with pytest.raises(InputError, match="a kernel was given"):
            array_address(wrong, "int64", None, 4)


def test_without_a_library_a_kernel_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: None)
    monkeypatch.setitem(KERNELS, "anabranch_release", None)
    with pytest.raises(BackendError, match="could not be built"):
        Kernel("anabranch_release", "")()


# ---- what users can do ----


def pool_and_routing(device):
    pool = ExpertPool(4, 32, 16, device=device)
    return pool, Routing(torch.tensor([[0], [1], [2]]), torch.ones(3, 1), torch.zeros(3, 4))


@needs_kernels
@pytest.mark.parametrize("grad", [False, True])
def test_weights_that_are_not_there_are_an_error(grad):
    """Each of these read from address zero."""
    pool, routing = pool_and_routing("meta")
    x, norm = torch.randn(3, 32), RMSNorm(32).to("meta")
    angle = torch.zeros(1, 1, 3, 32)
    meta_packed = Packed(torch.empty(1, 2, 2048, dtype=torch.uint8, device="meta"), 32, 32, "float32", 32)
    calls = (
        lambda: pool(x, routing),
        lambda: norm(x),
        lambda: rows.weighted_sum([x, x], torch.ones(3, 2, device="meta")),
        lambda: rotate(torch.randn(1, 2, 3, 32), (angle.to("meta"), angle)),
        lambda: products.linear(meta_packed, x),
    )
    with torch.set_grad_enabled(grad):
        for call in calls:
            with pytest.raises(AnabranchError, match="on meta"):
                call()


@needs_kernels
def test_a_norm_of_another_width_is_an_error():
    with pytest.raises(InputError, match=re.escape("float32 [32] on cpu; it takes float32 [D] with D = 64")):
        RMSNorm(32)(torch.randn(3, 64))


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [{"rows": 64}, {"depth": 64}, {"kind": "int8"}, {"kind": "int4", "group": 16}, {"group": 32, "kind": "int8"}],
)
def test_a_packed_matrix_of_other_sizes_than_its_memory_is_an_error(change):
    packed = Packed.pack(torch.randn(32, 32), "float32")
    sizes = {"rows": 32, "depth": 32, "kind": "float32", "group": 32} | change
    with pytest.raises(InputError):
        products.linear(Packed(packed.data, **sizes), torch.randn(2, 32))
    with pytest.raises(InputError):
        products.matrix(Packed(packed.data, **sizes))


@needs_kernels
def test_activations_of_another_width_are_an_error():
    with pytest.raises(InputError, match="x of kernel packed_linear"):
        products.linear(Packed.pack(torch.randn(32, 64), "float32"), torch.randn(2, 32))


def call_of(*plan_and_weights):
    return ExpertCall(torch.randn(2, 16), *plan_and_weights, False, torch.float32, "native", "swiglu")


@needs_kernels
@pytest.mark.parametrize("offset", [[1, 3], [2, 1], [-1, 2], [1, 1 << 30]])
def test_rows_of_experts_that_there_are_not(offset):
    place = torch.tensor([0, 1])
    w13, w2 = torch.randn(2, 32, 16), torch.randn(2, 16, 16)
    with pytest.raises(InputError, match="index out of range"):
        expert_mlp.forward(call_of(place, torch.tensor(offset, dtype=torch.int32), torch.ones(2, 1), w13, w2), False)


@needs_kernels
@pytest.mark.parametrize("choice", [[0, 2], [-1, 0], [1 << 40, 0]])
def test_choices_that_there_are_not(choice):
    w13, w2 = torch.randn(2, 32, 16), torch.randn(2, 16, 16)
    call = call_of(torch.tensor(choice), torch.tensor([1, 2], dtype=torch.int32), torch.ones(2, 1), w13, w2)
    with pytest.raises(InputError, match="index out of range"):
        expert_mlp.forward(call, False)
    with pytest.raises(InputError, match="index out of range"):
        expert_mlp.backward(call, torch.empty(0), torch.randn(2, 16), Needed(True, True, True, True))


@needs_kernels
@pytest.mark.parametrize(
    ("sequence", "table"),
    [
        ([[0, 2, 0, 0]], [0]),  # more rows than the step has
        ([[1, 1, 0, 0]], [0]),
        ([[0, 1, 4, 0]], [0]),  # more blocks than its table
        ([[0, 1, 0, 1]], [0]),
        ([[0, 1, 0, -1]], [0]),
        ([[0, 1, -1, 0]], [0]),
        ([[0, 1, 0, 0]], [2]),  # a block that the pool has not
        ([[0, 1, 0, 0]], [-1]),
    ],
)
def test_blocks_of_the_cache_that_there_are_not(sequence, table):
    pool = torch.zeros(1, 8, 1, 16)
    row = torch.randn(1, 1, 1, 16)
    arguments = (np.array(sequence), np.array(table, np.int32))
    with pytest.raises(InputError, match="index out of range"):
        paged.attend(row, row, row, pool, pool.clone(), *arguments, block_tokens=4)


@needs_kernels
def test_heads_that_cannot_share_keys():
    query, key = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 16, 16)
    with pytest.raises(InputError, match=re.escape("takes H % G == 0; here H = 3, G = 2")):
        attention.forward(query, key, key)


# ---- no memory ----

STARVED = textwrap.dedent(
    """
    import ctypes, resource, sys, numpy as np, torch
    from anabranch.errors import CapacityError
    from anabranch.nn.expert_call import ExpertCall, Needed
    from anabranch.nn.kernels import attention, expert_mlp, load, packed, paged, rows
    from anabranch.nn.packed import Packed
    from anabranch.serving.expertflow.token_scheduler import TokenScheduler
    torch.set_num_threads(1)
    assert load() is not None
    E, D, F, N = 2, 256, 4096, 4096
    x, wide, widest = torch.randn(N, D), torch.randn(512, 1 << 14), torch.randn(1, 1 << 20)
    place, offset, weight = torch.arange(N), torch.tensor([N // 2, N], dtype=torch.int32), torch.ones(N, 1)
    w13, w2 = torch.zeros(E, 2 * F, D), torch.zeros(E, D, F)
    q = torch.randn(1, 1, 4096, 256)
    matrix = Packed.pack(torch.zeros(16, 1 << 14), "bfloat16")
    chosen = np.random.default_rng(0).random((6000, 1, 8)) < 0.5
    pool, row = torch.zeros(1, 512, 1, 512), torch.zeros(1, 48, 1, 512)
    call = ExpertCall(x, place, offset, weight, w13, w2, False, torch.float32, "native", "swiglu")
    needed = Needed(False, False, False, False)
    cases = {
        "expert_forward": lambda: expert_mlp.forward(call, False),
        "expert_backward": lambda: expert_mlp.backward(call, torch.empty(0), x, needed),
        "attention_forward": lambda: attention.forward(q, q, q),
        "norm_backward": lambda: rows.norm_gradients(widest, widest, torch.ones(1 << 20), torch.ones(1)),
        "packed_linear": lambda: packed.linear(matrix, wide),
        "paged_attention": lambda: paged.attend(
            row, row[:, :1], row[:, :1], pool, pool.clone(), np.array([[0, 1, 500, 0]]), np.arange(32, dtype=np.int32), block_tokens=16
        ),
        "regroup": lambda: TokenScheduler().regroup(chosen),
    }
    name, malloc, free = sys.argv[1], ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    malloc.argtypes, malloc.restype, free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
    from anabranch.nn.kernels.binding import KERNELS
    kernel = KERNELS["anabranch_" + name]
    kernel._call = kernel.bound_to(load())
    inner = kernel._call
    def starved(*values):  # what Python allocates is there; what the kernel does is not
        resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
        held, size = [], 1 << 24
        while size >= 1 << 15:  # also of what was freed before, but for small pieces
            place = malloc(size)
            held, size = (held + [place], size) if place else (held, size // 2)
        try:
            return inner(*values)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            for place in held:
                free(place)
    kernel._call = starved
    try:
        cases[name]()
    except CapacityError as error:
        print("refused:", error)
        kernel._call = inner
        cases[name]()
        print("went on")
    """
)


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory as on Linux")
@pytest.mark.parametrize(
    "name",
    [
        "expert_forward",
        "expert_backward",
        "attention_forward",
        "norm_backward",
        "packed_linear",
        "paged_attention",
        "regroup",
    ],
)
def test_no_memory_is_an_error_that_can_be_caught(name):
    """It ended the process."""
    done = subprocess.run(
        [sys.executable, "-c", STARVED, name], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"refused: not enough memory for what kernel {name} works out on its way" in done.stdout
    assert "went on" in done.stdout


def test_a_status_becomes_an_error():
    for status, error in ((1, CapacityError), (2, InputError)):
        functions = SimpleNamespace(anabranch_regroup=lambda *values, status=status: status)
        call = KERNELS["anabranch_regroup"].bound_to(SimpleNamespace(_free=functions, _holding=functions))
        with pytest.raises(error):
            call(*prepared(KERNELS["anabranch_regroup"])[2])
