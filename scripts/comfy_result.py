"""What a prompt did on a ComfyUI server, and the ways in which it can fail."""

import json
import struct
from dataclasses import dataclass, field

# types of binary websocket messages, ComfyUI's protocol.BinaryEventTypes
PREVIEW, PREVIEW_WITH_METADATA = 1, 4


@dataclass(frozen=True)
class Preview:
    """One preview picture as it came over the websocket; `node_id` is None where the server does not say."""

    data: bytes
    media_type: str
    node_id: str | None


@dataclass
class Result:
    """What one prompt did.

    outputs: node id -> its interface output, e.g. {"images": [{"filename", "subfolder", "type"}]}, of cached nodes too
    events: every JSON event of this prompt as (type, data), in order
    progress: node id -> [(value, maximum)]
    executing: node ids in the order they started; cached: node ids that were not run again
    node_errors: outputs that the server left out because their inputs are wrong
    """

    prompt_id: str
    outputs: dict[str, dict] = field(default_factory=dict)
    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    executing: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    node_errors: dict = field(default_factory=dict)
    seconds: float = 0.0

    def files(self, kind: str = "output") -> list[dict]:
        """Records of the written files, in node order; `kind` is output or temp."""
        lists = [value for output in self.outputs.values() for value in output.values() if isinstance(value, list)]
        records = [record for values in lists for record in values if isinstance(record, dict)]
        return [record for record in records if "filename" in record and record.get("type") == kind]

    def add_event(self, kind: str, data: dict) -> None:
        """Take in one JSON event of this prompt."""
        self.events.append((kind, data))
        if kind == "executing" and data["node"] is not None:
            self.executing.append(data["node"])
        elif kind == "execution_cached":
            self.cached.extend(data["nodes"])
        elif kind == "executed" and data["output"]:
            self.outputs[data["node"]] = data["output"]
        elif kind == "progress" and data.get("node") is not None:
            self.progress.setdefault(data["node"], []).append((data["value"], data["max"]))

    def add_binary(self, message: bytes) -> None:
        """Take in one binary message: a big-endian type, then picture type and picture, or JSON size, JSON, picture."""
        kind, second = struct.unpack_from(">II", message)
        if kind == PREVIEW:
            self.previews.append(Preview(message[8:], "image/png" if second == 2 else "image/jpeg", None))
        elif kind == PREVIEW_WITH_METADATA:
            metadata = json.loads(message[8 : 8 + second])
            self.previews.append(Preview(message[8 + second :], metadata["image_type"], metadata.get("node_id")))


class PromptRejected(RuntimeError):
    """The server did not accept the prompt. `error`: what is wrong; `node_errors`: node id -> errors of its inputs."""

    def __init__(self, body: dict) -> None:
        self.error: dict = body.get("error") or {}
        self.node_errors: dict = body.get("node_errors") or {}
        lines = [f"{self.error.get('message', 'prompt rejected')} {self.error.get('details', '')}".strip()]
        for node_id, node in self.node_errors.items():
            for error in node.get("errors", []):
                lines.append(f"node {node_id} ({node.get('class_type')}): {error['message']}: {error['details']}")
        super().__init__("\n".join(lines))


class PromptError(RuntimeError):
    """A node failed while it ran."""

    def __init__(self, data: dict, result: Result) -> None:
        self.node_id: str = data.get("node_id")
        self.node_type: str = data.get("node_type")
        self.exception_type: str = data.get("exception_type", "")
        self.exception_message: str = data.get("exception_message", "").strip()
        self.traceback: str = "".join(data.get("traceback", []))
        self.result = result
        kind, text = self.exception_type, self.exception_message
        super().__init__(f"node {self.node_id} ({self.node_type}): {kind}: {text}\n{self.traceback}")


class PromptInterrupted(RuntimeError):
    """The prompt was interrupted while node `node_id` ran; `result` holds what happened before."""

    def __init__(self, data: dict, result: Result) -> None:
        self.node_id: str = data.get("node_id")
        self.result = result
        super().__init__(f"interrupted in node {self.node_id} ({data.get('node_type')})")
