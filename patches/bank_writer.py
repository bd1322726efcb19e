"""Takes what a forward pass leaves for a character bank off the device, in one piece after the pass."""

import comfy.model_management
import torch

from .character_bank import Slot, Tokens


class BankWriter:
    """What one forward pass writes.

    Args:
        written: filled when the pass is over.
    """

    def __init__(self, written: Tokens):
        self.written, self.kept = written, {}

    def keep(self, slot: Slot, tokens: torch.Tensor) -> None:
        """Remember tokens (k, C), which nobody changes any more; they stay on the device until `finish`."""
        self.kept[slot] = tokens

    def finish(self) -> None:
        """Bring all of them to where ComfyUI keeps results: the host waits once.

        Raises:
            ValueError: they do not fit into the memory there.
        """
        if not self.kept:
            return
        device = comfy.model_management.intermediate_device()
        flat = torch.cat([tokens.flatten() for tokens in self.kept.values()])
        self._check_memory(flat.nbytes, device)
        parts = flat.to(device, copy=True).split([tokens.numel() for tokens in self.kept.values()])
        for (slot, tokens), part in zip(self.kept.items(), parts):
            self.written[slot] = part.view(tokens.shape)
        self.kept = {}

    def _check_memory(self, size: int, device: torch.device) -> None:
        free = comfy.model_management.get_free_memory(device)
        if size > free:
            held = sum(tokens.nbytes for tokens in self.written.values())
            raise ValueError(
                f"The character bank holds {held / 1e9:.1f} GB, and the next {size / 1e9:.1f} GB do not fit into the "
                f"{free / 1e9:.1f} GB that are left ({device}). Lower id_panels, the sampling rates, the size or the "
                "steps, or close other programs; banks that are saved already stay as they are."
            )
