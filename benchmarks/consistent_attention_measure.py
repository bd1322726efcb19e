"""Measures consistent self-attention against two published formulations of it; started by consistent_attention.py.

All three share the weights, the sampled tokens and torch's scaled dot product attention. A call goes from the normed
tokens of all panels of both halves of guidance to the output of the projection. The released low-memory formulation,
written anew here, gathers hidden tokens and projects them to keys and values again for each panel, and writes results
in place of its input. The one of the demo masks the attention among all tokens of all panels. The pack's is called as
ComfyUI's transformer block calls its patches. Banks, positions and masks are ready before a call: their making is not
measured. Memory is the peak of tensors alive that a call made; the mask's own bytes are reported beside.
"""

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from comfy_process import enter

enter()

import torch
from comfy.ldm.modules.attention import CrossAttention
from interleaved import Pairs, quartiles
from torch.nn.functional import scaled_dot_product_attention
from unet3d_measure import CallPeak, gemm_peak, random_state

from consistent_video.patches.character_bank import CharacterBank, Slot
from consistent_video.patches.consistent_attention import KEY, ConsistentAttention, Pass, Run
from consistent_video.patches.panel_attention import sample_tokens
from consistent_video.patches.token_sharing import Layer, Sharing

HEAD_WIDTH, STEP, STEPS = 64, 10, 50
LAYER = Layer("output", 0, 0)
SHARING = Sharing(plain_early=0.0)  # every layer shares
REFERENCES = {"low-memory formulation": "low_memory", "dense mask": "dense"}
FEWEST_PAIRS = {"low_memory": 3, "dense": 1}  # the mask of the largest case takes a minute


@dataclass(frozen=True)
class Size:
    """A case.

    Args:
        mode: "write": the panels see each other. "read": further panels see what they left.
        panels: P, that see each other or are read.
        reading: panels that read at once; the published formulations read for one at a time.
        grid: height and width in tokens.
        channels: of a token.
        halves: 2 with guidance.
    """

    mode: str
    panels: int
    reading: int
    grid: int
    channels: int
    halves: int = 2

    @property
    def name(self) -> str:
        """What the case is called in the results."""
        who = f", {self.reading} at once" if self.reading > 1 else ""
        halves = "" if self.halves == 2 else ", one half of guidance"
        return f"{self.mode} {self.panels}{who}, {self.grid}x{self.grid} tokens, {self.channels} channels{halves}"


SIZES = [
    Size("write", 4, 0, 32, 1280),
    Size("write", 8, 0, 32, 1280),
    Size("write", 4, 0, 64, 640),
    Size("write", 8, 0, 64, 640, halves=1),  # the dense mask of two would take a minute and 7 GB
    Size("read", 4, 1, 32, 1280),
    Size("read", 8, 1, 32, 1280),
    Size("read", 4, 1, 64, 640),
    Size("read", 8, 1, 64, 640),
    Size("read", 4, 4, 32, 1280),
]


def attend(attention: CrossAttention, hidden: torch.Tensor, seen: torch.Tensor, mask=None) -> torch.Tensor:
    """Attention of tokens (B, T, C) over tokens (B, S, C), as a processor of diffusers computes it."""
    parts = attention.to_q(hidden), attention.to_k(seen), attention.to_v(seen)
    queries, keys, values = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in parts)
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attention.to_out(attended.transpose(1, 2).flatten(2))


class Case:
    """One size in the three formulations."""

    def __init__(self, size: Size):
        self.size, generator = size, torch.Generator().manual_seed(1)
        self.rows = size.reading or size.panels  # per half
        heads = size.channels // HEAD_WIDTH
        with torch.device("meta"):
            self.attention = CrossAttention(size.channels, heads=heads, dim_head=HEAD_WIDTH)
        self.attention.load_state_dict(random_state(self.attention), assign=True)
        self.attention.to_q.weight.data *= 8  # else every token would see all others alike
        shape = (size.grid**2, size.channels)
        self.tokens = torch.randn(size.halves * self.rows, *shape, generator=generator)
        self.overwritten = torch.empty_like(self.tokens)
        self.options = {
            "n_heads": heads,
            "attn_precision": None,
            "cond_or_uncond": [1, 0][: size.halves],
            "sample_sigmas": torch.linspace(14.6, 0.0, STEPS + 1),
            "sigmas": torch.linspace(14.6, 0.0, STEPS + 1)[STEP : STEP + 1],
            "original_shape": [size.halves * self.rows, 4, 128, 128],
            "activations_shape": [size.halves * self.rows, size.channels, size.grid, size.grid],
            "block": LAYER[:2],
            "block_index": LAYER.index,
        }
        panels = Pass(SHARING, Run({}), self.options, size.halves * size.panels)
        self.positions = panels.positions(size.grid**2, self.options, torch.device("cpu"))
        self.mask, bank = self.make_mask(), None
        tensors = [*self.attention.parameters(), self.tokens, self.overwritten, self.mask, *self.positions]
        if size.reading:
            references = torch.randn(size.halves, size.panels, *shape, generator=generator)
            self.bank = references.flatten(1, 2)
            self.sampled = torch.stack([sample_tokens(half, self.positions) for half in references])
            slots = [Slot(evaluation, LAYER) for evaluation in panels.evaluations]
            bank = CharacterBank(None, {"A": dict(zip(slots, self.sampled))})
            tensors += [self.bank, self.sampled]
        patch = ConsistentAttention(SHARING, bank=bank, characters=("A",) if bank else ())
        self.replacement = patch.mix_panels(LAYER, None)
        self.patch = patch.use_bank({LAYER: self.replacement})
        known = {**self.options, "patches_replace": {"attn1": {LAYER: self.replacement}}}
        self.options[KEY] = Pass(SHARING, Run({}), known, size.halves * self.rows)
        self.given = {tensor.untyped_storage()._cdata for tensor in tensors}

    def make_mask(self) -> torch.Tensor:
        """What is seen: (P * T, P * T) where panels see each other, (T, (P + 1) * T) where they are read."""
        size, tokens = self.size, self.size.grid**2
        shown = torch.zeros(size.panels, tokens, dtype=torch.bool)
        for panel, seen in zip(shown, self.positions):
            panel[seen] = True
        if size.reading:
            return torch.cat((shown, torch.ones(1, tokens, dtype=torch.bool))).flatten().repeat(tokens, 1)
        mask = shown.flatten().repeat(size.panels * tokens, 1)
        for block in range(0, len(mask), tokens):
            mask[block : block + tokens, block : block + tokens] = True
        return mask

    def halves(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (halves, panels, T, C)."""
        return tokens.unflatten(0, (self.size.halves, -1))

    def low_memory(self) -> torch.Tensor:
        """The released low-memory formulation; both halves of guidance in one call, as there."""
        tokens, out = self.halves(self.tokens), self.halves(self.overwritten)
        if self.size.reading:
            shown = [self.sampled]
        else:
            shown = [tokens[:, panel, seen] for panel, seen in enumerate(self.positions)]
        for panel in range(self.rows):
            others = shown if self.size.reading else shown[:panel] + shown[panel + 1 :]
            out[:, panel] = attend(self.attention, tokens[:, panel], torch.cat((*others, tokens[:, panel]), dim=1))
        return self.overwritten

    def dense(self) -> torch.Tensor:
        """The formulation with a mask."""
        tokens, out = self.halves(self.tokens), self.halves(self.overwritten)
        if not self.size.reading:
            flat = tokens.flatten(1, 2)
            return attend(self.attention, flat, flat, self.mask).view_as(self.tokens)
        for panel in range(self.rows):
            seen = torch.cat((self.bank, tokens[:, panel]), dim=1)
            out[:, panel] = attend(self.attention, tokens[:, panel], seen, self.mask)
        return self.overwritten

    def ours(self) -> torch.Tensor:
        """The pack's patches, called as ComfyUI's BasicTransformerBlock does, with tensors alive as long as there."""
        tokens, context, values = self.tokens, self.tokens, self.tokens
        if self.size.reading:
            tokens, context, values = self.patch(tokens, context, values, self.options)
        tokens = self.attention.to_q(tokens)
        context = self.attention.to_k(context)
        values = self.attention.to_v(values)
        tokens = self.replacement(tokens, context, values, self.options)
        return self.attention.to_out(tokens)

    def unpatched(self) -> torch.Tensor:
        """ComfyUI's own self-attention of each panel."""
        return self.attention(self.tokens, transformer_options=self.options)

    def inspect(self, name: str) -> tuple[float, torch.Tensor]:
        """MiB at the peak of a call, and its output."""
        with CallPeak(self.given) as activations:
            output = getattr(self, name)()
        return activations.peak / 2**20, output.clone()


def compare(case: Case, seconds: float) -> dict:
    """Measure one case, in pairs of calls for so many seconds or longer."""
    peaks, outputs = {}, {}
    for name in ("unpatched", "ours", *REFERENCES.values()):
        peaks[name], outputs[name] = case.inspect(name)
    differences = [(outputs["ours"] - outputs[name]).abs().max().item() for name in REFERENCES.values()]
    mask = case.mask.nbytes / 2**20
    return {
        "peak_mib": peaks,
        "mask_mib": mask,
        "ratio_memory_dense": peaks["ours"] / peaks["dense"],
        "ratio_memory_dense_and_mask": peaks["ours"] / (peaks["dense"] + mask),
        "against": {name: speed(in_pairs(case, name, seconds / len(REFERENCES))) for name in REFERENCES.values()},
        "max_abs_difference": max(differences),
        "output_std": outputs["ours"].std().item(),
    }


def in_pairs(case: Case, name: str, seconds: float) -> Pairs:
    """Pairs of calls of a published formulation and ours."""
    pairs, deadline = Pairs(), time.perf_counter() + seconds
    while len(pairs.ours) < FEWEST_PAIRS[name] or time.perf_counter() < deadline:
        pairs.add(getattr(case, name), case.ours)
    return pairs


def speed(pairs: Pairs) -> dict:
    """Seconds and ratios of pairs of calls."""
    quiet = pairs.undisturbed()
    return {
        "pairs": len(pairs.ours),
        "undisturbed_pairs": len(quiet.ours),
        "ratio_undisturbed": quartiles(quiet.ratios("wall")),
        "ratio_all": quartiles(pairs.ratios("wall")),
        "ratio_cpu_time": quartiles(pairs.ratios("cpu")),
        "reference_seconds": quartiles([call.wall for call in pairs.reference])[1],
        "ours_seconds": quartiles([call.wall for call in pairs.ours])[1],
    }


def show(name: str, found: dict) -> None:
    """Print one case."""
    print(f"\n{name}, fp32            s    ratio  processor time   pairs  peak MiB")
    for label, key in REFERENCES.items():
        row = found["against"][key]
        quiet = f"{row['ratio_undisturbed'][1]:.3f}" if row["ratio_undisturbed"] else "-"
        counts = f"{row['undisturbed_pairs']}/{row['pairs']}"
        print(
            f"  {label:24} {row['reference_seconds']:8.2f} {quiet:>8} {row['ratio_cpu_time'][1]:15.3f}"
            f" {counts:>7} {found['peak_mib'][key]:9.1f}"
        )
    seconds = found["against"]["low_memory"]["ours_seconds"]
    print(f"  {'this pack':24} {seconds:8.2f} {found['peak_mib']['ours']:42.1f}")
    print(f"  {'ComfyUI, not patched':24} {found['peak_mib']['unpatched']:51.1f}")
    print(
        f"  ratio of memory to dense {found['ratio_memory_dense']:.3f}; with its mask of {found['mask_mib']:.1f} MiB "
        f"{found['ratio_memory_dense_and_mask']:.3f}; max abs difference {found['max_abs_difference']:.1e} "
        f"(std {found['output_std']:.2f})"
    )


@torch.no_grad()  # not inference_mode, in which attention hides what it allocates for a mask
def main(name: str, path: Path, seconds: float, threads: int) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    gemm_peak()
    peak, results = gemm_peak(), {}
    for size in SIZES:
        results[size.name] = compare(Case(size), seconds / len(SIZES))
        show(size.name, results[size.name])
    machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gemm_gflop_per_s": peak}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    document = {"network": name, "machine": machine, "versions": versions, "cases": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
