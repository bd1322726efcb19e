"""Files on disk -> ComfyUI's own objects."""
