"""Attention through ComfyUI's function, wherever the backend that the user chose computes it.

xformers, Sage and flash attention take some widths of a head, 16-bit types and GPUs only. ComfyUI's own networks are
within those limits; published video networks are not: heads of 4 channels, of 40 and of 160, encoders that run on the
CPU, batches of every pixel of a clip. All attention of this pack's networks goes through `attend`, which leaves such
calls to PyTorch's.
"""

import logging
from collections.abc import Callable

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch, wrap_attn

# Backends of PyTorch operations, which compute everything everywhere.
UNLIMITED = ("attention_pytorch", "attention_basic", "attention_sub_quad", "attention_split")
# Backends of ComfyUI whose kernels want 16-bit types and a GPU, with the widths of a head that they take.
SIXTEEN_BIT = {
    "attention_sage": (64, 96, 128),
    "attention3_sage": (64, 128),
    "attention_flash": tuple(range(8, 257, 8)),
}
GPU_ONLY = ("attention_xformers", *SIXTEEN_BIT)
# No fused kernel takes heads of another multiple or wider than this.
HEAD_MULTIPLE, WIDEST_HEAD = 8, 256

# A kernel's grid has at most 65535 rows along the batch. ComfyUI cuts batches here as well.
LARGEST_BATCH = 2**15


@wrap_attn
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options,
) -> torch.Tensor:
    """Attention; arguments and result are those of ComfyUI's attention functions.

    An `optimized_attention_override` of the transformer options is called instead, with this function's own choice as
    the one to go on with.

    Args:
        q, k, v: (B, L, heads * D), (B, S, heads * D) twice; with `skip_reshape` (B, heads, L or S, D).
        mask: added to the scores.
        attn_precision: type to compute the scores in, for backends that store them.
        options: more keywords of those functions, among them `transformer_options`.

    Returns:
        (B, L, heads * D); with `skip_output_reshape` (B, heads, L, D).
    """
    width = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    backend = comfy.ldm.modules.attention.optimized_attention
    if not suits(backend, width, q.dtype, q.device):
        backend = attention_pytorch
    options |= {
        "attn_precision": attn_precision,
        "skip_reshape": skip_reshape,
        "skip_output_reshape": skip_output_reshape,
    }
    if q.shape[0] <= LARGEST_BATCH or comfy.model_management.is_device_cpu(q.device):
        return _computed(backend, q, k, v, heads, mask, options)
    result = None
    for start in range(0, q.shape[0], LARGEST_BATCH):
        rows = slice(start, start + LARGEST_BATCH)
        own_mask = mask if mask is None or mask.ndim < 3 or mask.shape[0] == 1 else mask[rows]
        part = _computed(backend, q[rows], k[rows], v[rows], heads, own_mask, options)
        if result is None:
            result = part.new_empty(q.shape[0], *part.shape[1:])
        result[rows] = part
    return result


def suits(backend: Callable, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a backend, known by its name in ComfyUI or not, may compute heads of this width.

    Args:
        backend: an attention function.
        width: channels of one head.
        dtype, device: of queries, keys and values.
    """
    name = getattr(backend, "__name__", "")
    if name in UNLIMITED:
        return True
    if width % HEAD_MULTIPLE or width > WIDEST_HEAD:
        return False
    if name in GPU_ONLY and comfy.model_management.is_device_cpu(device):
        return False
    return name not in SIXTEEN_BIT or (width in SIXTEEN_BIT[name] and dtype in (torch.float16, torch.bfloat16))


def _computed(backend: Callable, q, k, v, heads: int, mask: torch.Tensor | None, options: dict) -> torch.Tensor:
    """The backend's result, or PyTorch's where the backend refuses for a reason of its own (a card, a type)."""
    if getattr(backend, "__name__", "") in UNLIMITED:
        return backend(q, k, v, heads, mask=mask, **options)
    try:
        return backend(q, k, v, heads, mask=mask, **options)
    except (RuntimeError, ValueError, AssertionError) as error:
        if comfy.model_management.is_oom(error):
            raise
        logging.debug("%s refuses attention of %s, PyTorch computes it: %s", backend, tuple(q.shape), error)
    return attention_pytorch(q, k, v, heads, mask=mask, **options)
