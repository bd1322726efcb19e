"""The category and the widgets of nodes that load networks."""

from comfy_api.latest import io

from ..loaders import folders
from ..loaders.families import Family
from ..loaders.network import WEIGHT_DTYPES

CATEGORY = "ConsistentVideo/loaders"

WEIGHT_DTYPE_TOOLTIP = (
    "Type in which the network's weights are kept. default: what ComfyUI finds best for this device. "
    "fp16 and bf16 halve, fp8_e4m3fn quarters the size of fp32."
)


def weight_dtype_input() -> io.Combo.Input:
    """The widget that every network loader has."""
    return io.Combo.Input(
        "weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=WEIGHT_DTYPE_TOOLTIP, advanced=True
    )


def checkpoint_input(family: Family, components: str) -> io.Combo.Input:
    """The widget that chooses a folder of a family."""
    return io.Combo.Input(
        "checkpoint",
        options=folders.list_checkpoints(family),
        tooltip=f"Folder under models/diffusers with sub-folders {components}, scheduler; "
        f"published as {family.repository}.",
    )
