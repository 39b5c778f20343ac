from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfast_kernels import backend, native_library, philox_normal
from loopfast_kernels.philox import philox_4x32
from loopfast_kernels.philox.reference import _normal_pair

# The known answers that come with Random123 (kat_vectors, "philox4x32 10").
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    word = 0xFFFFFFFF
    x, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(product1 >> 32) ^ x[1] ^ k[0], product1 & word, (product0 >> 32) ^ x[3] ^ k[1], product0 & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return x


def plain_normal(seed: int, step: int, element: int) -> float:
    words = plain_philox((element // 4, step % 2**32, 0, 0), (seed % 2**32, (seed >> 32) % 2**32))
    radius_word, angle_word = words[:2] if element % 4 < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(radius_word * 2**-32 + 2**-33))
    angle = 2 * math.pi * angle_word * 2**-32
    return radius * (math.cos(angle) if element % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    def words(values):
        return tuple(torch.tensor([value]) for value in values)

    assert tuple(int(word) for word in philox_4x32(words(counter), words(key))) == expected


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_noise_follows_its_definition(seed, step, shape):
    noise = philox_normal(torch.tensor([seed]), torch.tensor([step]), (1, *shape)).flatten()
    expected = torch.tensor([plain_normal(seed, step, element) for element in range(noise.numel())])
    # The argument of the cosine goes up to 2 pi in float32, the radius up to 6.8.
    torch.testing.assert_close(noise, expected, rtol=0, atol=4e-6)


def seeds_and_steps(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    seed = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return seed, torch.randint(1000, (rows,), generator=generator)


def test_every_backend_gives_the_same_bits(each_backend):
    shape = (3, 4101) if each_backend.interpreted else (16, 16_385)
    seed, step = seeds_and_steps(shape[0])
    with backend("reference"):
        expected = philox_normal(seed, step, shape)
    with each_backend.active():
        noise = philox_normal(seed.to(each_backend.device), step.to(each_backend.device), shape)
    assert torch.equal(noise.cpu(), expected)


def test_normals_are_exact_to_two_ulp():
    word = 2**32 - 1
    seed, step = seeds_and_steps(16)
    block, zero = torch.arange(16_384)[None, :], torch.zeros(1, 1, dtype=torch.int64)
    key = (seed[:, None] & word, (seed[:, None] >> 32) & word)
    words = philox_4x32((block, step[:, None], zero, zero), key)
    columns = []
    for radius_word, angle_word in (words[:2], words[2:]):
        uniform = radius_word.float() * 2.0**-32 + 2.0**-33
        angle = (angle_word.float() * (2.0 * math.pi * 2.0**-32)).double()
        radius = (-2.0 * uniform.double().log()).sqrt()
        columns += [radius * angle.cos(), radius * angle.sin()]
    exact = torch.stack(columns, dim=-1).flatten(1).float()
    # Neighboring floats have neighboring patterns.
    apart = philox_normal(seed, step, exact.shape).view(torch.int32) - exact.view(torch.int32)
    assert apart.abs().max() <= 2


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_the_native_words(counter, key, expected):
    words = torch.zeros(4, dtype=torch.uint32)
    of_counter, of_key = (torch.tensor(values).to(torch.uint32) for values in (counter, key))
    native_library.load().loopfast_philox_4x32(of_counter.data_ptr(), of_key.data_ptr(), words.data_ptr())
    assert tuple(words.tolist()) == expected


def test_extreme_words_stay_finite():
    # Word 0 gives the largest radius there is, word 2**32 - 1 the uniform 1 and radius 0.
    largest, zero = _normal_pair(torch.tensor([0, 2**32 - 1]), torch.tensor([0, 0]))[0].tolist()
    assert largest == pytest.approx(math.sqrt(66 * math.log(2)))
    assert zero == 0.0


def test_statistics_of_a_standard_normal():
    rows, elements = 64, 4096
    noise = philox_normal(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), (rows, elements)).double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    ordered = noise.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    observed = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (observed - expected).abs().max() < 1.95 / math.sqrt(count)


def test_seeds_steps_and_elements_are_uncorrelated():
    rows, elements = 64, 1024
    seeds, zeros = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    by_seed = philox_normal(seeds, zeros, (rows, elements))
    by_step = philox_normal(zeros + 7, seeds, (rows, elements))
    for noise in (by_seed, by_step):
        correlation = torch.corrcoef(noise) - torch.eye(rows)
        assert correlation.abs().max() < 5.5 / math.sqrt(elements)
        lanes = torch.corrcoef(noise.reshape(-1, 4).T) - torch.eye(4)
        assert lanes.abs().max() < 4.5 / math.sqrt(rows * elements / 4)


def test_noise_is_the_same_for_any_split_of_the_batch(each_backend):
    with each_backend.active():
        seed, step = (part.to(each_backend.device) for part in seeds_and_steps(8))
        whole = philox_normal(seed, step, (8, 4, 5, 5))
        for size in (1, 3):
            parts = zip(seed.split(size), step.split(size), strict=True)
            noise = [philox_normal(some, at, (len(some), 4, 5, 5)) for some, at in parts]
            assert torch.equal(torch.cat(noise), whole)


def test_noise_begins_alike_for_any_length(each_backend):
    seed = torch.arange(2, device=each_backend.device)
    with each_backend.active():
        long = philox_normal(seed, seed, (2, 4133))
        for length in (1, 4, 6, 36, 1023, 4097):
            assert torch.equal(philox_normal(seed, seed, (2, length)), long[:, :length])


def test_both_halves_of_the_seed_and_the_step_matter():
    seed = torch.tensor([5, 5 + 2**32, 6, 5])
    step = torch.tensor([0, 0, 0, 1])
    noise = philox_normal(seed, step, (4, 8))
    assert len({tuple(row) for row in noise.tolist()}) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(2), torch.zeros(2, dtype=torch.int64), (2, 4)),
            TypeError,
            "seed must be int64, got float32",
        ),
        ((torch.zeros(2, dtype=torch.int64), [0, 0], (2, 4)), TypeError, "step must be a tensor, got list"),
        (
            (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), (2, 4)),
            ValueError,
            r"step must have shape \[2\], got \[3\]",
        ),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (2, 0)), ValueError, "shape"),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (2,)), ValueError, "shape"),
        (
            (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device="meta"), (2, 4)),
            ValueError,
            "step is on meta, seed on cpu",
        ),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        philox_normal(*arguments)
