"""What the native library promises besides results: the same bits everywhere, a C interface, nothing it depends on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from loopfast_kernels import denoise_step, leave_one_out, loop_loss, native_library, philox_normal
from tests.forks import printed

NATIVE = Path(__file__).parents[2] / "kernels" / "native"

# Every op on inputs that fill no vector evenly, and the bytes of all results, for each instruction set that is named.
DIGESTS = """
import hashlib, os, sys, torch
from loopfast_kernels import denoise_step, group_norm_silu, loop_loss, native_library, philox_normal
import torch.fx.experimental.symbolic_shapes  # a backward pass needs it, and it takes a second to import
# The library reads LOOPFAST_ISA at the first call.
for name in sys.argv[1:]:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()
os.environ.pop("LOOPFAST_ISA", None)
if name != "best":
    os.environ["LOOPFAST_ISA"] = name
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    c, u, x, r = (torch.randn(3, 5003).to(dtype) for _ in range(4))
    c.requires_grad_(), u.requires_grad_()
    table = torch.tensor([[1.1, -0.4, 0.7], [0.9, 0.3, 0.0]])
    step, seed = torch.tensor([0, 1, 0]), torch.tensor([5, 6, 7])
    guidance = {"uncond_output": u, "guidance_scale": 3.0}
    prev, logprob = denoise_step(c, x, table, step, seed, **guidance)
    result = loop_loss(c, x, prev, table, step, logprob + 0.1, torch.randn(2, 2), torch.tensor([0, 3, 1]),
                       clip_range=0.2, reference_output=r, kl_weight=0.1, **guidance)
    for tensor in (prev, logprob, *result, *torch.autograd.grad(result.loss * 3, [c, u])):
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for layout in (torch.contiguous_format, torch.channels_last):
        images = (3 * torch.randn(2, 2, 42, 9, 7) + 50).to(dtype)
        image, grad = (part.contiguous(memory_format=layout) for part in images)
        inputs = [image, 3 * torch.randn(42), torch.randn(42), torch.randn(2, 42).to(dtype)]
        inputs = [value.requires_grad_() for value in inputs]
        y = group_norm_silu(*inputs[:3], 6, shift=inputs[3])
        for tensor in (y, *torch.autograd.grad(y, inputs, grad)):
            digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
digest.update(philox_normal(seed, step, (3, 5003)).numpy().tobytes())
print(native_library.load().loopfast_isa().decode(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    features = native_library.load().loopfast_cpu_features().decode().split()
    known = [("avx512", "avx512dq"), ("avx2", "avx2"), ("portable", None)]
    best, expected, *found = printed(DIGESTS, "best", *(name for name, _ in known)).split()
    assert best == next(name for name, feature in known if feature is None or feature in features)
    for (name, feature), isa, digest in zip(known, found[::2], found[1::2], strict=True):
        # One that the processor lacks is replaced by the next lesser one.
        assert isa == name or feature not in features
        assert digest == expected


def test_it_knows_its_version_and_the_processor():
    described = native_library.describe()
    known = set(Path("/proc/cpuinfo").read_text().split())
    features = native_library.load().loopfast_cpu_features().decode().split()
    assert {"neon": "asimd"}.keys() | set(features) >= set(features)
    assert all({"neon": "asimd"}.get(feature, feature) in known for feature in features)
    assert described.endswith(("(avx512)", "(avx2)", "(portable)"))


def test_it_works_on_torchs_threads():
    """A fork keeps working: torch's threads are torch's to restart, and there are no others."""
    program = """
import os, torch
from loopfast_kernels import philox_normal
torch.set_num_threads(3)
torch.ones(1 << 22).mul_(2)
threads = len(os.listdir("/proc/self/task"))
seed = torch.arange(8)
expected = philox_normal(seed, seed, (8, 65536))
started = len(os.listdir("/proc/self/task")) - threads
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(philox_normal(seed, seed, (8, 65536)), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), started)
"""
    assert printed(program).split() == ["0", "0"]


def test_the_c_library_needs_no_more_than_the_c_library():
    library = Path(native_library.load()._name)
    assert library.name == native_library.FILE_NAME
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    shown = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]\n") for line in shown.splitlines() if "(NEEDED)" in line]
    assert {name.partition(".so")[0] for name in needed} <= {"libc", "libm", "libpthread", "ld-linux-x86-64"}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_example_in_c_plus_plus_gives_the_numbers_of_the_ops(tmp_path):
    library = Path(native_library.load()._name)
    program = tmp_path / "loop_step"
    subprocess.run(
        [
            "c++",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{NATIVE / 'include'}",
            str(NATIVE / "examples" / "loop_step.cpp"),
            str(library),
            f"-Wl,-rpath,{library.parent}",
            "-o",
            str(program),
        ],
        check=True,
    )
    shown = subprocess.run([program], capture_output=True, text=True, check=True).stdout

    index = torch.arange(4 * 256, dtype=torch.float32)
    output = torch.sin(0.1 * index).reshape(4, 256).requires_grad_()
    sample = torch.cos(0.2 * index).reshape(4, 256)
    table, step = torch.tensor([[1.02, -0.2, 0.1]]), torch.zeros(4, dtype=torch.int64)
    prev, logprob = denoise_step(output, sample, table, step, torch.arange(1, 5))
    rewards = prev.mean(1).reshape(2, 2)
    result = loop_loss(output, sample, prev, table, step, logprob, rewards, torch.arange(4), clip_range=1e-4)
    (gradient,) = torch.autograd.grad(result.loss, output)
    rows = [[float(word.rstrip(",")) for word in line.split()[3::2]] for line in shown.splitlines()[1:5]]
    expected = torch.stack((logprob, torch.ones(4), leave_one_out(rewards).flatten()), dim=1)
    torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-4, atol=1e-5)
    assert float(shown.split()[-1]) == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_the_header_is_plain_c(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "header.c"
    source.write_text('#include "loopfast.h"\nint main(void) { return loopfast_version() == 0; }\n')
    subprocess.run(
        [
            "cc",
            "-std=c99",
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{NATIVE / 'include'}",
            "-fsyntax-only",
            source,
        ],
        check=True,
    )


def test_a_strided_tensor_never_reaches_a_pointer():
    strided = torch.arange(8)[::2]
    with pytest.raises(ValueError, match="seed must be contiguous"):
        torch.ops.loopfast.philox_normal(strided, torch.zeros(4, dtype=torch.int64), (4, 4))
    with pytest.raises(ValueError, match="seed must be contiguous"):
        philox_normal(strided, torch.zeros(4, dtype=torch.int64), (4, 4))
