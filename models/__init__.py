"""The networks, and how ComfyUI calls each of them."""
