"""Windows over the pictures of a batch: ComfyUI's context windows, set up for stories.

The sliding window is that of StoryDiffusion's algorithm 1 (Zhou et al. 2024, arXiv 2405.01434). There attention is
averaged over the windows, here the prediction is, so that only a window's activations are in memory.
"""

import comfy.context_windows
import comfy.model_patcher
from comfy.context_windows import ContextFuseMethods, ContextSchedules


def slide(model: comfy.model_patcher.ModelPatcher, window: int, stride: int = 1) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model that draws `window` pictures of a batch at a time.

    Args:
        window: pictures, 2 or more.
        stride: pictures from one window to the next, 1 (published) to `window`.

    Raises:
        ValueError: a window of one picture, or a stride that leaves pictures out.
    """
    if window < 2:
        raise ValueError(f"window is {window}: pictures in it cannot see each other. Choose 2 or more, or 0 for none.")
    if not 1 <= stride <= window:
        raise ValueError(f"window_stride is {stride}, which leaves out pictures. Choose 1 to {window}, the window.")
    model = model.clone()
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule(ContextSchedules.STATIC_STANDARD),
        fuse_method=comfy.context_windows.get_matching_fuse_method(ContextFuseMethods.FLAT),
        context_length=window,
        context_overlap=window - stride,
        dim=0,
        causal_window_fix=False,
    )
    comfy.context_windows.create_prepare_sampling_wrapper(model)
    return model
