"""A server under hostile prompts, and under many in a row: it lives, says what is wrong, and its memory stays.

By hand, more of both: FUZZ_PROMPTS=1000 FUZZ_SEED=7 SOAK_PROMPTS=100 python3 scripts/test.py tests/test_under_fire.py
"""

import os
import random
import sys

import example_inputs
import prompt_fuzz
import pytest

pytestmark = pytest.mark.server

FUZZ_PROMPTS = int(os.environ.get("FUZZ_PROMPTS", "60"))
FUZZ_SEED = int(os.environ.get("FUZZ_SEED", "1"))
SOAK_PROMPTS = int(os.environ.get("SOAK_PROMPTS", "18"))
SOAKED = ("ModelScope text to video", "I2VGen-XL picture to video", "ConsistI2V picture to video")
# Workflows whose checkpoints are small: those of Stable Diffusion XL take long to load.
QUICK = ("ModelScope", "I2VGen", "ConsistI2V", "ConsisID", "FrameInit", "FreeInit")


@pytest.fixture(scope="module")
def bases(server):
    """Prompts of the example workflows by name; the few that CI runs, or all."""
    example_inputs.write_inputs(server.folder / "input")
    found = prompt_fuzz.base_prompts(server.object_info())
    few = FUZZ_PROMPTS <= 100
    return {name: prompt for name, prompt in found.items() if not few or name.startswith(QUICK)}


def test_hostile_prompts_are_answered(server, bases):
    failures = prompt_fuzz.run(server, list(bases.values()), FUZZ_PROMPTS, FUZZ_SEED)
    assert server.process.poll() is None
    assert [f"{failure.index}: {failure.reason}" for failure in failures] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_memory_stays_under_many_prompts(server, bases):
    prompts = [bases[name] for name in SOAKED]
    rounds = SOAK_PROMPTS // len(prompts)
    used = prompt_fuzz.soak(server, prompts, rounds)
    # Early rounds fill caches and the allocator's reserve.
    early = max(used[: rounds // 2])
    assert used[-1] <= 1.02 * early, [f"{value / 1e9:.3f} GB" for value in used]


def test_the_same_seed_draws_the_same_prompts(server, bases):
    info, base = server.object_info(), bases["ModelScope text to video"]
    drawn = [prompt_fuzz.hostile_prompt(base, info, random.Random(f"5:{index}")) for index in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != base


OURS = f'  File "/x/custom_nodes/{prompt_fuzz.PACK_NAME}/nodes/a.py", line 3, in execute\n'
CORE = '  File "/x/nodes.py", line 3, in sample\n'
TORCH = '  File "/x/site-packages/torch/nn.py", line 3, in forward\n'


@pytest.mark.parametrize(
    ("kind", "message", "traceback", "node", "deep"),
    [
        ("ValueError", "width 3 is too small.", CORE + OURS, "ConsistentVideoEmptyLatent", False),
        ("ValueError", "not enough values to unpack (expected 2, got 1)", CORE + OURS, "KSampler", True),
        ("TypeError", "bad operand.", CORE + OURS, "ConsistentVideoEmptyLatent", True),
        ("UnicodeEncodeError", "surrogates not allowed.", CORE + OURS, "ConsistentVideoEmptyLatent", True),
        ("RuntimeError", "shapes do not match.", CORE + OURS + TORCH, "KSampler", True),
        ("ValueError", "it has no rows.", CORE + OURS + TORCH, "ConsistentVideoEmptyLatent", False),
        ("RuntimeError", "shapes do not match.", CORE + TORCH, "KSampler", False),
        ("AttributeError", "no attribute.", OURS + CORE, "VAEDecode", False),
        ("AttributeError", "no attribute.", OURS + CORE, "ConsistentVideoEmptyLatent", True),
    ],
)
def test_errors_from_deep_inside_are_told_from_answers(kind, message, traceback, node, deep):
    assert bool(prompt_fuzz.deep_error(kind, message, traceback, node)) == deep
