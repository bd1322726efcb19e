"""ONNX files as onnxruntime sessions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management

from .extras import import_extra

CPU_PROVIDER = "CPUExecutionProvider"
# Bytes that a session takes on a GPU beside its weights, generously.
WORKSPACE = 512 * 2**20
# What the user chooses -> onnxruntime's names, the first that is installed.
PROVIDERS = {
    "auto": ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", CPU_PROVIDER),
    "cpu": (CPU_PROVIDER,),
    "cuda": ("CUDAExecutionProvider",),
    "rocm": ("ROCMExecutionProvider",),
    "directml": ("DmlExecutionProvider",),
    "coreml": ("CoreMLExecutionProvider",),
}
LOAD_ERRORS = (
    "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented",
    "RuntimeException",
)  # fmt: skip


class OnnxNetwork:
    """An ONNX file, on a GPU open only while it is used: onnxruntime's memory there is not ComfyUI's to unload.

    Args:
        file: the ONNX file; it is opened once at once, so that damage shows.
        provider: see `open_session`.

    Raises:
        ImportError, ValueError: see `open_session`.
    """

    def __init__(self, file: Path, provider: str = "auto"):
        self._file = file
        self._provider = provider
        self._session = open_session(file, provider)
        self._inputs, self._outputs = (
            [SimpleNamespace(name=entry.name, shape=entry.shape) for entry in entries]
            for entries in (self._session.get_inputs(), self._session.get_outputs())
        )
        self._on_gpu = self._session.get_providers() != [CPU_PROVIDER]
        self.release()

    def get_inputs(self) -> list:
        """Name and shape of each input, as of onnxruntime's sessions."""
        return self._inputs

    def get_outputs(self) -> list:
        """Name and shape of each output, as of onnxruntime's sessions."""
        return self._outputs

    def run(self, names: list[str] | None, feeds: dict) -> list:
        """Compute the outputs, all of them if `names` is None; a GPU's memory is taken until `release`."""
        if self._session is None:
            size = self._file.stat().st_size + WORKSPACE
            comfy.model_management.free_memory(size, comfy.model_management.get_torch_device())
            self._session = open_session(self._file, self._provider)
        return self._session.run(names, feeds)

    def release(self) -> None:
        """Give a GPU's memory back; on a CPU the file stays open."""
        if self._on_gpu:
            self._session = None


def release(session: Any) -> None:
    """Let go of what a session holds on a GPU, if it can be opened again: an `OnnxNetwork`."""
    if isinstance(session, OnnxNetwork):
        session.release()


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
    return list(dict.fromkeys([chosen, CPU_PROVIDER]))
