"""Measures ConsistI2V's attention blocks against the published formulation of them; started by unet3d.py.

Both share the weights and the attention function. The published formulation, written anew here, repeats the first
frame's tokens for every frame, its window for every pixel and the text for every frame and every pixel, before any of
it is projected to keys and values, and projects the text at every call. The pack projects each token once, and the text
once per run; the time for that is reported beside. A case is one level of the network at the published width and size:
a guided call (batch 2) of 16 frames of 256x256 pixels. Memory is the peak of tensors alive that the call made.
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

import comfy.ops
import torch
from diffusers.models.attention import FeedForward
from interleaved import Pairs, measure, quartiles
from torch.nn.functional import scaled_dot_product_attention
from unet3d_measure import CallPeak, gemm_peak, random_state

from consistent_video.models.adopt import adopt
from consistent_video.models.consisti2v_attention import neighbours, rotate
from consistent_video.models.consisti2v_layers import LayerSettings, SpatialTransformer, TemporalTransformer
from consistent_video.models.unet3d import REPLACEMENTS

CLIPS, FRAMES, TEXT_TOKENS, TEXT_WIDTH, STEPS = 2, 16, 77, 1024, 50
SETTINGS = LayerSettings(32, 1e-5, 1280, TEXT_WIDTH, 8, True)
LEVELS = [(320, 5, 32), (640, 10, 16), (1280, 20, 8)]  # channels, heads, latent height and width
FEWEST_PAIRS = 3


def attend(layer, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    heads = [part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
    return layer.to_out[0](scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def published_spatial(transformer: SpatialTransformer, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Frames (B * F, C, h, w) and texts (B, S, D)."""
    block = transformer.transformer_blocks[0]
    text = text.repeat_interleave(FRAMES, dim=0)
    tokens = transformer.proj_in(transformer.norm(hidden).flatten(2).transpose(1, 2))
    normed = block.norm1(tokens)
    first = normed.unflatten(0, (-1, FRAMES))[:, :1].repeat(1, FRAMES, 1, 1).flatten(0, 1)
    seen = torch.cat((normed, first), dim=1)
    tokens = tokens + attend(block.attn1, block.attn1.to_q(normed), block.attn1.to_k(seen), block.attn1.to_v(seen))
    asked = block.attn2.to_q(block.norm2(tokens))
    tokens = tokens + attend(block.attn2, asked, block.attn2.to_k(text), block.attn2.to_v(text))
    tokens = tokens + FeedForward.forward(block.ff, block.norm3(tokens))
    return hidden + transformer.proj_out(tokens).transpose(1, 2).reshape(hidden.shape)


def published_temporal(transformer: TemporalTransformer, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Frames (B * F, C, h, w) and texts (B, S, D)."""
    block, pixels = transformer.transformer_blocks[0], hidden.shape[-1] * hidden.shape[-2]
    frames = transformer.norm(hidden).flatten(2).transpose(1, 2).unflatten(0, (-1, FRAMES))
    tokens = transformer.proj_in(frames.transpose(1, 2).flatten(0, 1))
    normed = block.norm1(tokens)
    window = normed.unflatten(0, (-1, pixels))[:, :, 0][:, neighbours(*hidden.shape[2:], hidden.device)]
    seen = torch.cat((normed, window.flatten(0, 1)), dim=1)
    cosines, sines = block.attn1.rotary_emb(normed)
    still = torch.ones(window.shape[2], cosines.shape[1]), torch.zeros(window.shape[2], cosines.shape[1])
    turned = [torch.cat(pair) for pair in zip((cosines, sines), still)]
    queries, keys = rotate(block.attn1.to_q(normed), cosines, sines), rotate(block.attn1.to_k(seen), *turned)
    tokens = tokens + attend(block.attn1, queries, keys, block.attn1.to_v(seen))
    text = text.repeat_interleave(pixels, dim=0)
    asked = rotate(block.attn2.to_q(block.norm2(tokens)), *block.attn2.rotary_emb(tokens))
    tokens = tokens + attend(block.attn2, asked, block.attn2.to_k(text), block.attn2.to_v(text))
    tokens = tokens + FeedForward.forward(block.ff, block.norm3(tokens))
    frames = transformer.proj_out(tokens).unflatten(0, (-1, pixels)).permute(0, 2, 3, 1).reshape(hidden.shape)
    share = transformer.alpha.clamp(0, 1)
    return share * hidden + (1 - share) * (hidden + frames)


class Level:
    """The two transformers of one level, called in both formulations."""

    def __init__(self, channels: int, heads: int, size: int):
        self.name = f"{channels} channels, {FRAMES} frames {size}x{size}"
        with torch.device("meta"):
            self.blocks = torch.nn.ModuleList(
                [SpatialTransformer(channels, heads, SETTINGS), TemporalTransformer(channels, SETTINGS)]
            )
        self.blocks.load_state_dict(random_state(self.blocks), assign=True)
        adopt(self.blocks.requires_grad_(False).eval(), comfy.ops.manual_cast, REPLACEMENTS)
        self.weights = {parameter.untyped_storage()._cdata for parameter in self.blocks.parameters()}
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(CLIPS * FRAMES, channels, size, size, generator=generator)
        self.text = torch.randn(CLIPS, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
        self.keys_values = self.project()

    def project(self) -> list[torch.Tensor]:
        return [block.text_attention.project(self.text) for block in self.blocks]

    def reference(self) -> torch.Tensor:
        spatial, temporal = self.blocks
        return published_temporal(temporal, published_spatial(spatial, self.hidden, self.text), self.text)

    def ours(self) -> torch.Tensor:
        hidden = self.hidden
        for block, keys_values in zip(self.blocks, self.keys_values):
            hidden = block(hidden, keys_values)
        return hidden

    def peak(self, name: str) -> tuple[float, torch.Tensor]:
        """MiB at the peak of a call, and its output."""
        with CallPeak(self.weights) as activations:
            output = getattr(self, name)()
        return activations.peak / 2**20, output


def compare(level: Level, deadline: float) -> dict:
    """Measure one level in pairs of calls, at least `FEWEST_PAIRS`, until the deadline (of time.perf_counter)."""
    (reference_peak, expected), (peak, output) = level.peak("reference"), level.peak("ours")
    pairs = Pairs()
    while len(pairs.ours) < FEWEST_PAIRS or time.perf_counter() < deadline:
        pairs.add(level.reference, level.ours)
    quiet = pairs.undisturbed()
    return {
        "reference_mib": reference_peak,
        "ours_mib": peak,
        "ratio_memory": peak / reference_peak,
        "pairs": len(pairs.ours),
        "undisturbed_pairs": len(quiet.ours),
        "ratio_undisturbed": quartiles(quiet.ratios("wall")),
        "ratio_all": quartiles(pairs.ratios("wall")),
        "ratio_cpu_time": quartiles(pairs.ratios("cpu")),
        "reference_seconds": quartiles([call.wall for call in pairs.reference])[1],
        "ours_seconds": quartiles([call.wall for call in pairs.ours])[1],
        "once_per_run_seconds": measure(level.project).wall,
        "max_abs_difference": (expected - output).abs().max().item(),
        "output_std": expected.std().item(),
    }


def show(name: str, found: dict) -> None:
    """Print one level."""
    print(f"\n{name}, batch {CLIPS}, fp32                   s   peak MiB")
    for label, key in (("published formulation", "reference"), ("this pack", "ours")):
        print(f"  {label:32} {found[f'{key}_seconds']:10.3f} {found[f'{key}_mib']:10.1f}")
    for label, key in (
        (f"seconds, {found['undisturbed_pairs']} undisturbed pairs", "ratio_undisturbed"),
        (f"seconds, all {found['pairs']} pairs", "ratio_all"),
        ("processor seconds, all pairs", "ratio_cpu_time"),
    ):
        if found[key]:
            first, median, third = found[key]
            print(f"  ratio of {label:32} {median:.3f}  (quartiles {first:.3f} .. {third:.3f})")
    print(f"  ratio of memory {found['ratio_memory']:.3f}; text once per run {found['once_per_run_seconds']:.4f} s")
    print(f"  max abs difference of the outputs: {found['max_abs_difference']:.1e} (std {found['output_std']:.2f})")


@torch.inference_mode()
def main(name: str, path: Path, seconds: float, threads: int) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    peak, results = gemm_peak(), {}
    for level in map(Level, *zip(*LEVELS)):
        results[level.name] = compare(level, time.perf_counter() + seconds / len(LEVELS))
        show(level.name, results[level.name])
    machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gemm_gflop_per_s": peak}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    document = {"network": name, "machine": machine, "versions": versions, "cases": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
