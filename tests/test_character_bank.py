"""The bank of reference panels: what a run leaves in it, what a later run reads, and what is refused."""

import dataclasses
import math

import comfy.context_windows
import comfy.model_patcher
import pytest
import tiny_unets
import torch
from dense_attention import DenseAttention
from tiny_unets import SIGMAS, assert_same, denoise, different, guide, latents, one_thread, prompt  # noqa: F401

from consistent_video.patches.bank_origin import bank_size, origin_of
from consistent_video.patches.character_bank import CharacterBank, Evaluation, Origin, Slot
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.shared_layers import shared_layers
from consistent_video.patches.token_sharing import Layer, Sharing

PANELS, SIDE = 3, 8
SHARING = Sharing(start_step=1, plain_early=0.3, plain_late=0.1, late_step=2, seed=3, rate_32=0.5, rate_64=0.6)
COARSE = {"sdxl": range(0, 3), "sd15": range(0, 6)}
# Rows of a batch of reference panels and one or two that read: who sees whom.
EVERYBODY = [[1, 2], [0, 2], [0, 1], [0, 1, 2], [0, 1, 2]]
REFERENCES, READER, READERS = slice(0, 3), slice(3, 4), slice(3, 5)


@pytest.fixture(scope="module")
def models():
    return {family: tiny_unets.build(family) for family in tiny_unets.FAMILIES}


@pytest.fixture(scope="module")
def sdxl(models):
    return models["sdxl"]


def rows(conditioning: list, part: slice) -> list:
    """Some panels of a CONDITIONING."""
    return [[text[part], {"pooled_output": extra["pooled_output"][part]}] for text, extra in conditioning]


@dataclasses.dataclass
class Story:
    """Panels of one batch, of which parts can be drawn.

    Args:
        seed: of the noise and the prompts.
    """

    model: comfy.model_patcher.ModelPatcher
    sharing: Sharing = SHARING
    sampler: str = "euler"
    cfg: float = 4.0
    seed: int = 0

    def draw(self, part: slice, patch: ConsistentAttention | None = None) -> torch.Tensor:
        """Latents of some panels."""
        positive, negative = (rows(prompt(5, 10 * self.seed + number), part) for number in (1, 2))
        model = self.model if patch is None else patch.install(self.model)
        noise = latents(5, SIDE, SIDE, self.seed)[part]
        return denoise(guide(model, positive, negative, self.cfg), noise, self.sampler)

    def jointly(self, part: slice, family: str, sees: list, numbers: list | None = None) -> torch.Tensor:
        """Latents of panels drawn in one batch, by the dense reference."""
        reference = DenseAttention(self.sharing, COARSE[family], sees, numbers)
        with reference.inside(self.model.model.diffusion_model):
            return self.draw(part)

    def write(self, part: slice = REFERENCES) -> tuple[torch.Tensor, dict]:
        """Latents of reference panels and what they leave."""
        tokens = {}
        return self.draw(part, ConsistentAttention(self.sharing, written=tokens)), tokens

    def bank(self, **characters: dict) -> CharacterBank:
        return CharacterBank(origin_of(self.model, self.sharing, SIGMAS, SIDE, SIDE), characters)

    def read(self, part: slice, bank: CharacterBank, *names: str) -> torch.Tensor:
        """Latents of panels that read characters."""
        return self.draw(part, ConsistentAttention(self.sharing, bank=bank, characters=names))


# What is written


@pytest.mark.parametrize("family, channels", [("sdxl", {4: 128, 16: 64}), ("sd15", {4: 128, 16: 64, 64: 32})])
def test_a_bank_holds_the_steps_and_layers_that_share(models, family, channels):
    story = Story(models[family])
    _, tokens = story.write()
    layers = shared_layers(models[family])
    expected = {
        Slot(Evaluation(kind, 0, step, 0), layer)
        for kind in (0, 1)
        for step in (1, 2)
        for layer in layers
        if SHARING.shares(step, 3, layer)
    }
    assert set(tokens) == expected and 0 < len(expected) < 4 * len(layers)
    kept = {count: PANELS * round((0.5 if count == 4 else 0.6) * count) for count in channels}
    shapes = {(kept[count], width) for count, width in channels.items()}
    assert {tuple(tensor.shape) for tensor in tokens.values()} == shapes
    size = sum(4 * math.prod(tokens[slot].shape) for slot in expected)
    assert story.bank(A=tokens).size == size
    assert bank_size(models[family], SHARING, 3, SIDE, SIDE, PANELS) == size


def test_a_bank_holds_the_sampled_tokens_of_every_panel(sdxl):
    """As they are before the layer's attention, one panel after the other."""
    seen = {}

    def look(tokens, context, values, options):
        step = SIGMAS.tolist().index(options["sigmas"][0].item())
        for kind, panels in zip(options["cond_or_uncond"], tokens.split(PANELS)):
            seen[kind, step, Layer(*options["block"], options["block_index"])] = panels.clone()
        return tokens, context, values

    watched = sdxl.clone()
    watched.set_model_attn1_patch(look)
    _, written = Story(watched).write()
    for ((kind, _, step, _), layer), kept in written.items():
        panels = seen[kind, step, layer]
        rate = 0.5 if layer.block < 3 else 0.6
        positions = [SHARING.positions(step, panel, panels.shape[1], rate) for panel in range(PANELS)]
        assert torch.equal(kept, torch.cat([panel[seen] for panel, seen in zip(panels, positions)]))
        assert kept.device.type == "cpu"


def test_a_warm_up_that_reads_everything_keeps_everything(sdxl):
    sharing = dataclasses.replace(SHARING, warm_up="full_bank")
    story = Story(sdxl, sharing)
    _, tokens = story.write()
    warm_up = {slot: kept for slot, kept in tokens.items() if slot.evaluation.step == 0}
    assert {slot.layer for slot in warm_up} == set(shared_layers(sdxl)) and len(warm_up) == 72
    assert {tuple(kept.shape) for kept in warm_up.values()} == {(PANELS * 4, 128), (PANELS * 16, 64)}
    assert bank_size(sdxl, sharing, 3, SIDE, SIDE, PANELS) == story.bank(A=tokens).size


def test_writing_changes_no_panel(sdxl):
    story = Story(sdxl)
    assert torch.equal(story.write()[0], story.draw(REFERENCES, ConsistentAttention(SHARING)))


def test_writing_twice_gives_the_same_bank_and_does_not_grow(sdxl):
    story, tokens = Story(sdxl), {}
    patch = ConsistentAttention(SHARING, written=tokens)
    first = story.draw(REFERENCES, patch)
    kept = dict(tokens)
    assert torch.equal(story.draw(REFERENCES, patch), first)
    assert set(tokens) == set(kept)
    assert all(torch.equal(tokens[slot], kept[slot]) for slot in kept)


# What is read


@pytest.mark.parametrize("count", ["fixed", "random"])
@pytest.mark.parametrize("family", tiny_unets.FAMILIES)
def test_reading_is_drawing_in_one_batch(models, family, count):
    """A panel that reads the bank is what it is beside its reference panels, where nobody sees it."""
    story = Story(models[family], dataclasses.replace(SHARING, count=count))
    expected = story.jointly(slice(0, 4), family, EVERYBODY[:4])
    references, tokens = story.write()
    read = story.read(READER, story.bank(A=tokens), "A")
    assert_same(torch.cat((references, read)), expected)
    assert different(read, story.draw(READER))


def test_reading_everything_in_the_warm_up(sdxl):
    story = Story(sdxl, dataclasses.replace(SHARING, warm_up="full_bank"))
    references, tokens = story.write()
    read = story.read(READER, story.bank(A=tokens), "A")
    assert_same(torch.cat((references, read)), story.jointly(slice(0, 4), "sdxl", EVERYBODY[:4]))
    plain = Story(sdxl)
    assert different(read, plain.read(READER, plain.bank(A=plain.write()[1]), "A"))


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_samplers_that_evaluate_twice_read_what_the_same_evaluation_wrote(sdxl, sampler):
    story = Story(sdxl, sampler=sampler)
    references, tokens = story.write()
    assert {slot.evaluation[2:] for slot in tokens} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    read = story.read(READER, story.bank(A=tokens), "A")
    assert_same(torch.cat((references, read)), story.jointly(slice(0, 4), "sdxl", EVERYBODY[:4]))


def test_panels_that_read_together_are_what_they_are_alone(sdxl):
    story = Story(sdxl)
    bank = story.bank(A=story.write()[1])
    together = story.read(READERS, bank, "A")
    alone = torch.cat([story.read(slice(row, row + 1), bank, "A") for row in (3, 4)])
    assert_same(together, alone)
    assert_same(together, story.jointly(slice(0, 5), "sdxl", EVERYBODY)[READERS])


def test_prompts_computed_apart_read_the_same(sdxl, monkeypatch):
    story = Story(sdxl)
    references, tokens = story.write()
    expected = story.read(READERS, story.bank(A=tokens), "A")
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    apart, others = story.write()
    assert_same(apart, references)
    assert set(others) == set(tokens)
    assert_same(story.read(READERS, story.bank(A=others), "A"), expected)


def windowed(model, length: int) -> comfy.model_patcher.ModelPatcher:
    """A model with ComfyUI's context windows over the batch."""
    model = model.clone()
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("flat"),
        context_length=length,
        dim=0,
        causal_window_fix=False,
    )
    return model


def test_panels_that_read_in_windows_are_what_they_are_together(sdxl):
    """With a sampler that evaluates twice: further windows are no further visits of the step."""
    story = Story(sdxl, sampler="heun")
    bank = story.bank(A=story.write()[1])
    apart = Story(windowed(sdxl, 1), sampler="heun").read(READERS, bank, "A")
    assert_same(apart, story.read(READERS, bank, "A"))


def test_reference_panels_in_windows_are_refused(sdxl):
    with pytest.raises(ValueError, match="of one batch, but context windows divide this one. Remove them"):
        Story(windowed(sdxl, 2)).write()
    assert Story(windowed(sdxl, 3)).write()[1]


def test_two_characters_in_a_panel(sdxl):
    """Each was drawn in a run of its own, so the panels of both have the numbers 0 and 1."""
    story = Story(sdxl)
    a, written_a = story.write(slice(0, 2))
    b, written_b = story.write(slice(2, 4))
    bank = story.bank(A=written_a).joined({"B": written_b})
    both = story.read(slice(4, 5), bank, "A", "B")
    sees = [[1], [0], [3], [2], [0, 1, 2, 3]]
    assert_same(torch.cat((a, b, both)), story.jointly(slice(0, 5), "sdxl", sees, [0, 1, 0, 1, 0]))
    only_b = story.jointly(slice(2, 5), "sdxl", [[1], [0], [0, 1]])[2:]
    assert_same(story.read(slice(4, 5), bank, "B"), only_b)
    assert different(both, only_b)


def test_nobody_is_the_unpatched_model_bit_for_bit(sdxl):
    story = Story(sdxl)
    assert torch.equal(story.read(READERS, story.bank(A=story.write()[1])), story.draw(READERS))


def test_runs_leave_nothing_behind(sdxl):
    story, other = Story(sdxl), Story(sdxl, seed=1)
    first = story.write()
    bank = story.bank(A=first[1])
    read = story.read(READER, bank, "A")
    second = other.write()
    other_read = other.read(READER, other.bank(A=second[1]), "A")
    assert different(read, other_read)
    assert torch.equal(story.read(READER, bank, "A"), read)
    again = story.write()
    assert torch.equal(again[0], first[0])
    assert all(torch.equal(again[1][slot], kept) for slot, kept in first[1].items())


def test_cfg_1_leaves_and_reads_the_positive_prompt_only(sdxl):
    story = Story(sdxl, cfg=1.0)
    references, tokens = story.write()
    assert {slot.evaluation.kind for slot in tokens} == {0}
    assert bank_size(sdxl, SHARING, 3, SIDE, SIDE, PANELS, prompts=1) == story.bank(A=tokens).size
    read = story.read(READER, story.bank(A=tokens), "A")
    assert_same(torch.cat((references, read)), story.jointly(slice(0, 4), "sdxl", EVERYBODY[:4]))
    with pytest.raises(ValueError, match="has nothing of A for the negative prompt at step 2. It was made without"):
        Story(sdxl).read(READER, story.bank(A=tokens), "A")


def test_a_second_positive_prompt_reads_the_first(sdxl):
    story = Story(sdxl)
    bank = story.bank(A=story.write()[1])
    patched = ConsistentAttention(SHARING, bank=bank, characters=["A"]).install(sdxl)
    positive, negative = (rows(prompt(5, number), READER) for number in (1, 2))
    noise = latents(5, SIDE, SIDE)[READER]
    twice = denoise(guide(patched, [*positive, *positive], negative), noise)
    assert_same(twice, story.read(READER, bank, "A"))


def test_a_run_that_the_bank_does_not_fit_is_refused(models):
    story = Story(models["sdxl"])
    bank = story.bank(A=story.write()[1])
    reseeded = Story(models["sdxl"], dataclasses.replace(SHARING, seed=4))
    with pytest.raises(ValueError, match=r"was made with seed 3 \(here 4\). Set the same here"):
        reseeded.read(READER, bank, "A")
    with pytest.raises(ValueError, match="was made with another model"):
        Story(models["sd15"]).read(READER, bank, "A")
    with pytest.raises(ValueError, match="holds A, but not B. Draw the reference panels"):
        story.read(READER, bank, "A", "B")


# The bank itself

ORIGIN = Origin("model", (14.6, 6.0, 2.5, 0.0), 96, 64, SHARING)


def test_a_run_like_the_bank_s_is_accepted():
    bank = CharacterBank(ORIGIN, {})
    bank.check_origin(ORIGIN)
    bank.check_origin(dataclasses.replace(ORIGIN, sigmas=(14.601, 6.0001, 2.50001, 0.0)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "other"}, "made with another model. Load the checkpoint that the bank was made with"),
        ({"width": 64}, "made for pictures of 768x512, this run is 512x512. Use the size of the bank"),
        ({"height": 96}, "made for pictures of 768x512, this run is 768x768."),
        ({"sigmas": (14.6, 6.0, 0.0)}, "made in 3 steps, this run has 2. Use the scheduler and the steps"),
        ({"sigmas": (14.6, 5.9, 2.5, 0.0)}, r"other sigmas \(14.6, 6, ... 0\) than this run's \(14.6, 5.9, ... 0\)"),
        ({"sharing": dataclasses.replace(SHARING, rate_32=0.6)}, r"with rate_32 0.5 \(here 0.6\). Set the same here"),
        (
            {"sharing": dataclasses.replace(SHARING, seed=7, count="random")},
            r"with seed 3 \(here 7\), count fixed \(here random\)",
        ),
    ],
    ids=["model", "width", "height", "steps", "sigmas", "rate", "seed and count"],
)
def test_another_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CharacterBank(ORIGIN, {}).check_origin(dataclasses.replace(ORIGIN, **change))


def test_unknown_characters_are_refused():
    bank = CharacterBank(ORIGIN, {"Ann": {}, "Ben": {}})
    bank.check_names(["Ben", "Ann"])
    with pytest.raises(ValueError, match="holds Ann, Ben, but not Cem, Dee. Draw the reference panels of that"):
        bank.check_names(["Ann", "Cem", "Dee"])
    with pytest.raises(ValueError, match="holds nobody, but not Ann"):
        CharacterBank(ORIGIN, {}).check_names(["Ann"])


LAYER = Layer("output", 0, 0)


def held(*evaluations: Evaluation) -> dict:
    """Tokens whose values are the number of their evaluation."""
    return {
        Slot(evaluation, LAYER): torch.full((2, 3), float(number), dtype=torch.float16)
        for number, evaluation in enumerate(evaluations)
    }


def test_tokens_come_in_the_order_of_the_names():
    bank = CharacterBank(ORIGIN, {"A": held(Evaluation(0, 0, 0, 0)), "B": held(*[Evaluation(0, 0, 0, 0)] * 2)})
    found = bank.tokens(["B", "A"], Evaluation(0, 0, 0, 0), LAYER)
    assert [tokens.unique().tolist() for tokens in found] == [[1.0], [0.0]]
    assert bank.tokens([], Evaluation(0, 0, 0, 0), LAYER) == []


@pytest.mark.parametrize(
    "asked, found",
    [((0, 0, 1, 0), 0), ((0, 0, 1, 1), 1), ((0, 0, 1, 4), 1), ((0, 1, 1, 1), 2), ((0, 5, 1, 1), 1), ((1, 3, 1, 2), 3)],
    ids=["same", "second visit", "later visit", "earlier visit of the entry", "further entry", "negative"],
)
def test_further_entries_and_visits_read_the_nearest_there_is(asked, found):
    kept = held(Evaluation(0, 0, 1, 0), Evaluation(0, 0, 1, 1), Evaluation(0, 1, 1, 0), Evaluation(1, 0, 1, 0))
    (tokens,) = CharacterBank(ORIGIN, {"A": kept}).tokens(["A"], Evaluation(*asked), LAYER)
    assert tokens.unique().tolist() == [found]


@pytest.mark.parametrize(
    "asked, message",
    [
        (Evaluation(1, 0, 4, 0), "nothing of A for the negative prompt at step 5"),
        (Evaluation(2, 0, 4, 0), "nothing of A for the number 2 prompt at step 5"),
    ],
)
def test_missing_tokens_are_an_error(asked, message):
    with pytest.raises(ValueError, match=message):
        CharacterBank(ORIGIN, {"A": held(Evaluation(0, 0, 4, 0))}).tokens(["A"], asked, LAYER)


def test_a_step_that_a_cache_left_out_reads_the_nearest():
    kept = held(Evaluation(0, 0, 1, 0), Evaluation(0, 0, 4, 0))
    for step, found in ((0, 0), (2, 0), (3, 1), (7, 1)):
        (tokens,) = CharacterBank(ORIGIN, {"A": kept}).tokens(["A"], Evaluation(0, 0, step, 0), LAYER)
        assert tokens.unique().tolist() == [found]


def test_joined_leaves_the_bank_as_it_is():
    first = CharacterBank(ORIGIN, {"A": held(Evaluation(0, 0, 0, 0))})
    both = first.joined({"B": held(Evaluation(0, 0, 0, 0), Evaluation(1, 0, 0, 0))})
    assert (list(first.characters), list(both.characters)) == (["A"], ["A", "B"])
    assert (first.size, both.size) == (12, 36)
    assert both.origin is ORIGIN
