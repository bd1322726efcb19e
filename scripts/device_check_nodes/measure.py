"""Measures one family on ComfyUI's device: load, two guided steps, decode, and diffusers' network beside them."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import comfy.model_management
import comfy.samplers
import psutil
import torch

from .clips import CLIPS, PUBLISHED, TINY, Clip, part, prompts, random_state, reference_call, write_vae

STEPS, GUIDANCE = 2, 6.0
WEIGHT_DTYPES = ("fp16", "bf16", "fp8_e4m3fn")
TILE, OVERLAP = 32, 8  # latent pixels: VAE Decode (Tiled) at 256 pixels
GIB = 2**30


@dataclass
class Usage:
    """Time in seconds; bytes allocated at the peak beyond the start, and reserved; None where they are not counted."""

    seconds: float = 0.0
    allocated: int | None = None
    reserved: int | None = None

    def report(self) -> dict:
        """Rounded, in seconds and GiB."""
        gib = {name: getattr(self, name) for name in ("allocated", "reserved")}
        return {"seconds": round(self.seconds, 3)} | {
            f"{name}_gib": None if value is None else round(value / GIB, 3) for name, value in gib.items()
        }


@contextmanager
def used() -> Iterator[Usage]:
    """Measure what a block of code uses of the device."""
    usage = Usage()
    if counted():
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    start = now()
    yield usage
    usage.seconds = now() - start
    if counted():
        usage.allocated = torch.accelerator.max_memory_allocated() - before
        usage.reserved = torch.accelerator.max_memory_reserved()


def on_cpu() -> bool:
    """Whether ComfyUI computes on the CPU."""
    return comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())


def counted() -> bool:
    """Whether PyTorch counts the memory of ComfyUI's device."""
    return torch.accelerator.is_available() and not on_cpu()


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if counted():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Check:
    """The check of one family.

    Args:
        pack: the pack, as ComfyUI imported it.
        clip: what to run.
        seconds: after which no further part is begun.
        keep: gets the result so far after every row.
    """

    def __init__(self, pack: ModuleType, clip: Clip, seconds: float, keep: Callable[[dict], None]):
        self.pack, self.clip = pack, clip
        self.deadline = time.perf_counter() + seconds
        self.device = comfy.model_management.get_torch_device()
        self.family = part(pack, "loaders.families").FAMILIES[clip.family]
        build = part(pack, "loaders.network").build_on_meta
        self.fields = self.family.parts.read_fields(clip.network)
        self.network = lambda: build(self.family.network, self.fields, f"{clip.family} as published")
        self.config = self.network().config
        self.latents = torch.randn(1, *self._shape())  # to decode, also where no step succeeds
        self.keep = keep
        self.result = {"title": self.family.title, "clip": f"{clip.frames}x{clip.height}x{clip.width}", "rows": {}}

    def run(self, streamed: bool = False) -> dict:
        """Rows by what was measured, each with its numbers or with the reason why there are none.

        Args:
            streamed: only the rows that tell what moving weights in and out changes.
        """
        dtype = self.family.dtypes[0]
        needed = 2 * sum(tensor.numel() * dtype.itemsize for tensor in self.network().state_dict().values())
        free = psutil.virtual_memory().available
        if free < needed:
            missing = f"needs {needed / GIB:.0f} GiB of free RAM for random weights, {free / GIB:.0f} are free"
            self._keep("everything", {"left out": missing})
            return self.result
        self.state = random_state(self.network(), dtype, self.device)
        tiles = {"tile_x": TILE, "tile_y": TILE, "overlap": OVERLAP}
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            write_vae(self.clip, Path(folder), self.device)
            self.vae = self.family.parts.load_vae(Path(folder))
            for weight_dtype in ("bf16",) if streamed else WEIGHT_DTYPES:
                self._row(f"{STEPS} steps, {weight_dtype}", partial(self._sample, weight_dtype))
            if not streamed:
                self._row("decode", partial(self._decode, self.vae.decode))
            self._row("decode in tiles", partial(self._decode, partial(self.vae.decode_tiled, **tiles), TILE))
            comfy.model_management.unload_all_models()
            if self.clip.reference is not None and not streamed:
                self._row("diffusers, guided step", partial(self._reference, dtype))
        return self.result

    def _row(self, name: str, measure: Callable[[], dict]) -> None:
        if time.perf_counter() > self.deadline:
            return self._keep(name, {"left out": "the time for all checks is over"})
        try:
            row = measure()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            # the row says what happened; the rows after it are worth having
            logging.exception("Device check of %s, %s", self.family.title, name)
            row = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        comfy.model_management.soft_empty_cache()
        return self._keep(name, row)

    def _keep(self, name: str, row: dict) -> None:
        self.result["rows"][name] = row
        self.keep(self.result)

    def _load(self, weight_dtype: str):
        assembly = part(self.pack, "loaders.assembly")
        latent_format = assembly.published_latent_format(self.family)
        arguments = self.family, self.network(), dict(self.state), weight_dtype, self.family.scheduler, latent_format
        return assembly.assemble(*arguments, "random weights")

    def _sample(self, weight_dtype: str) -> dict:
        comfy.model_management.unload_all_models()
        model = self._load(weight_dtype)
        both = prompts(self.pack, self.clip, self.config, self.vae)
        noise = torch.randn(1, *self._shape(), generator=torch.Generator().manual_seed(0))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*both)
        guider.set_cfg(GUIDANCE)
        sampler = part(self.pack, "samplers.reference").reference_sampler()
        sigmas = part(self.pack, "samplers.schedules").reference_sigmas(model.model.scheduler_config, STEPS)
        ends = []
        with used() as usage:
            self.latents = guider.sample(
                noise, torch.zeros_like(noise), sampler, sigmas, callback=lambda *_: ends.append(now()), seed=0
            )
        weights = 0 if model.is_dynamic() or usage.allocated is None else model.loaded_size()
        computed = str(model.model.get_dtype_inference()).removeprefix("torch.")
        return {
            "step_seconds": round(ends[-1] - ends[-2], 3),
            **usage.report(),
            "weights_gib": round(model.loaded_size() / GIB, 3),
            "of_weights_gib": round(model.model_size() / GIB, 3),
            "beside_weights_gib": None if usage.allocated is None else round((usage.allocated - weights) / GIB, 3),
            "estimate_gib": round(model.model.memory_required((2, *noise.shape[1:])) / GIB, 3),
            "computed_in": computed,
            "finite": bool(self.latents.isfinite().all()),
        }

    def _shape(self) -> tuple[int, int, int, int]:
        """Of the clip's latents, (C, F, h, w)."""
        form, frames = part(self.pack, "loaders.assembly").published_latent_format(self.family), self.clip.frames
        if self.clip.family == "consisid":
            frames = (frames - 1) // 4 + 1
        return form.latent_channels, frames, self.clip.height // 8, self.clip.width // 8

    def _decode(self, decode: Callable[[torch.Tensor], torch.Tensor], side: int | None = None) -> dict:
        """One decoding, beside the estimate for the latents, or for a tile of `side` latent pixels."""
        comfy.model_management.unload_all_models()
        shape = list(self.latents.shape)
        shape[-2:] = [length if side is None else min(side, length) for length in shape[-2:]]
        if self.vae.latent_dim == 2:  # frames are a batch, of which ComfyUI decodes as many at once as fit
            shape = [1, shape[1], *shape[-2:]]
        with used() as usage:
            frames = decode(self.latents)
        weights = 0 if self.vae.patcher.is_dynamic() else self.vae.patcher.loaded_size()
        return {
            **usage.report(),
            "beside_weights_gib": None if usage.allocated is None else round((usage.allocated - weights) / GIB, 3),
            "estimate_gib": round(self.vae.memory_used_decode(shape, self.vae.vae_dtype) / GIB, 3),
            "computed_in": str(self.vae.vae_dtype).removeprefix("torch."),
            "finite": bool(frames.isfinite().all()),
        }

    def _reference(self, dtype: torch.dtype) -> dict:
        free = comfy.model_management.get_free_memory(self.device)
        size = sum(tensor.nbytes for tensor in self.state.values())
        if not on_cpu() and size * 1.2 + 2 * GIB > free:
            return {"left out": f"its {size / GIB:.1f} GiB of weights do not fit whole into {free / GIB:.1f} GiB"}
        with torch.device("meta"):
            network = self.clip.reference(**self.fields)
        state = {
            key: tensor.to(self.device, torch.float32 if on_cpu() else dtype) for key, tensor in self.state.items()
        }
        network.load_state_dict(state, assign=True)
        network.eval().requires_grad_(False)
        call = reference_call(self.clip, network, tuple(self.latents.shape[1:]), self.device)
        call()
        with used() as usage:
            call()
        return {"step_seconds": round(usage.seconds, 3), **usage.report()}


def check(
    pack: ModuleType,
    family: str,
    tiny: bool,
    seconds: float,
    streamed: bool = False,
    keep: Callable = lambda result: None,
) -> dict:
    """Check a family by name; see `Check`."""
    clip = next(clip for clip in CLIPS[TINY if tiny else PUBLISHED] if clip.family == family)
    return Check(pack, clip, seconds, keep).run(streamed)
