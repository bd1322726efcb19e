"""Noise of a batch of which every row is drawn by itself, so that one row can be drawn again alone.

A native sampler that adds noise in its steps draws it for the whole batch from the seed of the run: the second row of a
batch then never gets its noise again, and batches of one that share a seed all get the same. Here each row has a seed
of its own. It follows from the seed of the run and from what the row is: a number that the caller knows, or, where no
caller can know it, the row's initial noise, which ComfyUI draws by the row's index in its batch.
"""

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence

import comfy.cli_args
import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler

# Values of a row's initial noise whose signs tell it from others. Signs, because the last bits of noise that went
# through a filter depend on the batch it was filtered in.
MARKS = 64

# Samplers of ComfyUI that take the noise between two noise levels from a Brownian motion, and where they compute it.
BROWNIAN = {
    f"sample_{name}{device}": device == ""
    for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
    for device in ("", "_gpu")
}
# Samplers of ComfyUI that hand on options which they do not name.
HANDING_ON = ("dpm_adaptive_function",)


def noise_seed(*parts: object) -> int:
    """A seed, 0..2**63 - 1, for whatever the parts name together; other parts give noise that has nothing in common."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def row_seeds(seed: int | None, noise: torch.Tensor, purpose: str = "steps") -> list[int] | None:
    """A seed for each row of a batch, the same wherever the row is drawn.

    Args:
        seed: of the run; None for noise that is another each time.
        noise: (B, ...) initial noise, on any device. Rows without noise, which go on with an unfinished run, are told
            apart by their number.
        purpose: noise of different purposes has nothing in common.

    Returns:
        B seeds, or None without a seed.
    """
    if seed is None:
        return None
    rows = noise.flatten(1)
    signs = (rows[:, :: max(1, rows.shape[1] // MARKS)][:, :MARKS] > 0).int()
    noisy = rows.any(dim=1, keepdim=True).int()
    marks = torch.cat((noisy, signs), dim=1).tolist()
    return [noise_seed(purpose, seed, mark if mark[0] else number) for number, mark in enumerate(marks)]


def brought_to(device: torch.device, noise: torch.Tensor) -> torch.Tensor:
    """Noise drawn on the CPU, on the device.

    Where memory can be pinned, the host does not wait until the device has done what came before.
    """
    pinned = comfy.model_management.is_device_cuda(device) and not comfy.cli_args.args.disable_pinned_memory
    if pinned and comfy.model_management.is_device_cpu(noise.device):
        noise = noise.pin_memory()
    return comfy.model_management.cast_to_device(noise, device, noise.dtype)


class RowNoise:
    """Unit noise of a tensor's shape, each row from a generator of its own.

    Args:
        seeds: one per row, or None for the global generator.
        device: where to draw; on the CPU a seed means the same on every device.
    """

    def __init__(self, seeds: Sequence[int] | None, device: torch.device | str = "cpu"):
        self.device = device
        self.generators = seeds and [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """Noise (B, ...) of the shape, type and device of `like`."""
        if self.generators is None:
            return brought_to(like.device, torch.randn(like.shape, dtype=like.dtype))
        rows = [
            torch.randn(like.shape[1:], dtype=like.dtype, device=self.device, generator=generator)
            for generator in self.generators
        ]
        return brought_to(like.device, torch.stack(rows))


def seeded(sampler: comfy.samplers.Sampler, seeds: Sequence[int]) -> comfy.samplers.Sampler:
    """A sampler that draws the noise of its steps from one seed per row.

    Served are ComfyUI's samplers and those of others that take a `noise_sampler`, as every ComfyUI sampler that adds
    noise does, and the reference sampler. Any other sampler is returned as it is.

    Args:
        sampler: left as it is. Options of its own, a noise sampler among them, have precedence.
        seeds: one per row of the batch.
    """
    if hasattr(sampler, "seeded"):
        return sampler.seeded(seeds)
    if not isinstance(sampler, comfy.samplers.KSAMPLER) or not _takes_noise(sampler.sampler_function):
        return sampler
    unseeded, sampler = sampler, copy.copy(sampler)
    sampler.unseeded = unseeded
    sampler.sampler_function = _with_row_noise(sampler.sampler_function, seeds)
    return sampler


def _takes_noise(function: Callable) -> bool:
    return function.__name__ in HANDING_ON or "noise_sampler" in inspect.signature(function).parameters


def _with_row_noise(function: Callable, seeds: Sequence[int]) -> Callable:
    @functools.wraps(function)
    def sample(model, x, sigmas, *args, **options):
        if options.get("noise_sampler") is None:
            options["noise_sampler"] = _noise_sampler(function.__name__, x, sigmas, seeds)
        return function(model, x, sigmas, *args, **options)

    return sample


def _noise_sampler(name: str, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int]) -> Callable:
    """The kind of noise that a sampler of ComfyUI draws by default, with a seed per row."""
    if name in BROWNIAN and len(sigmas) > 1:
        lowest, highest = sigmas[sigmas > 0].min(), sigmas.max()
        return BrownianTreeNoiseSampler(x, lowest, highest, seed=list(seeds), cpu=BROWNIAN[name])
    draw = RowNoise(seeds, x.device)
    return lambda sigma, sigma_next: draw(x)
