"""ComfyUI-ConsistentVideo: consistent pictures and video as native ComfyUI nodes."""
