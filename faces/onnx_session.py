"""ONNX files as onnxruntime sessions."""

from pathlib import Path
from typing import Any

from .extras import import_extra

# What the user chooses -> onnxruntime's names, the first that is installed.
PROVIDERS = {
    "auto": ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider"),
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "rocm": ("ROCMExecutionProvider",),
    "directml": ("DmlExecutionProvider",),
    "coreml": ("CoreMLExecutionProvider",),
}
LOAD_ERRORS = (
    "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented",
    "RuntimeException",
)  # fmt: skip


def open_session(file: Path, provider: str = "auto") -> Any:
    """Open an ONNX file.

    Args:
        provider: a key of `PROVIDERS`: "auto" takes the first installed one; the others take theirs alone, with the
            CPU for operations that it lacks.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: unknown or unavailable provider, or a damaged file.
    """
    runtime = import_extra("onnxruntime", "onnxruntime", "Reading ONNX face models")
    providers = _choose(runtime.get_available_providers(), provider)
    states = runtime.capi.onnxruntime_pybind11_state
    errors = tuple(getattr(states, name) for name in LOAD_ERRORS if hasattr(states, name))
    try:
        session = runtime.InferenceSession(str(file), providers=providers)
    except errors as error:
        size = file.stat().st_size if file.is_file() else 0
        raise ValueError(
            f"{file} ({size:,} bytes) cannot be opened as an ONNX network: {error}. Compare its size with the "
            "published one and download it again."
        ) from error
    if provider != "auto" and providers[0] not in session.get_providers():
        raise ValueError(
            f"onnxruntime lists {providers[0]} but could not start it for {file}. Install the libraries it needs, or "
            "choose the provider cpu or auto."
        )
    return session


def _choose(available: list[str], provider: str) -> list[str]:
    if provider not in PROVIDERS:
        raise ValueError(f"Unknown provider {provider!r}. Choose one of: {', '.join(PROVIDERS)}.")
    chosen = next((name for name in PROVIDERS[provider] if name in available), None)
    if chosen is None:
        raise ValueError(
            f"The installed onnxruntime has no {PROVIDERS[provider][0]}; it has {', '.join(available)}. Install the "
            "build for your device (such as onnxruntime-gpu), or choose the provider auto."
        )
    return list(dict.fromkeys([chosen, "CPUExecutionProvider"]))
