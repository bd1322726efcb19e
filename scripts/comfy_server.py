"""A real ComfyUI server in a process of its own, and a client that follows a prompt through it.

    with ComfyServer(folder) as server:
        result = server.run(prompt, timeout=60)
        data = server.view(result.files()[0])

Runs with the interpreter of the prepared environment (see environment.py): needs `requests` and `websocket-client`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import requests
import websocket
from comfy_result import Preview, PromptError, PromptInterrupted, PromptRejected, Result

__all__ = [
    "ComfyServer",
    "Preview",
    "PromptError",
    "PromptInterrupted",
    "PromptRejected",
    "Result",
    "ServerFailed",
    "link_or_copy",
]

ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-ConsistentVideo"
FOLDERS = ("custom_nodes", "input", "output", "models", "temp", "user")


class ServerFailed(RuntimeError):
    """The server did not start, died, or is gone; the message ends with its log."""


class ComfyServer:
    """Starts ComfyUI over `folder` on entering, stops it on leaving.

    folder: base directory of the server (models, input, output, ...), made when missing; log in `folder/server.log`
    comfyui: the tree, default COMFYUI_PATH, else `.comfyui/0.30.0`; python: default the running interpreter
    cpu: add --cpu; pack: link this repository into custom_nodes; arguments: further command line arguments
    timeout: seconds to wait for the server to answer
    """

    def __init__(
        self,
        folder: Path,
        *,
        comfyui: Path | None = None,
        python: Path | None = None,
        cpu: bool = True,
        pack: bool = True,
        arguments: tuple[str, ...] = (),
        timeout: float = 180.0,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.comfyui = Path(comfyui or os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui" / "0.30.0")
        self.python = Path(python or sys.executable)
        self.arguments = (*(["--cpu"] if cpu else []), *arguments)
        self.pack = pack
        self.timeout = timeout
        self.log_file = self.folder / "server.log"
        self.port = 0
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "ComfyServer":  # noqa: PYI034 (typing.Self is newer than Python 3.10)
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        """Start and wait until the server answers. Raises ServerFailed with the end of the log."""
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        link = self.folder / "custom_nodes" / PACK_NAME
        if self.pack and not link.exists():
            link_or_copy(ROOT, link)
        self.port = _free_port()
        # spinning OpenMP threads would stall each other when processes share few cores
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self._command(), cwd=self.comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _command(self) -> list[str]:
        fixed = ["--use-pytorch-cross-attention", "--disable-auto-launch", "--preview-method", "latent2rgb"]
        place = ["--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.folder)]
        # the default database lies in the tree, where two servers would meet
        database = ["--database-url", f"sqlite:///{self.folder / 'user' / 'comfyui.db'}"]
        return [str(self.python), "main.py", *place, *database, *fixed, *self.arguments]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"ComfyUI ended with code {self.process.returncode}.\n{self.log_tail()}")
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    self.system_stats()
                    return
            time.sleep(0.1)
        raise ServerFailed(f"ComfyUI did not answer within {self.timeout:.0f} s.\n{self.log_tail()}")

    def stop(self) -> None:
        """Ask the server to end, and end it after 10 seconds."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def failed_imports(self) -> list[str]:
        """The log's lines about node packs that could not be imported."""
        return [line.strip() for line in self.log().splitlines() if "IMPORT FAILED" in line]

    def _request(self, method: str, path: str, **options: object) -> requests.Response:
        with requests.Session() as session:  # one per call: threads share the server object
            session.trust_env = False  # a proxy cannot reach this server
            try:
                return session.request(method, self.url + path, timeout=60, **options)
            except requests.ConnectionError as error:
                raise ServerFailed(f"ComfyUI does not answer {path}.\n{self.log_tail()}") from error

    def _get(self, path: str) -> dict:
        response = self._request("GET", path)
        response.raise_for_status()
        return response.json()

    def _post(self, path: str, body: dict) -> None:
        self._request("POST", path, json=body).raise_for_status()

    def system_stats(self) -> dict:
        return self._get("/system_stats")

    def object_info(self, node_type: str | None = None) -> dict:
        """Node type -> its inputs and outputs, of all nodes or of one."""
        return self._get(f"/object_info/{node_type}" if node_type else "/object_info")

    def queue(self) -> dict:
        """{"queue_running": [...], "queue_pending": [...]}"""
        return self._get("/queue")

    def history(self, prompt_id: str) -> dict | None:
        """The history entry of a prompt, None before it has finished."""
        return self._get(f"/history/{prompt_id}").get(prompt_id)

    def history_ids(self) -> list[str]:
        """Ids of all prompts that have finished, oldest first."""
        return list(self._get("/history"))

    def page(self, path: str) -> str:
        """The text of a page, such as a file of the pack's web folder."""
        response = self._request("GET", path)
        response.raise_for_status()
        response.encoding = "utf-8"
        return response.text

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Interrupt what runs, or only this prompt if it is the one that runs."""
        self._post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask for models to be unloaded and caches dropped before the next prompt."""
        self._post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def upload_image(self, name: str, data: bytes, *, subfolder: str = "") -> str:
        """Write a file into the input folder; returns its name for LoadImage."""
        form = {"overwrite": "true", "subfolder": subfolder}
        response = self._request("POST", "/upload/image", files={"image": (name, data)}, data=form)
        response.raise_for_status()
        place = response.json()
        return f"{place['subfolder']}/{place['name']}" if place["subfolder"] else place["name"]

    def view(self, file: dict) -> bytes:
        """The bytes of a file record of Result.files()."""
        parameters = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
        response = self._request("GET", "/view", params=parameters)
        response.raise_for_status()
        return response.content

    def submit(self, prompt: dict, *, client_id: str | None = None) -> tuple[str, dict]:
        """Queue a prompt; returns its id and the errors of outputs left out. Raises PromptRejected."""
        response = self._request("POST", "/prompt", json={"prompt": prompt, "client_id": client_id or uuid.uuid4().hex})
        body = response.json()
        if response.status_code != 200:
            raise PromptRejected(body)
        return body["prompt_id"], body.get("node_errors") or {}

    def run(
        self, prompt: dict, timeout: float = 300.0, on_event: Callable[[str, dict, Result], None] | None = None
    ) -> Result:
        """Queue a prompt and follow it to its end. Another thread may interrupt it meanwhile.

        on_event: called with every event's type, data and the result so far
        Raises PromptRejected, PromptError, PromptInterrupted, ServerFailed, TimeoutError (the prompt is interrupted).
        """
        client_id = uuid.uuid4().hex
        started = time.monotonic()
        address = f"ws://{self.address}/ws?clientId={client_id}"
        with closing(websocket.create_connection(address, timeout=60, http_no_proxy=["127.0.0.1"])) as connection:
            # asks for previews that name their node
            flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            connection.send(json.dumps(flags))
            prompt_id, node_errors = self.submit(prompt, client_id=client_id)
            result = Result(prompt_id, node_errors=node_errors)
            failure = self._follow(connection, result, started + timeout, on_event or (lambda *event: None))
        result.seconds = time.monotonic() - started
        if failure is not None:
            raise failure
        return result

    def _follow(
        self, connection: websocket.WebSocket, result: Result, deadline: float, on_event: Callable
    ) -> Exception | None:
        """Read events into `result` until its prompt ends; returns the failure that ended it."""
        failure = None
        while True:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                self.interrupt(result.prompt_id)
                running = result.executing[-1:] or ["none"]
                return TimeoutError(f"The prompt did not end in time; last node: {running[0]}.\n{self.log_tail()}")
            except (websocket.WebSocketException, OSError):
                message = ""
            if not message:
                return ServerFailed(f"ComfyUI closed the connection.\n{self.log_tail()}")
            if isinstance(message, bytes):
                result.add_binary(message)
                continue
            event = json.loads(message)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != result.prompt_id:
                continue
            result.add_event(kind, data)
            on_event(kind, data, result)
            if kind == "execution_error":
                failure = PromptError(data, result)
            elif kind == "execution_interrupted":
                failure = PromptInterrupted(data, result)
            elif kind == "executing" and data["node"] is None:  # always the last event, after the history is written
                return failure


def link_or_copy(source: Path, place: Path) -> None:
    """Make a file or a folder available at `place`: by a link, or a copy where links are a privilege (Windows)."""
    try:
        place.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns(".*", "__pycache__", "output", "tests"))
        else:
            shutil.copy2(source, place)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
