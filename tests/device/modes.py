"""ComfyUI's memory modes and types, as its command line chooses them."""

from dataclasses import dataclass, field
from typing import Any

MIB = 2**20
# ComfyUI keeps 0.8 GiB free for the computation; what is more holds weights.
KEPT_FREE = int(0.8 * 2**30)
FP32 = {"fp32_unet": True, "fp32_vae": True, "fp32_text_enc": True}
# Room for about half of the weights of a tiny network.
SMALL = KEPT_FREE + 6 * MIB

FEW_ROWS = 16


@dataclass(frozen=True)
class Mode:
    """One way to run ComfyUI.

    Attributes:
        flags: of its command line (`--lowvram` is {"lowvram": True}).
        capacity: bytes of the card; None is plenty.
        resident: of the layers, the share that finds room with dynamic VRAM; None is without dynamic VRAM.
        weight_dtype: what the loaders are asked for.
        chunk_rows: rows that feed-forwards work on at a time; None as many as on a real card.
        tolerance: relative difference from the CPU in float32 that the types of the mode allow.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    capacity: int | None = None
    resident: float | None = None
    weight_dtype: str = "default"
    chunk_rows: int | None = None
    tolerance: float = 1e-4


def _low_vram(streams: int) -> Mode:
    return Mode({**FP32, "lowvram": True, "async_offload": streams, "reserve_vram": 0.0}, SMALL, chunk_rows=FEW_ROWS)


CPU = "cpu"
MODES = {
    CPU: Mode({"cpu": True, "fp32_text_enc": True}, tolerance=0.0),
    "classic": Mode(FP32),
    "lowvram_1": _low_vram(1),
    "lowvram_2": _low_vram(2),
    "novram": Mode({**FP32, "novram": True}, chunk_rows=FEW_ROWS),
    "highvram": Mode({**FP32, "highvram": True}),
    "gpu_only": Mode({**FP32, "gpu_only": True}),
    "dynamic_none": Mode(FP32, resident=0.0),
    "dynamic_half": Mode({**FP32, "async_offload": 1}, resident=0.5, chunk_rows=FEW_ROWS),
    "dynamic_all": Mode(FP32, resident=1.0),
    "fp16_intermediates": Mode({**FP32, "fp16_intermediates": True}, tolerance=2e-2),
    "half": Mode({}, tolerance=5e-2),
    "bf16": Mode({"bf16_unet": True, "bf16_vae": True, "bf16_text_enc": True}, resident=0.5, tolerance=2e-1),
    "fp8": Mode({}, weight_dtype="fp8_e4m3fn", tolerance=2e-1),
}
