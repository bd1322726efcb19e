"""ComfyUI-ConsistentVideo: consistent pictures and video as native ComfyUI nodes."""

from .nodes.entry_point import comfy_entrypoint, warn_very_old_comfyui

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

warn_very_old_comfyui()
