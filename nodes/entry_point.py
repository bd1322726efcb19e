"""Where ComfyUI enters the pack: nothing else is imported before its version is known to be new enough."""

import logging
from importlib.util import find_spec

from ..loaders.host import explain_old_comfyui


async def comfy_entrypoint() -> object:
    """Return the extension (`comfy_api.latest.ComfyExtension`) with the nodes.

    Raises:
        RuntimeError: this ComfyUI is too old, which ComfyUI logs.
    """
    problem = explain_old_comfyui()
    if problem is not None:
        raise RuntimeError(problem)
    from .extension import ConsistentVideoExtension  # needs a ComfyUI that is new enough

    return ConsistentVideoExtension()


def warn_very_old_comfyui() -> None:
    """Log what ComfyUI is needed if this one is so old that it does not call entry points."""
    problem = explain_old_comfyui()
    if problem is not None and (find_spec("comfy_api") is None or find_spec("comfy_api.latest") is None):
        logging.error(problem)
