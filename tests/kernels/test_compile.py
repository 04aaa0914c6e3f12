"""python -m lorapar_kernels.compile: every kernel, every architecture, no GPU, and a bad one is told."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorapar_kernels
from lorapar_kernels.compile import MODULES, Row, fault, ptxas_figures, table

triton = pytest.importorskip("triton")
PACKAGE = Path(lorapar_kernels.__file__).parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorapar_kernels.compile", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture():
    done = command("--arch", "80", "90", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["kernel", "variant", "arch", "registers", "spilled", "shared", "instruction"]
    rows = [line.split() for line in lines[1:-1]]
    assert {row[-5] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        registers, spilled, shared = map(int, row[-4:-1])
        assert 0 < registers <= 255
        assert spilled == 0
        wide = row[0] == "product_kernel" and "DESCRIBED=1" in row
        assert 0 <= shared <= (227 if wide else 99) << 10
        # Only where the device has that much.
        assert not (wide and row[-5] == "sm_80")
    products = [row for row in rows if row[0] in ("shrink_kernel", "output_kernel") and "bf16" in row[1]]
    assert {row[-1] for row in products if row[-5] == "sm_90"} == {"wgmma", "mma.sync"}
    # A product of rank 16 on 64 tokens or more, the usual one, takes the warp group's instruction.
    usual = [row for row in products if row[-5] == "sm_90" and "R=16" in row and ("BT=64" in row or "BT=128" in row)]
    assert usual
    assert {row[-1] for row in usual} == {"wgmma"}
    of_expands = [row for row in rows if row[0] == "expand_kernel" and "bf16" in row[1]]
    assert {row[-1] for row in of_expands if row[-5] == "sm_90"} == {"wgmma"}
    of_products = [row for row in rows if row[0] == "product_kernel" and not row[1].startswith("fp32")]
    assert {row[-1] for row in of_products if row[-5] == "sm_90"} == {"wgmma"}
    assert {row[-1] for row in of_products if row[-5] == "sm_100"} == {"tcgen05.mma"}
    assert lines[-1] == f"{len(rows)} compiled, no spills, all within shared memory"


def kernels_of(sources: list[str]) -> set[str]:
    """The functions under @triton.jit, by whatever name, that none of the others calls: those can only be launched."""
    jitted = [
        function
        for source in sources
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        and any(re.search(r"\bjit\b", ast.unparse(decorator)) for decorator in function.decorator_list)
    ]
    names = [function.name for function in jitted]
    assert len(set(names)) == len(names), "two of one name could hide each other"
    calls = [node for function in jitted for node in ast.walk(function) if isinstance(node, ast.Call)]
    return set(names) - {ast.unparse(call.func).split(".")[-1] for call in calls}


def test_no_kernel_is_left_out():
    """Every kernel that is written somewhere in the package is compiled ahead of time."""
    import importlib

    written = kernels_of([file.read_text() for file in PACKAGE.rglob("*.py")])
    modules = [importlib.import_module(f"lorapar_kernels.triton_kernels.{module}") for module in MODULES]
    compiled = {variant.kernel.__name__ for module in modules for variant in module.ahead_of_time()}
    assert written
    assert compiled == written


def test_a_kernel_is_found_by_whatever_name():
    made = "@triton.jit\ndef helper(x):\n    return x\n"
    for decorator in ("@triton.jit", "@jit", "@triton.jit(noinline=True)", "@triton.autotune([], key=[])\n@triton.jit"):
        assert kernels_of([made, f"{decorator}\ndef spread(x):\n    helper(x)\n"]) == {"spread"}


def test_a_kernel_that_does_not_compile_is_told():
    from lorapar_kernels.compile import compile_variant
    from lorapar_kernels.triton_kernels.dropout import ahead_of_time
    from lorapar_kernels.triton_kernels.launch import Variant

    good = ahead_of_time()[0]
    bad = Variant(good.kernel, "BLOCK:255", good.signature, {"BLOCK": 255})
    row = compile_variant(bad, 90)
    assert row.failure is not None
    assert "power of 2" in row.failure
    assert "power of 2" in table([row])


def test_whether_a_product_and_its_sum_are_one_instruction_is_said_not_left_to_triton():
    """Triton 3.9 warns of a default that 3.10 changes, and TRITON_DEFAULT_FP_FUSION would change what fp32 costs."""
    program = (
        "from lorapar_kernels.compile import compile_variant\n"
        "from lorapar_kernels.triton_kernels.importance import ahead_of_time\n"
        "variant = next(v for v in ahead_of_time() if v.name.startswith('fp32/i64'))\n"
        "row = compile_variant(variant, 90)\n"
        "print(row.failure, row.registers)\n"
    )
    found = []
    for fusion in (None, "0", "1"):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_DEFAULT_FP_FUSION"}
        environment |= {} if fusion is None else {"TRITON_DEFAULT_FP_FUSION": fusion}
        command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.stderr == ""
        found.append(done.stdout)
    assert found[0].startswith("None ")
    assert len(set(found)) == 1


def test_a_launch_says_it_too():
    from lorapar_kernels.triton_kernels.launch import launch

    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: given.update(options)

    launch(Kernel(), (1,), 3, BLOCK=16)
    assert given == {"BLOCK": 16, "enable_fp_fusion": True}


def test_a_spill_makes_the_exit_status_1(monkeypatch, capsys):
    import importlib

    compile_module = importlib.import_module("lorapar_kernels.compile")
    spilling = Row("k", "v", 90, registers=255, spilled=8)
    monkeypatch.setattr(compile_module, "compile_variant", lambda variant, arch: spilling)
    assert compile_module.main(["--arch", "90"]) == 1
    assert "k v sm_90: spills 8 bytes" in capsys.readouterr().out


def test_too_much_shared_memory_is_a_fault():
    assert fault(Row("k", "v", 90, registers=32, shared=99 << 10)) is None
    assert (
        fault(Row("k", "v", 90, registers=32, shared=(99 << 10) + 1))
        == "needs 101377 bytes of shared memory, of 101376"
    )
    assert fault(Row("k", "v", 90, registers=32, shared=227 << 10, room=227 << 10)) is None


def test_what_is_recorded_is_what_is_launched():
    """The recorded signature names types, constants and multiples of 16 as the launcher's specialisation would."""
    import torch

    from lorapar_kernels.triton_kernels.launch import recording
    from lorapar_kernels.triton_kernels.lora_forward import shrink

    x, a = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(8, 4096, device="meta")
    with recording() as variants:
        shrink(x, [a], 0.05, [torch.empty(1, dtype=torch.int64, device="meta")])
    kernel = variants[0]
    assert kernel.kernel.__name__ == "shrink_kernel"
    assert kernel.signature["x_ptr"] == "*bf16"
    assert kernel.signature["a0_ptr"] == "*fp32"
    assert kernel.signature["a1_ptr"] == "constexpr"
    assert kernel.signature["rank0"] == "i32"
    assert kernel.constants["R"] == 16
    names = list(kernel.signature)
    assert kernel.constants[(names.index("a1_ptr"),)] is None
    assert (names.index("K"),) in kernel.aligned
    assert (names.index("rank0"),) not in kernel.aligned
    assert len(variants) == 1


def test_warming_hands_over_what_a_launch_would(monkeypatch):
    """Of the launch, the first of a variant: the same arguments, constants and options, and so the same key."""
    import torch

    from lorapar_kernels.triton_kernels.launch import FP_FUSION, Variant, recording, warm
    from lorapar_kernels.triton_kernels.lora_product import WIDE_ROOM, _launch_case

    with recording() as variants:
        _launch_case(torch.bfloat16, torch.float32, 16, 8192, 4096, False, 0.05, False, WIDE_ROOM)
        _launch_case(torch.bfloat16, torch.float32, 16, 8192, 4096, False, 0.05, False, WIDE_ROOM)
    warmed = []
    for variant in variants:
        monkeypatch.setattr(variant.kernel, "warmup", lambda *arguments, **named: warmed.append((arguments, named)))
        warm(variant)
        assert variant.call is not None
        arguments, named = warmed[-1]
        assert arguments is not variant.call.arguments
        assert all(one is other for one, other in zip(arguments, variant.call.arguments, strict=True))
        assert named == {"grid": variant.call.grid, "enable_fp_fusion": FP_FUSION, **variant.call.constants}
        assert {"num_warps", "num_stages"} <= named.keys()
        assert variant.call.grid == (64 * 16,)
    assert len(warmed) == 2
    with pytest.raises(ValueError, match="was not recorded from a launch"):
        warm(Variant(variants[0].kernel, "by hand", {}))


def test_a_launcher_takes_tensors_without_memory_for_real_ones():
    """What Triton's launcher makes its key of, by its own function: dtypes, and which addresses are aligned."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import native_specialize_impl
    from triton.tools.tensor_descriptor import TensorDescriptor

    backend = type(make_backend(GPUTarget("cuda", 90, 32)))

    def key(value):
        return native_specialize_impl(backend, value, False, True, True)

    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.int64):
        meta, real = (torch.zeros(64, 64, dtype=dtype, device=device) for device in ("meta", "cpu"))
        assert key(meta) == key(real)
        assert key((meta, meta)) == key((real, real))
        assert key(meta[:, 1:]) == key(real[:, 1:])
        described = [TensorDescriptor.from_tensor(matrix, [16, 16]) for matrix in (meta, real)]
        assert key(described[0]) == key(described[1])


def test_a_batch_s_number_of_examples_makes_no_kernel_of_its_own():
    """One example would be a constant of the kernel, and 16 a multiple: kernels that nothing had compiled before."""
    import torch

    from lorapar_kernels.triton_kernels.importance import add_example_products, ahead_of_time
    from lorapar_kernels.triton_kernels.launch import recording

    with recording() as variants:
        for width in (4096, 61):
            for n_examples in (2, 7, 16, 1000):
                phi, thin, wide = (torch.empty(*shape, device="meta") for shape in ((64, width), (99, 64), (99, width)))
                sums = tuple(torch.empty(64, width, device="meta") for _ in range(4))
                offsets = torch.empty(n_examples + 1, dtype=torch.int64, device="meta")
                add_example_products(sums, thin, wide, phi, False, 1.0, offsets)
    # The rows of 61 are not aligned; the second kernel sees elements alone.
    assert len(variants) == 3
    assert all(variant in ahead_of_time() for variant in variants)


# One, odd, even, a multiple of 16, as they come: batches of text are ragged.
RAGGED = (1, 2, 15, 16, 17, 100, 512, 513, 527, 1024, 8191, 8192, 8200, 20000)


@pytest.mark.parametrize("module", ["lora_forward", "lora_passes"])
def test_a_batch_s_number_of_tokens_makes_no_kernel_of_its_own(module):
    """What few and what many tokens launch, which is compiled ahead of time, is all that any number launches."""
    import importlib

    from lorapar_kernels.triton_kernels.launch import recording

    launchers = importlib.import_module(f"lorapar_kernels.triton_kernels.{module}")
    for case in launchers.REPRESENTATIVE:
        with recording() as ahead:
            launchers._launch_all(*case)
        of_tokens = {}
        for tokens in RAGGED:
            with recording() as of_tokens[tokens]:
                launchers._launch_all(*case, tokens=tokens)
            assert all(variant in ahead for variant in of_tokens[tokens]), (case, tokens)
        # Of few tokens S and dS come in parts of fp32, which are added up; of many (8,191 here) at once, in x's dtype.
        assert all(of_tokens[tokens] == of_tokens[1] for tokens in RAGGED if tokens < 8191), case


def test_nor_does_it_for_the_product():
    from lorapar_kernels.triton_kernels.launch import recording
    from lorapar_kernels.triton_kernels.lora_product import REPRESENTATIVE, _launch_case

    for x, a, rank, _, *rest in REPRESENTATIVE:
        # Narrow tiles, and the wide ones where many tokens are enough of them for the GPU.
        with recording() as few_and_many:
            _launch_case(x, a, rank, 1, *rest)
            _launch_case(x, a, rank, 1 << 16, *rest)
        with recording() as variants:
            for tokens in RAGGED:
                _launch_case(x, a, rank, tokens, *rest)
        assert all(variant in few_and_many for variant in variants)
        assert len(few_and_many) <= 2 * (1 + (rest[2] > 0.0))


def test_nor_do_the_size_and_the_share_of_a_dropout_mask():
    import torch

    from lorapar_kernels.triton_kernels.dropout import ahead_of_time, dropout_mask
    from lorapar_kernels.triton_kernels.launch import recording

    with recording() as variants:
        for elements in (1, 8, 128, 513, 4096 * 527, 4097 * 61):
            for threshold in (1, 16, 3277, 32768):
                dropout_mask(torch.empty(1, dtype=torch.int64, device="meta"), (elements,), threshold)
    assert variants == ahead_of_time()[:1]


def test_nor_do_the_share_dropped_and_a_scaling_that_is_an_integer():
    import torch

    from lorapar_kernels.triton_kernels.launch import recording
    from lorapar_kernels.triton_kernels.lora_forward import expand, shrink
    from lorapar_kernels.triton_kernels.lora_passes import input_gradients, output_gradients

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, a, b, seed = meta(513, 4096), meta(8, 4096), meta(4096, 8), meta(1, dtype=torch.int64)
    sets = []
    for p, scaling in ((0.05, 0.5), (0.25, 1), (1 / 65536, 16)):
        with recording() as variants:
            parts, _ = shrink(x, [a], p, [seed])
            _, (s,) = expand(parts, [b], [scaling], [None], [None], torch.bfloat16)
            ds, _ = output_gradients(x, b, s, scaling, p, None, True)
            input_gradients(x, x, [a], [ds], p, [seed], [None], [True])
        sets.append(variants)
    assert sets[0] == sets[1] == sets[2]


def test_ptxas_figures():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas info    : Function properties for k\n"
        "    24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size\n"
    )
    assert ptxas_figures(log) == (168, 32)
    with pytest.raises(ValueError, match="no figures"):
        ptxas_figures("")


def test_unusable_arguments_exit_2():
    assert command("--arch", "9.0").returncode == 2
    assert command("--arch", "9").returncode == 2
