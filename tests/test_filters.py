"""Filters and mixing against the published code's values, its loop, and diffusers."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.free_init_utils import FreeInitMixin
from safetensors.torch import load_file

from consistent_video.samplers.filters import KINDS, LowPass, mix_low_high

GOLDENS = Path(__file__).parent / "goldens" / "consisti2v_A"
FILTER = json.loads((GOLDENS / "meta.json").read_text(encoding="utf-8"))["filter"]
STOPS = [(0.25, 0.25), (0.3, 0.7), (1.0, 0.1), (0.6, 1.0)]

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def goldens():
    return load_file(GOLDENS / "tensors.safetensors")


def golden_filter(kind: str) -> LowPass:
    return LowPass(kind, FILTER["n"], FILTER["d_s"], FILTER["d_t"])


def noise_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def looped(low_pass: LowPass, shape: tuple[int, int, int]) -> torch.Tensor:
    """The filter element by element."""
    values = {
        "gaussian": lambda square: math.exp(-square / (2 * low_pass.spatial_stop**2)),
        "butterworth": lambda square: 1 / (1 + (square / low_pass.spatial_stop**2) ** low_pass.order),
        "ideal": lambda square: float(square <= 2 * low_pass.spatial_stop),
    }
    mask = torch.zeros(shape)
    for t in range(shape[0]):
        for h in range(shape[1]):
            for w in range(shape[2]):
                time_distance = low_pass.spatial_stop / low_pass.temporal_stop * (2 * t / shape[0] - 1)
                square = time_distance**2 + (2 * h / shape[1] - 1) ** 2 + (2 * w / shape[2] - 1) ** 2
                mask[t, h, w] = values[low_pass.kind](square)
    return mask


@each_kind
def test_masks_equal_the_published_ones(goldens, kind):
    expected = goldens[f"filter.{kind}"]
    mask = golden_filter(kind).mask(tuple(expected.shape))
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 8, 3), (16, 1, 1)])
@pytest.mark.parametrize("kind", ["gaussian", "butterworth", "ideal"])
def test_masks_of_any_size_equal_the_loop_and_diffusers(kind, shape, stops):
    low_pass = LowPass(kind, 3, *stops)
    mask = low_pass.mask(shape)
    torch.testing.assert_close(mask, looped(low_pass, shape), rtol=1e-6, atol=0)
    expected = FreeInitMixin()._get_free_init_freq_filter(shape, "cpu", kind, 3, *stops)
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=0)


def test_a_box_reaches_around_the_centre_by_the_height():
    mask = LowPass("box", spatial_stop=0.5, temporal_stop=0.4).mask((11, 8, 13))
    assert mask.nonzero().amin(dim=0).tolist() == [3, 2, 4]
    assert mask.nonzero().amax(dim=0).tolist() == [6, 5, 7]
    assert mask.sum() == 4 * 4 * 4
    # The reach of the height is more than the width holds.
    assert LowPass("box", spatial_stop=1.0, temporal_stop=1.0).mask((4, 12, 3)).sum() == 4 * 12 * 3


@each_kind
@pytest.mark.parametrize("stops", [(0.0, 0.25), (0.25, 0.0), (0.0, 0.0)])
def test_without_a_stop_frequency_nothing_passes(kind, stops):
    assert torch.equal(LowPass(kind, 4, *stops).mask((3, 4, 5)), torch.zeros(3, 4, 5))


@pytest.mark.parametrize("kind", ["gaussian", "butterworth", "ideal"])
def test_masks_are_a_hundred_times_faster_than_the_loop(kind):
    shape, durations = (16, 64, 64), []
    for _ in range(20):
        start = time.perf_counter()
        mask = LowPass(kind).mask(shape)
        durations.append(time.perf_counter() - start)
    # A sixteenth of the frames of the loop, sixteen times over: its time does not depend on anything else.
    start = time.perf_counter()
    slow = looped(LowPass(kind), (1, *shape[1:]))
    loop = 16 * (time.perf_counter() - start)
    torch.testing.assert_close(LowPass(kind).mask((1, *shape[1:])), slow, rtol=1e-6, atol=0)
    assert mask.shape == shape
    assert loop > 100 * min(durations), f"{loop / min(durations):.0f} times"


@each_kind
def test_mixing_equals_the_published_code(goldens, kind):
    low, high = goldens["mix.low"], goldens["mix.high"]
    mixed = mix_low_high(low, high, golden_filter(kind).mask(low.shape[-3:]))
    torch.testing.assert_close(mixed, goldens[f"mix.out_{kind}"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7, 9), (1, 3, 1, 8, 6), (1, 1, 16, 3, 10)])
@pytest.mark.parametrize("kind", ["gaussian", "butterworth", "ideal"])
def test_mixing_of_any_size_equals_diffusers(kind, shape):
    low, high, mask = noise_of(*shape), noise_of(*shape, seed=1), LowPass(kind, 4, 0.5, 0.6).mask(shape[-3:])
    expected = FreeInitMixin()._apply_freq_filter(low, high, mask)
    torch.testing.assert_close(mix_low_high(low, high, mask), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mixing_computes_in_full_precision_and_keeps_the_dtype(dtype):
    low, high = noise_of(1, 4, 5, 7, 6, dtype=dtype), noise_of(1, 4, 5, 7, 6, seed=1, dtype=dtype)
    mask = LowPass().mask((5, 7, 6))
    mixed = mix_low_high(low, high, mask)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, mix_low_high(low.float(), high.float(), mask).to(dtype), rtol=1e-2, atol=1e-5)
    # A noised video in float32 and noise of the latent's dtype.
    assert mix_low_high(low.float(), high, mask).dtype == dtype


def test_mixing_at_the_ends_of_the_range():
    low, high = noise_of(1, 4, 4, 6, 6), noise_of(1, 4, 4, 6, 6, seed=1)
    assert torch.equal(mix_low_high(low, high, torch.zeros(4, 6, 6)), high)
    torch.testing.assert_close(mix_low_high(low, high, torch.ones(4, 6, 6)), low, rtol=0, atol=1e-6)
    # The mean is frequency 0, which passes whole when the sizes are even.
    mean = mix_low_high(low + 5, high, LowPass().mask((4, 6, 6))).mean(dim=(-3, -2, -1))
    torch.testing.assert_close(mean, (low + 5).mean(dim=(-3, -2, -1)))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "median"}, "'median'.*gaussian, butterworth, ideal, box"),
        ({"order": 0}, "order is 0.*above 0"),
        ({"spatial_stop": 1.5}, "spatial_stop is 1.5.*from 0 .* to 1 "),
        ({"temporal_stop": -0.1}, "temporal_stop is -0.1.*from 0 .* to 1 "),
        ({"temporal_stop": float("nan")}, "temporal_stop is nan"),
    ],
)
def test_values_outside_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LowPass(**values)


def test_tensors_that_do_not_fit_are_refused():
    low, mask = noise_of(1, 4, 3, 6, 6), LowPass().mask((3, 6, 6))
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 6, 6\).*\(1, 4, 4, 6, 6\)"):
        mix_low_high(low, noise_of(1, 4, 4, 6, 6), mask)
    with pytest.raises(ValueError, match=r"filter of \(2, 6, 6\)"):
        mix_low_high(low, low, mask[:2])
