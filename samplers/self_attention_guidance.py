"""Self-Attention Guidance (Hong et al. 2023, arXiv 2210.00939) of ComfyUI's node, on clips.

The node blurs what the network looks at most and guides away from the prediction for that. It reads the attention of a
picture; a clip has frames, some networks look at other frames or at the text as well, and all scores of a transformer
over a whole clip do not fit into memory. Here only what each token receives is kept, computed for some queries at a
time.
"""

import inspect
import math

import comfy.samplers
import torch
from torch.nn.functional import conv2d, interpolate, pad

from ..models.attention import attend
from ..models.served import node_of
from ..models.temporal import as_clip, as_frames

NODE = "SelfAttentionGuidance"
PLACE = ("middle", 0, 0)
AFTER = "sampler_post_cfg_function"
KERNEL = 9
# Scores that are in memory at a time.
SCORES = 2**25


def adapt(model_options: dict) -> None:
    """Put the guidance for clips in the place of the node's functions in a run's own model options."""
    replaced = model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    functions = model_options.get(AFTER, [])
    if node_of(replaced.get(PLACE)) != NODE:
        return
    for position, function in enumerate(functions):
        if node_of(function) == NODE:
            settings = inspect.getclosurevars(function).nonlocals
            guidance = SelfAttentionGuidance(settings["scale"], settings["blur_sigma"])
            functions[position] = guidance.guide
            replaced[PLACE] = guidance.record


class SelfAttentionGuidance:
    """The guidance of one run.

    Args:
        scale: strength.
        sigma: of the blur, in latent pixels.
    """

    def __init__(self, scale: float, sigma: float):
        self.scale, self.sigma = scale, sigma
        self.received: torch.Tensor | None = None
        self.size = (1, 1)

    def record(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, told: dict) -> torch.Tensor:
        """Attention of (N, L, C) to (N, S, C), as a replacement; notes what tokens of the negative prompt receive."""
        heads, prompts = told["n_heads"], told["cond_or_uncond"]
        if 1 in prompts:
            rows = queries.shape[0] // len(prompts)
            negative = slice(rows * prompts.index(1), rows * (prompts.index(1) + 1))
            received = received_attention(queries[negative], keys[negative], heads)
            first, last = told.get("img_slice", (0, received.shape[1]))
            self.received = received[:, first:last]
            self.size = told["activations_shape"][-2:]
        return attend(queries, keys, values, heads, attn_precision=told["attn_precision"], transformer_options=told)

    def guide(self, args: dict) -> torch.Tensor:
        """The guided x0 for what ComfyUI hands to a function after its own guidance."""
        guided, x, clean = args["denoised"], args["input"], args["uncond_denoised"]
        if self.received is None or min(clean.shape[3:]) <= KERNEL // 2:
            return guided
        shown = self.received.reshape(-1, 1, *self.size).gt(1).to(clean.dtype)
        shown = as_clip(interpolate(shown, clean.shape[3:]), clean.shape[2])
        degraded = torch.lerp(clean, as_clip(blurred(as_frames(clean), self.sigma), clean.shape[2]), shown)
        (prediction,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["uncond"]], degraded + x - clean, args["sigma"], args["model_options"]
        )
        return guided + (degraded - prediction) * self.scale


def received_attention(queries: torch.Tensor, keys: torch.Tensor, heads: int) -> torch.Tensor:
    """How much attention each token receives, (N, L) with a mean of about 1, as a mean over the heads.

    Args:
        queries: (N, L, heads * D).
        keys: (N, S, heads * D); of more keys than queries, every (S / L)th belongs to a token.
    """
    queries, keys = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (queries, keys))
    count, others = queries.shape[2], keys.shape[2]
    total = torch.zeros(*keys.shape[:3], dtype=torch.float32, device=keys.device)
    step = max(1, SCORES // (queries.shape[0] * heads * others))
    for part in queries.split(step, dim=2):
        scores = (part.float() @ keys.float().transpose(2, 3)) / math.sqrt(part.shape[-1])
        total += scores.softmax(dim=-1).sum(dim=2)
    return total.mean(dim=1)[:, :: others // count] * (others / count)


def blurred(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Pictures (N, C, h, w) under a Gaussian of 9 by 9 pixels, reflected at their edges; sigma 0 leaves them."""
    if sigma <= 0:
        return pictures
    reach, channels = KERNEL // 2, pictures.shape[1]
    weights = torch.arange(-reach, reach + 1, device=pictures.device, dtype=torch.float32).div(sigma).square().mul(-0.5)
    weights = weights.softmax(dim=0).to(pictures.dtype)
    kernel = torch.outer(weights, weights).expand(channels, 1, KERNEL, KERNEL)
    return conv2d(pad(pictures, (reach,) * 4, mode="reflect"), kernel, groups=channels)
