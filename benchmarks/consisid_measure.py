"""Measures ConsisID's transformer against diffusers' in one process; started by unet3d.py.

Both share one set of random weights of the published width (48 heads of 64, the face extractor whole, fp32). Two of the
42 blocks are built: one with a face attention and one without, the unit that the network repeats 21 times. A case is a
guided step: batch 2, the same noisy clip, picture and face with two texts, rotary angles known to both. Diffusers
extracts the face's tokens at every step, the pack computes them, their keys and values and the picture's tokens once
per run; that time is reported beside. With two blocks the extractor is a larger part of a step than with 42, so the
ratio is also given for the blocks alone and, computed from the same pairs, for the whole depth. The lowest ratio that
the matrix products leave open stands beside it. Memory is the peak of
tensors alive that a call made; at the published clip size it is counted without arithmetic.
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
from diffusers import ConsisIDTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from interleaved import Call, Pairs, measure, quartiles
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from unet3d_measure import CallPeak, gemm_peak, random_state

from consistent_video.models.adopt import adopt
from consistent_video.models.consisid_transformer import REPLACEMENTS, ConsisIDTransformer

BUILT, DEPTH, STEPS = 2, 42, 50  # blocks built, blocks published, steps of a run
UNITS = DEPTH // BUILT
SIZES = [(3, 20, 30), (1, 60, 90)]  # latent frames, height, width: a small clip, and one frame of the published size
PUBLISHED_SIZE = (13, 60, 90)
FEWEST_PAIRS = 3
SHARE = 0.6  # of the time, after which the second size has its turn
TEXT, FACE, VISION, SCALES = (226, 4096), 1280, (577, 1024), 5
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {f"aten::{name}" for name in ("addmm", "mm", "bmm", "baddbmm", "mkldnn_convolution", ATTENTION)}


def settings(frames: int, height: int, width: int) -> dict:
    """The published configuration for clips of this size, two blocks deep."""
    return {
        "num_attention_heads": 48,
        "in_channels": 32,
        "num_layers": BUILT,
        "sample_frames": 4 * (frames - 1) + 1,
        "sample_height": height,
        "sample_width": width,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
        "is_train_face": True,
    }


class Step:
    """A guided step of one size in both networks, on the CPU or, without arithmetic, on the meta device."""

    def __init__(self, size: tuple[int, int, int], device: str = "cpu"):
        self.name = f"{size[0]} latent frames {size[1]}x{size[2]}"
        with torch.device("meta"):
            self.networks = [kind(**settings(*size)) for kind in (ConsisIDTransformer3DModel, ConsisIDTransformer)]
        state = self.networks[0].state_dict() if device == "meta" else random_state(self.networks[0])
        for network in self.networks:
            network.load_state_dict(state, assign=True)
            network.requires_grad_(False).eval()
        adopt(self.networks[1], comfy.ops.manual_cast, REPLACEMENTS)
        self.weights = {tensor.untyped_storage()._cdata for tensor in state.values()}
        with torch.device(device):
            torch.manual_seed(1)
            self.noisy = torch.randn(1, 16, *size).repeat(2, 1, 1, 1, 1)
            self.picture = torch.randn(1, 16, *size).repeat(2, 1, 1, 1, 1)
            self.text = torch.randn(2, *TEXT)
            self.face = torch.randn(1, FACE), [torch.randn(1, *VISION) for _ in range(SCALES)]
            self.timesteps = torch.full((2,), 500.0)
        grid = (size[1] // 2, size[2] // 2)
        self.rotary = get_3d_rotary_pos_embed(64, ((0, 0), grid), grid, size[0], device=self.noisy.device)
        self.known = self.condition()

    def condition(self) -> dict:
        """What the pack hands to every step: computed for each of the two prompts, then joined as ComfyUI does."""
        halves = [self.networks[1].condition(text[None], self.picture[:1], *self.face) for text in self.text]
        joined = {
            name: torch.cat([getattr(half, field) for half in halves])
            for name, field in (("text_tokens", "text"), ("picture_tokens", "picture"), ("face_keys_values", "face"))
        }
        return joined | {"rotary": (halves[0].rotary,)}

    def reference(self) -> torch.Tensor:
        clip = torch.cat((self.noisy, self.picture), dim=1).transpose(1, 2)
        face = dict(zip(("id_cond", "id_vit_hidden"), self.face))
        output = self.networks[0](clip, self.text, self.timesteps, image_rotary_emb=self.rotary, **face)
        return output.sample.transpose(1, 2)

    def ours(self) -> torch.Tensor:
        return self.networks[1](self.noisy, self.timesteps, **self.known)

    def extract(self) -> torch.Tensor:
        """The part of diffusers' step that is the face's alone."""
        return self.networks[0].local_facial_extractor(*self.face)

    def kept_mib(self) -> float:
        """MiB that the pack keeps during a run; the keys and values are those of the built face attentions."""
        tensors = [*self.known["rotary"], *(value for key, value in self.known.items() if key != "rotary")]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / 2**20

    def peak(self, name: str) -> tuple[float, torch.Tensor]:
        """MiB at the peak of a call, and its output."""
        with CallPeak(self.weights) as activations:
            output = getattr(self, name)()
        return activations.peak / 2**20, output


def inspect(step: Step, name: str) -> tuple[dict, torch.Tensor]:
    """Arithmetic and memory of a call, what of its time matrix products and attention take; its output."""
    with FlopCounterMode(display=False) as flops:
        peak, output = step.peak(name)
    with profile(activities=[ProfilerActivity.CPU]) as spent:
        getattr(step, name)()
    times = {event.key: event.self_cpu_time_total / 1e6 for event in spent.key_averages()}
    found = {
        "gflop": flops.get_total_flops() / 1e9,
        "peak_mib": peak,
        "product_seconds": sum(times.get(key, 0) for key in PRODUCTS),
        "profiled_seconds": sum(times.values()),
    }
    return found, output


def at_depths(step: float, extractor: float) -> dict[str, float]:
    """What diffusers takes for a step as measured, for its blocks alone, and at the published depth per built unit."""
    blocks = step - extractor
    return {"step": step, "blocks": blocks, "full_depth": blocks + extractor / UNITS}


def ratios(pairs: Pairs, extractions: list[Call], clock: str) -> dict[str, list[float]]:
    """Quartiles of ours / reference at the three depths."""
    found = {"step": [], "blocks": [], "full_depth": []}
    for reference, ours, extraction in zip(pairs.reference, pairs.ours, extractions):
        theirs, mine, face = (getattr(call, clock) for call in (reference, ours, extraction))
        for depth, seconds in at_depths(theirs, face).items():
            found[depth].append(mine / seconds)
    return {depth: quartiles(values) for depth, values in found.items()}


def floors(theirs: dict, face: dict) -> dict[str, float]:
    """The ratios if everything in the blocks but diffusers' own matrix products took no time.

    The extractor's part of diffusers' time is taken to be its part of the arithmetic.
    """
    extractor = face["gflop"] / theirs["gflop"]
    products = theirs["product_seconds"] / theirs["profiled_seconds"] * (1 - extractor)
    return {depth: products / seconds for depth, seconds in at_depths(1, extractor).items()}


def compare(step: Step, fewest: int, deadline: float, peaks: list[float]) -> dict:
    """Measure pairs, at least `fewest`, then more while the next would end before the deadline (of perf_counter)."""
    (theirs, expected), (mine, output) = inspect(step, "reference"), inspect(step, "ours")
    face, _ = inspect(step, "extract")
    found = {"reference": theirs, "ours": mine | {"kept_mib": step.kept_mib()}, "extractor": face}
    pairs, extractions, longest = Pairs(), [], 0.0
    while len(pairs.ours) < fewest or time.perf_counter() + longest < deadline:
        started = time.perf_counter()
        pairs.add(step.reference, step.ours)
        extractions.append(measure(step.extract))
        peaks.append(gemm_peak())
        longest = max(longest, time.perf_counter() - started)
    quiet = pairs.undisturbed()
    for name, calls in (("reference", pairs.reference), ("ours", pairs.ours), ("extractor", extractions)):
        found[name]["seconds"] = quartiles([call.wall for call in calls])[1]
        found[name]["cpu_seconds"] = quartiles([call.cpu for call in calls])[1]
    once = measure(step.condition)
    return found | {
        "pairs": len(pairs.ours),
        "undisturbed_pairs": len(quiet.ours),
        "ratio_undisturbed": quartiles(quiet.ratios("wall")),
        "ratio_seconds": ratios(pairs, extractions, "wall"),
        "ratio_cpu_time": ratios(pairs, extractions, "cpu"),
        "ratio_memory": mine["peak_mib"] / theirs["peak_mib"],
        "ratio_floor": floors(theirs, face),
        "once_per_run_seconds": once.wall,
        "once_per_run_cpu_seconds": once.cpu,
        "max_abs_difference": (expected - output).abs().max().item(),
        "output_std": expected.std().item(),
    }


def default_attention(step: Step) -> float:
    """Processor seconds of one of our steps with the attention that ComfyUI chooses on a CPU without an option."""
    backends = comfy.ldm.modules.attention
    chosen, backends.optimized_attention = backends.optimized_attention, backends.attention_sub_quad
    try:
        return measure(step.ours).cpu
    finally:
        backends.optimized_attention = chosen


def published_peaks() -> dict[str, float]:
    """MiB at the peak of a step of the published clip size, in fp32, and what the pack keeps."""
    step = Step(PUBLISHED_SIZE, "meta")
    return {name: step.peak(name)[0] for name in ("reference", "ours")} | {"kept": step.kept_mib()}


def show(name: str, found: dict, peak: float) -> None:
    """Print one case."""
    print(f"\n{name}, {BUILT} blocks, batch 2, fp32    s    cpu s   GFLOP  of GEMM  products  peak MiB")
    for label, key in (("diffusers", "reference"), ("  its extractor", "extractor"), ("this pack", "ours")):
        row = found[key]
        speed = row["gflop"] / row["seconds"] / peak
        print(
            f"  {label:32} {row['seconds']:12.2f} {row['cpu_seconds']:8.2f} {row['gflop']:7.0f} {speed:8.0%}"
            f" {row['product_seconds'] / row['profiled_seconds']:9.0%} {row['peak_mib']:9.1f}"
        )
    labels = {"step": "a step", "blocks": "its blocks", "full_depth": f"{DEPTH} blocks"}
    for clock, key in (("seconds", "ratio_seconds"), ("processor seconds", "ratio_cpu_time")):
        for depth, (first, median, third) in found[key].items():
            label = f"{clock}, {labels[depth]}, {found['pairs']} pairs"
            print(f"  ratio of {label:40} {median:.3f}  (quartiles {first:.3f} .. {third:.3f})")
    if found["ratio_undisturbed"]:
        label = f"seconds, a step, {found['undisturbed_pairs']} undisturbed pairs"
        print(f"  ratio of {label:40} {found['ratio_undisturbed'][1]:.3f}")
    lowest = ", ".join(f"{labels[depth]} {ratio:.3f}" for depth, ratio in found["ratio_floor"].items())
    print(f"  lowest ratio with these matrix products: {lowest}")
    run = STEPS * UNITS * found["ours"]["seconds"]
    share = found["once_per_run_seconds"] / (found["once_per_run_seconds"] + run)
    print(
        f"  once per run: {found['once_per_run_seconds']:.2f} s, {share:.2%} of {STEPS} steps of {DEPTH} blocks; kept "
        f"{found['ours']['kept_mib']:.1f} MiB; ratio of memory {found['ratio_memory']:.3f}"
    )
    print(f"  max abs difference of the outputs: {found['max_abs_difference']:.1e} (std {found['output_std']:.2f})")


@torch.inference_mode()
def main(name: str, path: Path, seconds: float, threads: int) -> None:
    started = time.perf_counter()
    torch.set_num_threads(threads or torch.get_num_threads())
    gemm_peak()
    results, peaks, published = {}, [gemm_peak()], published_peaks()
    for size, share in zip(SIZES, (SHARE, 0.95)):
        step = Step(size)
        results[step.name] = compare(step, FEWEST_PAIRS if share == SHARE else 1, started + share * seconds, peaks)
        if share == SHARE:
            slower = default_attention(step)
        del step  # before the next one is built
    peak = max(peaks)
    for case, found in results.items():
        show(case, found, peak)
    memory = published["ours"] / published["reference"]
    print(
        f"\npeak at the published clip size {PUBLISHED_SIZE}: diffusers {published['reference']:.0f} MiB, this pack "
        f"{published['ours']:.0f} MiB and {published['kept']:.0f} MiB kept, ratio {memory:.3f}"
    )
    print(f"with ComfyUI's CPU default (attention_sub_quad), first size: {slower:.2f} processor seconds")
    print(f"GEMM peak {peak:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    machine = {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gemm_gflop_per_s": peak,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    document = {
        "network": name,
        "machine": machine,
        "versions": versions,
        "blocks": {"built": BUILT, "published": DEPTH},
        "attention": {
            "used": comfy.ldm.modules.attention.optimized_attention.__name__,
            "comfyui_default": "attention_sub_quad",
            "comfyui_default_cpu_seconds": slower,
        },
        "cases": results,
        "published_size_peak_mib": published | {"ratio": memory},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
