"""Hostile prompts: example workflows with values that do not belong, and what may come of them.

A prompt may work, be rejected by ComfyUI, or end in an error that this pack wrote. It may not end in an error from deep
inside that leads through this pack, and it may not end the server.

As a command: `python tests/prompt_fuzz.py FOLDER COUNT SEED [NAMES]` sends prompts to a server over FOLDER and tells
which failed; NAMES are beginnings of the names of workflows.
"""

import json
import random
import re
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from comfy_server import PACK_NAME, ComfyServer, PromptError, PromptInterrupted, PromptRejected, ServerFailed
from workflow_to_prompt import to_prompt

WORKFLOWS = Path(__file__).resolve().parent.parent / "example_workflows"
TIMEOUT = 300.0
# Exceptions that Python and PyTorch raise where nobody looked, as ComfyUI names them.
RAW = re.compile(
    r"(?:builtins\.)?(?:Attribute|Type|Key|Index|Runtime|ZeroDivision|Assertion|NotImplemented|Name|UnboundLocal|"
    r"Recursion|Overflow|Unicode\w*)Error|torch\..*"
)
# What Python itself says in a ValueError.
RAW_WORDS = re.compile(
    "values to unpack|invalid literal|could not convert|not in list|not found$|math domain|is ambiguous|"
    "inhomogeneous|broadcast"
)
# Code that raises what its caller did wrong.
LIBRARIES = ("site-packages", "comfy/ops.py", "comfy/ldm/modules/attention.py", "comfy/patcher_extension.py")
# Values that make work small, and those that are out of every range.
SMALL = {
    "steps": (1, 2, 0, -1),
    "width": (64, 72, 80, 65, 63, 0, -8),
    "height": (64, 48, 80, 65, 0),
    "frames": (1, 2, 5, 4, 0, -3),
    "batch_size": (1, 2, 0, -1),
    "iterations": (1, 2, 0),
    "id_panels": (1, 2, 3, 0),
    "window": (0, 1, 2, 3, 64),
    "size": (0, 6, 12, 512, 5),
    "length": (1, 2, 5),
    "tile_size": (64, 512),
}
TEXTS = (
    "", " ", "\n\n", "\x00", "a" * 3000, "[", "]", "[]", "[Ana]", "[Ana] runs\n[Bob] sits", "#", "# #ff0000 #", "(((",
    ":1e9)", "{prompt} {0} %s", "小明\n【NC】", "\U0001f43c\ufe0f\u200d", "cut \ud83d", "../../etc/passwd", "1, 2",
    "9-1", "a man img", "img img", "embedding:none", "1. a\n2. b\n3. c", '["a", "b"]', "NaN", "\u202eabc", "a;b;c",
)  # fmt: skip
LITERALS = ("abc", 3, -2.5, True, None, {}, {"samples": 1}, [], ["x"], ["99", 0], {"__value__": [1, 2]}, "")
NUMBERS = (0, -1, 1, 7, 10**30, -(10**30), 1e-9, 0.333, "3", "abc", None, True)
# Nodes whose value comes over a wire, and what they take.
PRIMITIVES = {"INT": "PrimitiveInt", "FLOAT": "PrimitiveFloat", "STRING": "PrimitiveString"}
WIRED = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,)}
# Of the node DamagedValue in tensor_nodes.
DAMAGE = (
    "gray", "gray_alpha", "rgba", "nan", "infinite", "no_pictures", "no_pixels", "bytes", "three_dimensions",
    "five_channels", "one_pixel", "half", "many", "other_vae", "stills", "nan_latent", "no_latent", "object",
    "empty_list", "text", "nothing",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A prompt that did what none may do.

    Args:
        index: of the prompt in its seed.
        reason: what it did.
        prompt: in the API's format.
    """

    index: int
    reason: str
    prompt: dict


def base_prompts(object_info: dict) -> dict[str, dict]:
    """The example workflows as prompts of few steps, frames and pixels, by their names."""
    paths = sorted(WORKFLOWS.glob("*.json"))
    return {path.stem: shrunk(to_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)) for path in paths}


def shrunk(prompt: dict) -> dict:
    """The prompt with the least work that still passes through every node."""
    least = {"steps": 2, "width": 64, "height": 64, "frames": 5, "batch_size": 1, "iterations": 2}
    for node in prompt.values():
        for name, value in least.items():
            if type(node["inputs"].get(name)) is int:
                node["inputs"][name] = min(node["inputs"][name], value)
    return prompt


def hostile_prompt(base: dict, object_info: dict, draw: random.Random) -> dict:
    """A prompt with one to three changes."""
    prompt = deepcopy(base)
    for _ in range(draw.choice((1, 1, 2, 3))):
        node_id = draw.choice([key for key, node in prompt.items() if node["inputs"]])
        _change(prompt, node_id, object_info, draw)
    return prompt


def _change(prompt: dict, node_id: str, object_info: dict, draw: random.Random) -> None:
    node = prompt[node_id]
    name = draw.choice(list(node["inputs"]))
    linked = isinstance(node["inputs"][name], list)
    described = {**object_info[node["class_type"]]["input"].get("required", {})}
    described.update(object_info[node["class_type"]]["input"].get("optional") or {})
    kind, *limits = described.get(name, ("*",))
    if draw.random() < 0.05:
        del node["inputs"][name]
    elif linked and draw.random() < 0.35:
        node["inputs"][name] = draw.choice(LITERALS)
    elif linked and draw.random() < 0.5:
        damaged = f"damaged{len(prompt)}"
        prompt[damaged] = {"class_type": "DamagedValue", "inputs": {"kind": draw.choice(DAMAGE)}}
        node["inputs"][name] = [damaged, 0]
    elif linked:
        node["inputs"][name] = _other_link(prompt, node_id, kind, object_info, draw) or node["inputs"][name]
    else:
        value = _other_value(name, kind, limits[0] if limits else {}, draw)
        if (
            draw.random() < 0.3
            and type(value) in WIRED.get(str(kind), ())
            and (type(value) is str or abs(value) < 2**63)
        ):
            # ComfyUI compares no limits there.
            wired = f"wired{len(prompt)}"
            prompt[wired] = {"class_type": PRIMITIVES[kind], "inputs": {"value": value}}
            value = [wired, 0]
        node["inputs"][name] = value


def _other_link(prompt: dict, node_id: str, kind: object, object_info: dict, draw: random.Random) -> list | None:
    """Another output of the same type, or now and then of any type."""
    outputs = [
        [other, slot]
        for other, node in prompt.items()
        for slot, output in enumerate(object_info[node["class_type"]]["output"])
        if other != node_id and (output == kind or draw.random() < 0.05)
    ]
    return draw.choice(outputs) if outputs else None


def _other_value(name: str, kind: object, limits: dict, draw: random.Random) -> object:
    if name in SMALL:
        return draw.choice(SMALL[name])
    options = limits.get("options") if kind == "COMBO" else kind
    if isinstance(options, list):
        return draw.choice([*options, *options, "none of them", 3, None])
    if kind == "STRING":
        return draw.choice(TEXTS)
    if kind in ("INT", "FLOAT"):
        near = [limits[limit] for limit in ("min", "max") if limit in limits and abs(limits[limit]) < 10**6]
        return draw.choice([*near, *near, *NUMBERS])
    return draw.choice((True, False, "abc", 3, None))


def reason_against(server: ComfyServer, prompt: dict) -> str | None:
    """What a prompt did that none may do; None if it did nothing of the kind.

    Raises:
        ServerFailed: the server is gone.
    """
    try:
        server.run(prompt, TIMEOUT)
    except PromptRejected as rejection:
        return _deep_rejection(rejection)
    except PromptError as error:
        return deep_error(error.exception_type, error.exception_message, error.traceback, error.node_type)
    except PromptInterrupted:
        return "it was interrupted"
    except TimeoutError as error:
        return f"it took more than {TIMEOUT:.0f} s: {str(error)[:200]}"
    return None


def _deep_rejection(rejection: PromptRejected) -> str | None:
    """What is wrong with a rejection: an exception out of this pack's validation."""
    for node in rejection.node_errors.values():
        for error in node.get("errors", []):
            if "traceback" in error.get("extra_info", {}) and PACK_NAME in str(error["extra_info"]["traceback"]):
                return f"validation failed: {error['details']}"
    return None


def deep_error(kind: str, message: str, traceback: str, node_type: str) -> str | None:
    """What is wrong with an error: that it comes from deep inside and leads through this pack; None if nothing is."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in', traceback)
    frames = [frame for frame in frames if not any(part in frame[0] for part in LIBRARIES)]
    # Ours, or ComfyUI's own: whoever called the library that raised it.
    ours = bool(frames) and PACK_NAME in frames[-1][0]
    if not ours and not node_type.startswith("ConsistentVideo"):
        return None
    told = ours and message.rstrip().endswith((".", ")", "]"))
    if RAW.fullmatch(kind) or not told or (kind == "ValueError" and RAW_WORDS.search(message)):
        place = next((f"{path}:{line}" for path, line in reversed(frames) if PACK_NAME in path), "nowhere")
        return f"{node_type}: {kind}: {message[:300]} [{place}]"
    return None


def run(
    server: ComfyServer, bases: list[dict], count: int, seed: int = 0, tell=lambda index, reason: None
) -> list[Failure]:
    """Send hostile prompts one after the other; returns those that failed.

    Args:
        bases: prompts to change. Each has its share of the count in a row, so that its checkpoints stay loaded.
        count: of prompts.
        tell: called after every prompt with its index and what is wrong, or None.

    Raises:
        ServerFailed: the server died; the message names the prompt.
    """
    object_info = server.object_info()
    failures = []
    for index in range(count):
        draw = random.Random(f"{seed}:{index}")
        prompt = hostile_prompt(bases[index * len(bases) // count], object_info, draw)
        try:
            reason = reason_against(server, prompt)
        except ServerFailed as error:
            raise ServerFailed(
                f"prompt {index} of seed {seed} ended the server: {json.dumps(prompt)}\n{error}"
            ) from error
        tell(index, reason)
        if reason:
            failures.append(Failure(index, reason, prompt))
    return failures


def resident_bytes(server: ComfyServer) -> int:
    """Memory of the server's process that is in use, in bytes (Linux)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def soak(server: ComfyServer, prompts: list[dict], rounds: int) -> list[int]:
    """Run prompts round after round with new seeds; returns the memory in use after each round, in bytes."""
    used = []
    for number in range(rounds):
        for prompt in prompts:
            prompt = deepcopy(prompt)
            for node in prompt.values():
                for name in ("seed", "noise_seed"):
                    if type(node["inputs"].get(name)) is int:
                        node["inputs"][name] = number
            server.run(prompt, TIMEOUT)
        used.append(resident_bytes(server))
    return used


def main(folder: Path, count: int, seed: int = 0, names: tuple[str, ...] = ("",)) -> int:
    """Run `count` prompts on a server of its own; print failures and the memory in use. Returns 1 if any failed.

    Args:
        names: with what the names of the example workflows begin that are used.
    """
    import example_inputs

    import tiny_checkpoints  # takes ComfyUI into this process

    tiny_checkpoints.build_all(folder / "models")
    example_inputs.write_inputs(folder / "input")
    (folder / "custom_nodes").mkdir(exist_ok=True)
    nodes = folder / "custom_nodes" / "tensor_nodes"
    if not nodes.exists():
        nodes.symlink_to(Path(__file__).resolve().parent / "tensor_nodes")
    with ComfyServer(folder) as server:

        def tell(index, reason):
            if reason:
                print(f"{index}: {reason}", flush=True)
            if index % 50 == 0:
                print(f"-- {index}: {resident_bytes(server) / 1e9:.3f} GB", flush=True)

        bases = [prompt for name, prompt in base_prompts(server.object_info()).items() if name.startswith(names)]
        failures = run(server, bases, count, seed, tell)
        for failure in failures:
            (folder / f"failed_{seed}_{failure.index}.json").write_text(json.dumps(failure.prompt), encoding="utf-8")
        print(f"{count} prompts, {len(failures)} failures, {resident_bytes(server) / 1e9:.3f} GB")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), tuple(sys.argv[4:]) or ("",)))
