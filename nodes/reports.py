"""Texts that a node shows on itself."""

from comfy_api.latest import io, ui

from ..loaders.host import has_server


def show_text(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a text on a node in the editor at once, and return it as what the node hands to the interface.

    Args:
        node: the class that executes, with `io.Hidden.unique_id` in its schema.
        text: plain, any number of lines.
    """
    unique_id = node.hidden.unique_id if node.hidden else None
    if unique_id is not None and has_server():
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, unique_id)
    return ui.PreviewText(text)
