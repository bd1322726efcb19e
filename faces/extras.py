"""Optional packages, imported where they are used."""

import importlib
from types import ModuleType

INSTALL = "pip install onnxruntime scikit-image timm facexlib"


def import_extra(module: str, package: str, purpose: str, remedy: str | None = None) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: dotted name, such as `timm.models.eva`.
        package: what pip calls its package.
        purpose: what needs it, the first words of the message.
        remedy: the last sentence, for what pip does not install.

    Raises:
        ImportError: not installed, or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = remedy or (
            f"Install it into ComfyUI's Python environment: pip install {package}. All of the optional group 'faces': "
            f"{INSTALL}."
        )
        raise ImportError(
            f"{purpose} needs the optional package {package}, which is not installed or does not start ({error}). "
            f"{remedy}"
        ) from error
