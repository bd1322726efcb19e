"""What a file of weights is by its content, whatever its name says."""

import json
import struct
from pathlib import Path

SAFE_SUFFIXES = (".safetensors", ".sft")
SAFETENSORS, PYTORCH, UNKNOWN = "safetensors", "PyTorch", "unknown"
HEAD = 1024
# A header of safetensors larger than this is refused by the library.
MAX_HEADER = 100_000_000
ARCHIVES = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
FETCH = "Download the file itself: on the web page of the repository, with its download link"


def kind_of(path: Path) -> str:
    """`SAFETENSORS`, `PYTORCH`, or `UNKNOWN` for content that only its reader can judge.

    Raises:
        ValueError: the file is not one of weights at all, or ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    _refuse_other_things(path, head, size)
    header = _header_length(head, size)
    if header is not None:
        _require_all_of_it(path, header, size)
        return SAFETENSORS
    if head.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix.lower() in SAFE_SUFFIXES:
            raise ValueError(
                f"{path} is a PyTorch file, although its name ends in {path.suffix}. Rename it to end in .pt, or in "
                ".bin inside a checkpoint folder."
            )
        return PYTORCH
    return UNKNOWN


def _refuse_other_things(path: Path, head: bytes, size: int) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise ValueError(f"{path} is empty (0 bytes): its download did not finish. Download it again.")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is only the pointer ({size:,} bytes) that git leaves in the place of a large file"
            f"{_real_size(head)}. {FETCH}, or run 'git lfs pull' in the folder."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} is a web page ({size:,} bytes) saved under the name of a file of weights, such as a sign-in or "
            f"error page. {FETCH}, after signing in where the publisher asks for it."
        )
    if text.startswith((b"{", b"[")) and _is_json(text):
        raise ValueError(
            f"{path} is a JSON text ({size:,} bytes), such as an error message or a configuration, not weights. "
            f"{FETCH}."
        )
    if head.startswith(b"GGUF"):
        raise ValueError(
            f"{path} is a GGUF file, whose quantised weights this pack does not read. Choose the .safetensors file of "
            "the same model; weight_dtype fp8_e4m3fn makes it small in memory."
        )
    archive = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None)
    if archive:
        raise ValueError(f"{path} is a packed archive ({archive}). Unpack it, and put the file in it here.")


def _real_size(pointer: bytes) -> str:
    """What a pointer of git's large file storage says about the file's size."""
    words = pointer.decode("ascii", "replace").split()
    size = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "size"), "")
    return f" of {int(size):,} bytes" if size.isdecimal() else ""


def _is_json(text: bytes) -> bool:
    """Whether a text that begins like JSON goes on like it; binary data that begins so by chance does not."""
    return all(byte >= 32 or byte in b"\t\r\n" for byte in text)


def _header_length(head: bytes, size: int) -> int | None:
    """Length in bytes of a safetensors header, None when the file does not begin with one."""
    if len(head) < 10 or head[8:9] != b"{":
        return None
    length = struct.unpack("<Q", head[:8])[0]
    return length if 2 <= length <= MAX_HEADER else None


def _require_all_of_it(path: Path, length: int, size: int) -> None:
    """Refuse a safetensors file that is shorter than its header says."""
    expected = 8 + length
    if size >= expected:
        with path.open("rb") as file:
            file.seek(8)
            try:
                entries = json.loads(file.read(length))
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            except (UnicodeDecodeError, ValueError, KeyError, TypeError, IndexError, AttributeError):
                return  # the library says what is wrong with a header
        expected += max(ends, default=0)
    if size < expected:
        raise ValueError(
            f"{path} is damaged or incomplete: it has {size:,} bytes, but its header describes {expected:,}. Compare "
            "its size with the published one and download it again."
        )
