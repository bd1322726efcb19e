"""Measures one of the pack's 3-D UNets against diffusers' in one process; started by unet3d.py.

Both networks share one set of random weights (published width, 1.4 billion parameters, fp32). A case is a guided call
as in a run: batch 2, the same noisy clip and timestep with two texts. Diffusers works out what depends on the prompt
and the picture at every call, the pack once per run; the time for that is reported beside. Memory is the peak of
tensors alive that the call made.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from comfy_process import enter

enter()

import comfy.ldm.modules.attention
import comfy.ops
import diffusers
import torch
from activation_memory import ActivationPeak
from diffusers import I2VGenXLUNet as PublishedI2VGenXLUNet
from diffusers import UNet3DConditionModel
from interleaved import Pairs, measure, quartiles
from torch.utils.flop_counter import FlopCounterMode

from consistent_video.models.adopt import adopt
from consistent_video.models.i2vgenxl_unet import I2VGenXLUNet
from consistent_video.models.unet3d import REPLACEMENTS, ModelScopeUNet

FRAMES, SMALL, LARGE = 8, 16, 24  # latent height and width
FEWEST_PAIRS = 3  # of the small size; the large one is called once
SHARE = 0.62  # of the time, after which the large size has its turn
TEXT_TOKENS, TEXT_WIDTH = 77, 1024
STEPS = 25  # of the run that the text projection is spread over
GEMM_SIZE = 2048


def random_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a network on the meta device: norms near 1, the rest scaled by fan-in, made from one small block."""
    generator = torch.Generator().manual_seed(0)
    block = torch.rand(2**22, generator=generator).mul_(2).sub_(1)
    state = {}
    for index, (key, parameter) in enumerate(network.state_dict().items()):
        values = torch.empty(parameter.shape)
        source = block[index % 997 :]  # so that no two tensors repeat each other
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        for part in values.view(-1).split(source.numel()):
            torch.mul(source[: part.numel()], scale, out=part)
        state[key] = values
    for name, module in network.named_modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            state[f"{name}.weight"] += 1
    return state


NETWORKS = {"modelscope": (UNet3DConditionModel, ModelScopeUNet), "i2vgenxl": (PublishedI2VGenXLUNet, I2VGenXLUNet)}


def build(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """diffusers' network and the pack's with the same tensors."""
    with torch.device("meta"):
        reference, ours = (network() for network in NETWORKS[name])
    state = random_state(reference)
    for network in (reference, ours):
        network.load_state_dict(state, assign=True)
        network.requires_grad_(False).eval()
    return reference, adopt(ours, comfy.ops.manual_cast, REPLACEMENTS)


class Case:
    """One size: the two calls, and everything that is measured on them."""

    def __init__(self, reference: torch.nn.Module, ours: torch.nn.Module, frames: int, size: int):
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, frames, size, size, generator=generator).repeat(2, 1, 1, 1, 1)
        text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
        timesteps = torch.full((2,), 500.0)
        self.weights = {parameter.untyped_storage()._cdata for parameter in reference.parameters()}
        self.name = f"{frames} frames {size}x{size}"
        if isinstance(ours, I2VGenXLUNet):
            picture, embedding = torch.randn(2, 4, frames, size, size), torch.randn(2, 1, TEXT_WIDTH)
            fps = torch.full((2,), 16.0)
            once = ours.condition(text, picture, embedding, fps)
            known = {"keys_values": once.keys_values, "picture": once.picture, "fps_embedding": once.fps}
            self.projection = measure(lambda: ours.condition(text, picture, embedding, fps)).wall
            self.reference = lambda: reference(latents, timesteps, fps, picture, embedding, text).sample
        else:
            known = {"text_keys_values": ours.project_text(text)}
            self.projection = measure(lambda: ours.project_text(text)).wall
            self.reference = lambda: reference(latents, timesteps, text).sample
        self.ours = lambda: ours(latents, timesteps, **known)

    def inspect(self) -> tuple[dict, Pairs]:
        """One pair of calls with arithmetic, memory and the difference of the outputs measured as well."""
        found, outputs = {}, {}

        def inspected(name: str):
            with FlopCounterMode(display=False) as flops, CallPeak(self.weights) as activations:
                outputs[name] = getattr(self, name)()
            found[name] = {"gflop": flops.get_total_flops() / 1e9, "peak_mib": activations.peak / 2**20}

        pairs = Pairs()
        pairs.add(lambda: inspected("reference"), lambda: inspected("ours"))
        found["output_std"] = outputs["reference"].std().item()
        found["max_abs_difference"] = (outputs["reference"] - outputs["ours"]).abs().max().item()
        return found, pairs


class CallPeak(ActivationPeak):
    """Peak of what a call allocates: views of the weights are none of it."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights = weights

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.weights:
            super()._track(storage)


def gemm_peak() -> float:
    """GFLOP/s of a square fp32 matrix product."""
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE)
    return 2 * GEMM_SIZE**3 / measure(lambda: matrix @ matrix).wall / 1e9


def compare(case: Case, fewest: int, deadline: float, peaks: list[float]) -> dict:
    """Measure `fewest` pairs, then more while the next would end before the deadline (of time.perf_counter).

    The first pair, which counts arithmetic and memory and warms up, is left out when there is another one.
    """
    started = time.perf_counter()
    found, first = case.inspect()
    longest, pairs = time.perf_counter() - started, Pairs()
    while len(pairs.ours) < fewest or time.perf_counter() + longest < deadline:
        started = time.perf_counter()
        pairs.add(case.reference, case.ours)
        peaks.append(gemm_peak())
        longest = max(longest, time.perf_counter() - started)
    pairs = pairs if pairs.ours else first
    quiet = pairs.undisturbed()
    for name in ("reference", "ours"):
        calls = getattr(quiet if quiet.ours else pairs, name)
        seconds = quartiles([call.wall for call in calls])[1]
        found[name] |= {"seconds": seconds, "gflop_per_s": found[name]["gflop"] / seconds}
    steps = STEPS * found["ours"]["seconds"]
    return found | {
        "pairs": len(pairs.ours),
        "undisturbed_pairs": len(quiet.ours),
        "ratio_undisturbed": quartiles(quiet.ratios("wall")),
        "ratio_all": quartiles(pairs.ratios("wall")),
        "ratio_cpu_time": quartiles(pairs.ratios("cpu")),
        "once_per_run_seconds": case.projection,
        "once_per_run_share": case.projection / (steps + case.projection),
    }


def default_attention(case: Case) -> float:
    """Seconds of one call with the attention that ComfyUI chooses on a CPU when no option is given."""
    backends = comfy.ldm.modules.attention
    chosen, backends.optimized_attention = backends.optimized_attention, backends.attention_sub_quad
    try:
        return measure(case.ours).wall
    finally:
        backends.optimized_attention = chosen


def show(name: str, reference: str, found: dict, peak: float) -> None:
    """Print one case."""
    print(f"\n{name}, batch 2, fp32                    s    GFLOP  GFLOP/s  of GEMM  peak MiB")
    for label, key in ((f"diffusers {reference}", "reference"), ("this pack", "ours")):
        row = found[key]
        speed = row["gflop_per_s"]
        print(
            f"  {label:32} {row['seconds']:8.2f} {row['gflop']:8.0f} {speed:8.0f} {speed / peak:7.0%}"
            f" {row['peak_mib']:9.0f}"
        )
    for label, key in (
        (f"seconds, {found['undisturbed_pairs']} undisturbed pairs", "ratio_undisturbed"),
        (f"seconds, all {found['pairs']} pairs", "ratio_all"),
        ("processor seconds, all pairs", "ratio_cpu_time"),
    ):
        if found[key]:
            first, median, third = found[key]
            print(f"  ratio of {label:32} {median:.3f}  (quartiles {first:.3f} .. {third:.3f})")
    share = found["once_per_run_share"]
    print(f"  prompt and picture once per run: {found['once_per_run_seconds']:.2f} s, {share:.2%} of {STEPS} steps")
    print(f"  max abs difference of the outputs: {found['max_abs_difference']:.1e} (std {found['output_std']:.2f})")


@torch.inference_mode()
def main(name: str, path: Path, seconds: float, threads: int) -> None:
    started = time.perf_counter()
    torch.set_num_threads(threads or torch.get_num_threads())
    networks = build(name)
    gemm_peak()
    results, peaks = {}, [gemm_peak()]
    small, large = (Case(*networks, FRAMES, size) for size in (SMALL, LARGE))
    results[small.name] = compare(small, FEWEST_PAIRS, started + SHARE * seconds, peaks)
    results[large.name] = compare(large, 0, started + 0.95 * seconds, peaks)
    slower = default_attention(small)
    peak = max(peaks)
    for case in (small.name, large.name):
        show(case, type(networks[0]).__name__, results[case], peak)
    backend = comfy.ldm.modules.attention.optimized_attention.__name__
    print(f"\nGEMM peak {peak:.0f} GFLOP/s on {torch.get_num_threads()} threads; attention: {backend}")
    print(f"with ComfyUI's CPU default (attention_sub_quad), {small.name}: {slower:.2f} s")
    machine = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gemm_gflop_per_s": peak,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    attention = {"used": backend, "comfyui_default": "attention_sub_quad", "comfyui_default_seconds": slower}
    document = {"network": name, "machine": machine, "versions": versions, "attention": attention, "cases": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
