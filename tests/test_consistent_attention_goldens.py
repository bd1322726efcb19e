"""Consistent self-attention against StoryDiffusion's own classes: every call of theirs, recorded with random weights.

`tests/goldens/storydiffusion_A` holds the inputs, weights, sampled tokens, gates and outputs of three layers in ten
steps, for the low-memory generation of the code and for the demo with dense masks.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import tiny_unets
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from safetensors.torch import load_file

from consistent_video.patches.character_bank import CharacterBank, Origin
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.token_sharing import Layer, Sharing

FOLDER = Path(__file__).parent / "goldens" / "storydiffusion_A"
LOG = json.loads((FOLDER / "attn_log.json").read_text(encoding="utf-8"))
PANELS = LOG["id_length"]
SIGMAS = torch.linspace(14.6, 0.0, 51)
# The layers of a network with three shared layers, which stand for the recorded ones, in the order of execution.
LAYERS = {"L32_a": Layer("output", 0, 0), "L32_b": Layer("output", 0, 1), "L64_a": Layer("output", 3, 0)}
DEPTHS = {"transformer_depth_output": [0, 0, 0, 0, 0, 1, 0, 0, 2]}
# Run -> (recorded input, characters that it reads; None where it writes).
READS = {
    "lowvram.read_A": ("read0", ("A",)),
    "lowvram.read_AB": ("read0", ("A", "B")),
    "lowvram.read_NC": ("read0", ()),
    "lowvram.read1_B": ("read1", ("B",)),
    "dense.read0": ("read0", ("A",)),
}
WRITES = {"lowvram.writeA": "writeA", "lowvram.writeB": "writeB", "dense.write": "writeA"}
WRITTEN_BY = {"lowvram": {"A": "lowvram.writeA", "B": "lowvram.writeB"}, "dense": {"A": "dense.write"}}


@functools.cache
def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"attn_{name}.safetensors")


class Recorded(Sharing):
    """Gates and positions as the original drew them; warm-up, thresholds and rates are ours."""

    def follow(self, run: str) -> "Recorded":
        """Draw what a recorded run drew."""
        gates = {(entry["step"], *LAYERS[entry["layer"]]): entry["gate"] for entry in LOG["runs"][run]}
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "gates", gates)
        return self

    def _key(self, kind, *parts):
        assert kind == "gate"
        return int(self.gates[parts] * 2**64)

    def positions(self, step, panel, tokens, rate):
        assert rate == LOG["sa32" if tokens == LOG["n32"] else "sa64"]
        grid = 32 if tokens == LOG["n32"] else 64
        if self.run.startswith("lowvram"):
            return recorded("lowvram_indices")[f"{self.run}.s{step}.idx{grid}.p{panel}"].long()
        if step == 0:  # the demo draws its first tokens at the end of the first step
            return torch.arange(0)
        return recorded("dense_masks")[f"{self.run}.s{step}.row{grid}"][panel].nonzero().flatten()


def sharing(run: str) -> Recorded:
    if run.startswith("lowvram"):
        return Recorded(start_step=1, count="random").follow(run)
    return Recorded(start_step=5, count="random", warm_up="full_bank").follow(run)


@pytest.fixture(scope="module")
def model():
    return tiny_unets.build("sdxl", **DEPTHS)


@functools.cache
def block(layer: str) -> BasicTransformerBlock:
    """ComfyUI's transformer block around the recorded attention, without its norm: the inputs are normed."""
    shape = LOG["layers"][layer]
    made = BasicTransformerBlock(
        shape["channels"], shape["heads"], shape["dim_head"], disable_temporal_crossattention=True
    )
    made.norm1 = torch.nn.Identity()
    prefix = f"{layer}."
    weights = {key.removeprefix(prefix): value for key, value in recorded("weights").items() if key.startswith(prefix)}
    made.attn1.load_state_dict(weights)
    return made


def attend(model, step: int, inputs: dict[str, torch.Tensor], kinds: list[int]) -> dict[str, torch.Tensor]:
    """Output of every layer's self-attention, called as ComfyUI calls it in one forward pass of a patched model."""
    outputs = {}
    options = {
        **model.model_options["transformer_options"],
        "sample_sigmas": SIGMAS,
        "sigmas": SIGMAS[step : step + 1],
        "cond_or_uncond": kinds,
    }
    rows = len(inputs["L32_a"])

    def forward(x, timesteps, context, y, control, transformer_options):
        for layer, tokens in inputs.items():
            _, number, index = LAYERS[layer]
            side = math.isqrt(tokens.shape[1])
            inner = {
                **transformer_options,
                "original_shape": list(x.shape),
                "activations_shape": [rows, tokens.shape[-1], side, side],
                "block": ("output", number),
                "block_index": index,
            }
            keep = functools.partial(outputs.setdefault, layer)
            inner["patches"] = {**inner.get("patches", {}), "attn1_output_patch": [lambda n, extra, keep=keep: keep(n)]}
            block(layer)(tokens.clone(), transformer_options=inner)

    latents = torch.zeros(rows, 4, LOG["height"] // 8, LOG["width"] // 8)
    executor = WrapperExecutor.new_executor(forward, model.get_all_wrappers(WrappersMP.DIFFUSION_MODEL))
    executor.execute(latents, options["sigmas"], None, None, None, options)
    return outputs


def attend_all(model, source: str, together: bool = True) -> dict[tuple[int, str], torch.Tensor]:
    """Outputs of all calls of a run: both conditionings in a forward pass, or one after the other."""
    outputs = {}
    for step in LOG["steps"]:
        inputs = {layer: recorded("inputs")[f"{source}.s{step}.{layer}"] for layer in LAYERS}
        if together:
            found = attend(model, step, inputs, [1, 0])
        else:
            negative, positive = ({layer: both.chunk(2)[half] for layer, both in inputs.items()} for half in (0, 1))
            # The positive first: the order of calls must not matter.
            last, first = attend(model, step, positive, [0]), attend(model, step, negative, [1])
            found = {layer: torch.cat((first[layer], last[layer])) for layer in LAYERS}
        outputs |= {(step, layer): output for layer, output in found.items()}
    return outputs


def write(model, run: str, together: bool = True) -> tuple[dict, dict]:
    """Outputs of a write run, and the tokens that it left."""
    written = {}
    patched = ConsistentAttention(sharing(run), written=written).install(model)
    return attend_all(patched, WRITES[run], together), written


def reading(model, run: str):
    """A model that reads what our write runs left."""
    drawn = sharing(run)
    banks = {name: write(model, by)[1] for name, by in WRITTEN_BY[run.split(".")[0]].items()}
    origin = Origin("", tuple(SIGMAS.tolist()), LOG["width"] // 8, LOG["height"] // 8, drawn)
    patch = ConsistentAttention(drawn, bank=CharacterBank(origin, banks), characters=READS[run][1])
    return patch.install(model)


def compare(run: str, outputs: dict) -> int:
    """Number of calls compared."""
    golden = recorded("lowvram_outputs" if run.startswith("lowvram") else "dense_outputs")
    for (step, layer), output in outputs.items():
        difference = (output - golden[f"{run}.s{step}.{layer}"]).abs().max()
        assert difference < 1e-5, (run, step, layer)
    return len(outputs)


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_every_recorded_call_is_reproduced(model, together):
    compared = {run: compare(run, write(model, run, together)[0]) for run in WRITES}
    for run, (source, _) in READS.items():
        compared[run] = compare(run, attend_all(reading(model, run), source, together))
    assert compared == {run: len(calls) for run, calls in LOG["runs"].items()}
    assert sum(compared.values()) == 240


def test_the_recorded_runs_take_every_path():
    paths = Counter((run.split(".")[0], entry["path"]) for run, calls in LOG["runs"].items() for entry in calls)
    assert {path for generation, path in paths if generation == "lowvram"} == {"plain", "consistent"}
    assert {path for generation, path in paths if generation == "dense"} == {
        "plain", "masked_consistent", "full_bank_unmasked",
    }  # fmt: skip


@pytest.mark.parametrize("run", LOG["runs"])
def test_gates_open_where_the_original_took_the_consistent_path(run):
    drawn = sharing(run)
    for entry in LOG["runs"][run]:
        opened = entry["path"] in ("consistent", "masked_consistent")
        assert drawn.shares(entry["step"], 50, LAYERS[entry["layer"]]) == opened
        full = entry["path"] == "full_bank_unmasked"
        assert full <= (drawn.warm_up == "full_bank" and drawn.warming_up(entry["step"], 50))


@pytest.mark.parametrize("run", READS)
def test_key_counts_are_the_recorded_ones(model, run):
    """Own tokens and tokens of the bank of a reading panel, counted at the attention."""
    counted = []

    def count(function, queries, keys, *args, **kwargs):
        counted.append(keys.shape[1])
        return function(queries, keys, *args, **kwargs)

    patched = reading(model, run)
    patched.model_options["transformer_options"]["optimized_attention_override"] = count
    attend_all(patched, READS[run][0])
    expected = []
    for entry in LOG["runs"][run]:
        own = LOG["layers"][entry["layer"]]["tokens"]
        if entry["path"] == "full_bank_unmasked":
            expected.append(own * (PANELS + 1))
        elif entry["path"] == "masked_consistent":
            grid = 32 if own == LOG["n32"] else 64
            sampled = recorded("dense_masks")[f"{run}.s{entry['step']}.panel{grid}"][PANELS]
            expected.append(int(sampled.sum()))
        else:
            expected.append((entry.get("kv_lengths") or [own])[0])
    assert counted == expected
