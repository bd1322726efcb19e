"""ComfyUI-ConsistentVideo: consistent pictures and video as native ComfyUI nodes."""

from .nodes.extension import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
