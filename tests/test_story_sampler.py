"""Drawing stories in process: the order of the passes, banks, redrawn panels, progress, cancelling and errors."""

import dataclasses
import inspect
import logging
import types
from typing import NamedTuple

import comfy.cli_args
import comfy.k_diffusion.sampling
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import tiny_photomaker
import tiny_unets
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from dense_attention import DenseAttention
from tiny_unets import SIGMAS, assert_same, different, guide, one_thread  # noqa: F401

from consistent_video.patches.bank_origin import bank_size, origin_of
from consistent_video.patches.character_bank import CharacterBank
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.context_windows import slide
from consistent_video.patches.shared_layers import shared_layers
from consistent_video.patches.token_sharing import Sharing
from consistent_video.samplers.reference import ReferenceSampler
from consistent_video.samplers.step_noise import BROWNIAN, noise_seed, seeded
from consistent_video.story.conditioning import check_encoder
from consistent_video.story.plan import plan
from consistent_video.story.sampling import PANEL_NOISE, Settings, StoryRun, needed_passes, select_panels
from consistent_video.story.script import MAIN_CHARACTER, parse_story

# Text widths of `tiny_photomaker.tiny_clip`.
CONTEXT, POOLED = 64, 40
# The blocks of Stable Diffusion XL with fewer transformer blocks in each.
SHALLOW = {
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "adm_in_channels": POOLED + 6 * 256,
}
SHARING = Sharing(start_step=1, plain_early=0.3, plain_late=0.1, late_step=2, seed=3, rate_32=0.5, rate_64=0.6)
SETTINGS = Settings(cfg=4.0, seed=3, width=64, height=64, id_panels=2, sharing=SHARING)
SIDE = 8
NO_STYLE = "(No style)"

TWO = parse_story(
    "[Ann] a girl with red hair\n[Ben] an old sailor",
    "[Ann] runs\n[Ben] sits\n[NC] a tree\n[Ben] and [Ann] talk\n[Ben] eats\n[Ann] jumps\n[Ann] sleeps",
    NO_STYLE,
    "blurry",
)
TWO_PROMPTS = [
    "a girl with red hair runs",
    "an old sailor sits",
    "a tree",
    "an old sailor and a girl with red hair talk",
    "an old sailor eats",
    "a girl with red hair jumps",
    "a girl with red hair sleeps",
]
ONE = parse_story("a girl", "runs\njumps\nsleeps\n[NC] a tree", NO_STYLE, "blurry")
ONE_PROMPTS = ["a girl, runs", "a girl, jumps", "a girl, sleeps", "a tree"]


class Tools(NamedTuple):
    """A checkpoint."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP


@pytest.fixture(scope="module")
def tools() -> Tools:
    with torch.inference_mode():
        return Tools(tiny_unets.build("sdxl", **SHALLOW), tiny_photomaker.tiny_clip())


@pytest.fixture(scope="module")
def two(tools, one_thread) -> tuple[torch.Tensor, CharacterBank]:  # noqa: F811
    """The story of two as it is drawn."""
    with torch.inference_mode():
        return run_of(tools, TWO).draw()


@pytest.fixture
def reports(monkeypatch) -> list[tuple]:
    """What reaches the server's progress hook: (done, total, preview)."""
    found = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: found.append((done, total, preview))
    )
    return found


def run_of(tools: Tools, story=TWO, sampler="euler", sigmas=SIGMAS, model=None, identity=None, **settings) -> StoryRun:
    """A run with `SETTINGS` but for those given."""
    settings = dataclasses.replace(SETTINGS, **settings)
    sampler = comfy.samplers.sampler_object(sampler)
    return StoryRun(model or tools.model, tools.clip, story, sampler, sigmas, settings, identity)


def recording(model) -> tuple[comfy.model_patcher.ModelPatcher, list[dict]]:
    """A clone of a model that records what its forward passes are given."""
    found = []

    def wrapper(apply, given):
        found.append(given)
        return apply(given["input"], given["timestep"], **given["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model, found


@dataclasses.dataclass
class ByHand:
    """The same computations without the pack's story code."""

    tools: Tools
    prompts: list[str]
    sampler: str = "euler"
    cfg: float = 4.0

    def noise(self, panels) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SETTINGS.seed)
        return torch.cat([torch.randn(1, 4, SIDE, SIDE, generator=generator) for _ in self.prompts])[panels]

    def encode(self, text: str) -> list:
        ((embeds, options),) = self.tools.clip.encode_from_tokens_scheduled(self.tools.clip.tokenize(text))
        return [[embeds, {**options, "width": 64, "height": 64, "target_width": 64, "target_height": 64}]]

    def draw(self, panels: list[int], patch: ConsistentAttention | None = None) -> torch.Tensor:
        model = self.tools.model if patch is None else patch.install(self.tools.model)
        entries = [self.encode(self.prompts[panel])[0] for panel in panels]
        pooled = torch.cat([options["pooled_output"] for _, options in entries])
        positive = [[torch.cat([text for text, _ in entries]), {**entries[0][1], "pooled_output": pooled}]]
        noise, sampler = self.noise(panels), comfy.samplers.sampler_object(self.sampler)
        # Each panel's noise is that of the sampler in a batch of one, with the panel's own seed.
        seeds = [noise_seed(PANEL_NOISE, SETTINGS.seed, panel) for panel in panels]
        sampler = seeded(sampler, seeds)
        guider = guide(model, positive, self.encode("blurry"), self.cfg)
        return guider.sample(
            noise, torch.zeros_like(noise), sampler, SIGMAS.clone(), seed=SETTINGS.seed, disable_pbar=True
        )

    def write(self, panels: list[int]) -> tuple[torch.Tensor, dict]:
        tokens = {}
        return self.draw(panels, ConsistentAttention(SHARING, tokens)), tokens

    def read(self, panels: list[int], *names: str, **characters: dict) -> torch.Tensor:
        bank = CharacterBank(origin_of(self.tools.model, SHARING, SIGMAS, SIDE, SIDE), characters)
        return self.draw(panels, ConsistentAttention(SHARING, None, bank, names))

    def story_of_one(self) -> torch.Tensor:
        references, tokens = self.write([0, 1])
        return torch.cat((references, self.read([2], "girl", girl=tokens), self.draw([3])))

    def story_of_two(self) -> torch.Tensor:
        ann, of_ann = self.write([0, 5])
        ben, of_ben = self.write([1, 4])
        both = self.read([3], "Ann", "Ben", Ann=of_ann, Ben=of_ben)
        last = self.read([6], "Ann", Ann=of_ann)
        return torch.cat((ann[:1], ben[:1], self.draw([2]), both, ben[1:], ann[1:], last))


def same_bank(bank: CharacterBank, other: CharacterBank) -> bool:
    """Whether two banks hold the same, bit for bit."""
    return (
        bank.origin == other.origin
        and bank.characters.keys() == other.characters.keys()
        and all(
            tokens.keys() == other.characters[name].keys()
            and all(torch.equal(kept, other.characters[name][slot]) for slot, kept in tokens.items())
            for name, tokens in bank.characters.items()
        )
    )


# What is drawn


def test_a_story_of_one_is_references_together_and_others_after_them(tools):
    hand = ByHand(tools, ONE_PROMPTS)
    tokens = hand.write([0, 1])[1]
    samples, bank = run_of(tools, ONE).draw()
    assert torch.equal(samples, hand.story_of_one())
    assert list(bank.characters) == [MAIN_CHARACTER]
    assert bank.origin == origin_of(tools.model, SHARING, SIGMAS, SIDE, SIDE)
    assert same_bank(bank, CharacterBank(bank.origin, {MAIN_CHARACTER: tokens}))
    assert different(samples[2:3], hand.draw([2]))


def test_a_story_of_one_is_what_one_batch_would_be(tools):
    """By the dense reference, which shares no code with the patch; nobody sees the panel that reads."""
    with DenseAttention(SHARING, range(3), [[1], [0], [0, 1], []]).inside(tools.model.model.diffusion_model):
        together = ByHand(tools, ONE_PROMPTS).draw([0, 1, 2, 3])
    assert_same(run_of(tools, ONE).draw()[0], together)


def test_a_story_of_two_comes_in_its_own_order(tools, two):
    assert torch.equal(two[0], ByHand(tools, TWO_PROMPTS).story_of_two())
    assert list(two[1].characters) == ["Ann", "Ben"]


@pytest.mark.parametrize(
    "sampler",
    [
        "heun",
        "dpmpp_2m",
        "ddim",
        "dpm_2",
        "euler_ancestral",
        "dpmpp_sde",
        "dpmpp_3m_sde",
        "lcm",
        "uni_pc",
        "res_multistep",
    ],
)
def test_any_sampler(tools, sampler):
    samples, bank = run_of(tools, ONE, sampler).draw()
    assert torch.equal(samples, ByHand(tools, ONE_PROMPTS, sampler).story_of_one())
    assert torch.equal(run_of(tools, ONE, sampler).draw(bank, [2])[0], samples[2:3])


STOCHASTIC = [
    *(name for name in comfy.samplers.KSAMPLER_NAMES if "ancestral" in name or "sde" in name),
    *("lcm", "ddpm", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "dpm_adaptive"),
]


class Noise(NamedTuple):
    """What a sampler adds to panels over a model whose prediction is 0, so that nothing else is in them."""

    name: str

    def of(self, seeds: list[int], like=None) -> torch.Tensor:
        kind = comfy.model_base.ModelType.EPS
        sampling = comfy.model_base.model_sampling(None, kind)
        patcher = types.SimpleNamespace(get_model_object=lambda _: sampling)
        inner = types.SimpleNamespace(model_sampling=sampling)

        def predict(x, sigma, model_options=None, **_):
            for function in (model_options or {}).get("sampler_post_cfg_function", []):
                function({"denoised": 0 * x, "uncond_denoised": 0 * x})
            return 0 * x

        predict.inner_model = types.SimpleNamespace(inner_model=inner, model_patcher=patcher)
        options = {"eta": 1.0} if self.name == "dpm_adaptive" else {}
        sampler = seeded(comfy.samplers.ksampler(self.name, options), seeds)
        x = torch.ones(len(seeds), 4, 8, 8)
        args = {"seed": 7, "model_options": {}}
        return sampler.sampler_function(
            predict, x, SIGMAS[:-1].clone(), extra_args=args, callback=None, disable=True, **sampler.extra_options
        )


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_noise_of_steps_is_the_panels_own(name):
    """Alone or in a batch, at any place in it; noise of different panels has nothing in common."""
    noise = Noise(name)
    batch = noise.of([5, 6, 7])
    assert abs(torch.corrcoef(batch.flatten(1)).tril(-1)).max() < 0.25
    if name != "dpm_adaptive":  # its steps depend on the whole batch
        assert torch.equal(noise.of([6])[0], batch[1]) and torch.equal(noise.of([7, 5]), batch[[2, 0]])


def test_the_samplers_with_brownian_noise_are_known():
    """A sampler that ComfyUI gives another kind of noise would get the wrong one."""
    sampling = comfy.k_diffusion.sampling
    functions = {name: getattr(sampling, name) for name in dir(sampling) if name.startswith("sample_")}
    sources = {name: inspect.getsource(function) for name, function in functions.items()}
    direct = {name for name, source in sources.items() if "= BrownianTreeNoiseSampler(" in source}
    assert direct | {"sample_dpmpp_2m_sde_heun"} == set(BROWNIAN)
    assert all(("cpu=False" in sources[name]) != BROWNIAN[name] for name in direct)


def test_samplers_that_draw_from_the_global_generator_draw_a_panel_as_it_was(tools):
    """Euler with churn, as nodes of others have it."""
    run = run_of(tools, ONE)
    run.sampler = comfy.samplers.ksampler("euler", {"s_churn": 3.0})
    samples, bank = run.draw()
    torch.manual_seed(99)
    assert torch.equal(run.draw(bank, [3])[0], samples[3:])


def test_the_reference_sampler_draws_each_panel_by_its_number(tools):
    run = run_of(tools, ONE)
    run.sampler = ReferenceSampler("ddim", 1.0)
    samples, bank = run.draw()
    assert torch.equal(run.draw(bank, [3])[0], samples[3:])


def test_steps_that_a_cache_left_out_read_the_nearest_ones(tools):
    """EasyCache leaves out other steps of the references than of the panels that read them."""
    model = EasyCacheNode.execute(tools.model, 1.2, 0.0, 1.0, False).result[0]
    sharing, sigmas = dataclasses.replace(SHARING, plain_early=0.0, plain_late=0.0), torch.linspace(14.6, 0.0, 9)
    samples, bank = run_of(tools, ONE, sigmas=sigmas, sharing=sharing).draw()
    tokens = bank.characters[MAIN_CHARACTER]
    some = {slot: kept for slot, kept in tokens.items() if slot.evaluation.step in (1, 4, 7)}
    assert len({slot.evaluation.step for slot in tokens}) == 7 and len(some) < len(tokens)
    again = run_of(tools, ONE, sigmas=sigmas, sharing=sharing)
    panel, _ = again.draw(CharacterBank(bank.origin, {MAIN_CHARACTER: some}), [2])
    assert panel.isfinite().all() and different(panel, samples[2:3])
    assert run_of(tools, ONE, sigmas=sigmas, sharing=sharing, model=model).draw()[0].isfinite().all()


def test_the_sigmas_stay_as_they_are(tools):
    """ComfyUI's uni_pc writes into those that it is given."""
    sigmas = SIGMAS.clone()
    run_of(tools, ONE, "uni_pc", sigmas).draw()
    assert torch.equal(sigmas, SIGMAS)


def test_a_sampler_that_chooses_its_own_sigmas(tools, reports):
    run = run_of(tools, ONE, "dpm_adaptive", torch.tensor([3.0, 2.0, 1.5, 1.0]))
    samples, bank = run.draw()
    assert samples.isfinite().all()
    assert reports[-1] == (12, 12, None)
    done = [report[0] for report in reports]
    assert done == sorted(done)
    assert torch.equal(run.draw(bank, [2])[0], samples[2:3])


def test_cfg_1_needs_no_negative_prompt(tools):
    samples, bank = run_of(tools, cfg=1.0).draw()
    assert torch.equal(samples, ByHand(tools, TWO_PROMPTS, cfg=1.0).story_of_two())
    assert {slot.evaluation.kind for tokens in bank.characters.values() for slot in tokens} == {0}


def test_nobody_is_the_plain_model(tools, two):
    """Bit for bit; as are all panels when nothing is shared, but for what a batch of two adds up in another order."""
    hand = ByHand(tools, TWO_PROMPTS)
    assert torch.equal(two[0][2:3], hand.draw([2]))
    unshared = dataclasses.replace(SHARING, rate_32=0.0, rate_64=0.0)
    samples, bank = run_of(tools, sharing=unshared).draw()
    assert_same(samples, torch.cat([hand.draw([panel]) for panel in range(7)]))
    assert bank.size == 0


def test_noise_goes_by_the_number_of_the_panel(tools):
    shorter, longer = run_of(tools, ONE), run_of(tools, TWO)
    assert torch.equal(longer.noise[:4], shorter.noise)
    assert torch.equal(longer.noise, ByHand(tools, TWO_PROMPTS).noise(range(7)))
    assert len({tuple(noise.flatten().tolist()) for noise in longer.noise}) == 7
    assert not torch.equal(run_of(tools, ONE, seed=4).noise[0], shorter.noise[0])


def test_sizes_that_are_no_multiples_of_32(tools):
    samples, bank = run_of(tools, width=72, height=104).draw()
    assert samples.shape == (7, 4, 13, 9) and samples.isfinite().all()
    assert (bank.origin.width, bank.origin.height) == (9, 13)


# Single panels


@pytest.mark.parametrize("wanted", [[3], [2], [2, 6], [6, 3], [3, 2, 6]], ids=str)
def test_a_bank_draws_single_panels_as_they_were(tools, two, wanted):
    samples, bank = two
    model, evaluated = recording(tools.model)
    again, same = run_of(tools, model=model).draw(bank, wanted)
    assert torch.equal(again, samples[sorted(wanted)])
    assert len(evaluated) == 3 * len(wanted)
    assert same_bank(bank, same)


@pytest.mark.parametrize(
    "wanted, passes, names",
    [
        ([3], [2, 2, 1], ["Ann", "Ben"]),
        ([6], [2, 1], ["Ann"]),
        ([2], [1], []),
        ([4], [2], ["Ben"]),
        ([0, 2], [2, 1], ["Ann"]),
    ],
    ids=str,
)
def test_without_a_bank_single_panels_need_the_references_of_those_in_them(tools, two, wanted, passes, names):
    model, evaluated = recording(tools.model)
    again, bank = run_of(tools, model=model).draw(wanted=wanted)
    assert torch.equal(again, two[0][wanted])
    # Three steps of every pass, each with the panels for both prompts.
    assert [len(given["input"]) // 2 for given in evaluated[::3]] == passes
    assert list(bank.characters) == names


def test_further_characters_join_a_bank(tools, two):
    samples, bank = two
    some, of_ann = run_of(tools).draw(wanted=[6])
    rest, joined = run_of(tools).draw(of_ann, [1, 3, 4])
    assert torch.equal(rest, samples[[1, 3, 4]])
    assert same_bank(joined, bank)
    assert list(of_ann.characters) == ["Ann"]


def test_a_bank_of_others_stays_beside_the_new_ones(tools, two):
    strangers = run_of(tools, parse_story("[Zoe] a queen", "[Zoe] waves\n[Zoe] bows", NO_STYLE)).draw()[1]
    samples, bank = run_of(tools).draw(strangers)
    assert list(bank.characters) == ["Zoe", "Ann", "Ben"]
    assert torch.equal(samples, two[0])


def test_known_characters_need_no_references(tools, two):
    """With their bank all panels read, so that those that were references are drawn anew."""
    samples, bank = two
    again, _ = run_of(tools).draw(bank)
    assert torch.equal(again[[2, 3, 6]], samples[[2, 3, 6]])
    assert not any(torch.equal(again[panel], samples[panel]) for panel in (0, 1, 4, 5))
    sequel = parse_story("[Ann] a girl with red hair", "[Ann] reads", NO_STYLE, "blurry")
    assert run_of(tools, sequel, id_panels=4).draw(bank)[0].shape == (1, 4, SIDE, SIDE)


def test_other_stories_in_between_change_nothing(tools, two):
    run_of(tools, ONE, width=96, height=72, id_panels=1, seed=9).draw()
    run_of(tools, ONE, "heun", torch.tensor([9.0, 1.0, 0.0]), sharing=Sharing(seed=1), cfg=2.0).draw()
    samples, bank = run_of(tools).draw()
    assert torch.equal(samples, two[0])
    assert same_bank(bank, two[1])


def test_the_model_stays_as_it_is(tools):
    model = tools.model.clone()
    before = repr(model.model_options)
    run_of(tools, ONE, model=model).draw()
    assert repr(model.model_options) == before
    assert not model.wrappers and not model.patches


def test_a_bank_does_not_grow_from_run_to_run(tools, two):
    bank, size = two[1], two[1].size
    for wanted in ([3, 6], None, [0]):
        bank = run_of(tools).draw(bank, wanted)[1]
        assert bank.size == size
    assert run_of(tools).draw()[1].size == size
    assert two[1].size == size


def test_needed_passes():
    passes = plan(TWO, 2)
    assert [step.panels for step in passes] == [(0, 5), (1, 4), (2,), (3,), (6,)]
    assert [step.panels for step in needed_passes(passes, [2])] == [(2,)]
    assert [step.panels for step in needed_passes(passes, [5])] == [(0, 5)]
    assert [step.panels for step in needed_passes(passes, [1, 6])] == [(0, 5), (1, 4), (6,)]
    assert needed_passes(passes, range(7)) == list(passes)


@pytest.mark.parametrize(
    "text, expected",
    [("", None), (" , ;", None), ("2", [1]), ("6, 2-4", [1, 2, 3, 5]), ("3-3;1 , 3", [0, 2]), (" 1 - 2 ", [0, 1])],
)
def test_panel_numbers(text, expected):
    assert select_panels(text, 7) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("0", "'0', but the story has panels 1 to 7"),
        ("2, 8", "has panels 1 to 7. Choose from those"),
        ("5-2", "has panels 1 to 7"),
        ("two", r"'two': 'two' is not a number. Write numbers such as '2, 4-6'"),
        ("1, 2.5", "'2.5' is not a number"),
        ("-3", "'-3' is not a number"),
        ("1-2-3", "'1-2-3' is not a number"),
        ("\u00b2", "is not a number"),
    ],
)
def test_panel_numbers_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        select_panels(text, 7)


# Progress


def test_progress_counts_panels_and_steps_and_shows_previews(tools, reports, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    run_of(tools).draw()
    # Two passes of two panels, three of one, three steps each.
    assert [done for done, *_ in reports] == [2, 4, 6, 8, 10, 12, *range(13, 22)]
    assert {total for _, total, _ in reports} == {21}
    assert {(kind, image.size) for _, _, (kind, image, _) in reports} == {("JPEG", (SIDE, SIDE))}


def test_progress_of_single_panels(tools, two, reports, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    run_of(tools).draw(two[1], [3])
    assert [report[:2] for report in reports] == [(1, 3), (2, 3), (3, 3)]


def test_cancelling_stops_within_a_step_and_leaves_nothing_behind(tools, two):
    evaluated = []

    def wrapper(apply, given):
        evaluated.append(len(given["input"]))
        if len(evaluated) == 5:
            comfy.model_management.interrupt_current_processing()
        return apply(given["input"], given["timestep"], **given["c"])

    model = tools.model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_of(tools, model=model).draw()
    assert len(evaluated) == 5
    samples, bank = run_of(tools).draw()
    assert torch.equal(samples, two[0]) and same_bank(bank, two[1])


# Memory


def announced(caplog) -> list[tuple]:
    """(panels, bytes) that were logged."""
    records = [record for record in caplog.records if record.msg.startswith("Character bank of")]
    return [(record.args[0], round(record.args[1] * 1e9)) for record in records]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cfg": 1.0},
        {"sharing": dataclasses.replace(SHARING, warm_up="full_bank", start_step=2)},
        {"width": 72, "height": 88},
        {"sampler": "dpm_2"},
        {"sampler": "euler_cfg_pp", "cfg": 1.0},
        {"sigmas": torch.tensor([2.5, 1.0, 0.4, 0.0])},
    ],
    ids=["two prompts", "one prompt", "full bank", "odd size", "two calls", "both prompts", "part of a schedule"],
)
def test_the_size_of_the_bank_is_announced_before_the_run(tools, caplog, changes):
    caplog.set_level(logging.INFO)
    model, seen = tools.model.clone(), []
    model.set_model_unet_function_wrapper(
        lambda apply, given: (seen.append(announced(caplog)), apply(given["input"], given["timestep"], **given["c"]))[1]
    )
    bank = run_of(tools, model=model, **changes).draw()[1]
    assert seen[0] == [(4, bank.size)] and bank.size > 0


def test_without_reference_panels_no_bank_is_announced(tools, two, caplog):
    caplog.set_level(logging.INFO)
    run_of(tools).draw(two[1], [3])
    assert announced(caplog) == []


def test_a_bank_of_the_published_size_is_less_than_half_of_the_published_one():
    """Stable Diffusion XL at 1024x1024 in fp16, 4 reference panels, 50 steps, rate 0.5, on the meta device."""
    config = {**tiny_unets.SDXL, "model_channels": 320, "context_dim": 2048, "adm_in_channels": 2816}
    settings = comfy.supported_models.SDXL(config)
    settings.unet_config["num_head_channels"] = 64
    settings.set_inference_dtype(torch.float16, None)
    settings.custom_operations = comfy.ops.disable_weight_init
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(settings.get_model({}, device="meta"), cpu, cpu)
    widths = [block.attn1.to_q.weight.shape[1] for block in shared_layers(model).values()]
    assert sorted(widths) == [640] * 6 + [1280] * 30
    tokens = {1280: 32 * 32, 640: 64 * 64}
    # As published: all tokens of both prompts at every step.
    full = sum(width * tokens[width] for width in widths) * 4 * 2 * 50 * 2
    assert full == pytest.approx(44e9, rel=0.01)
    size = bank_size(model, Sharing(), 50, 128, 128, 4)
    assert 0.3 * full < size <= 0.45 * full


def test_too_little_memory_is_said_before_anything_is_computed(tools, monkeypatch):
    model, evaluated = recording(tools.model)
    run = run_of(tools, model=model)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1000)
    monkeypatch.setattr(tools.clip, "tokenize", None)
    with pytest.raises(
        ValueError, match=r"of 4 reference panels needs 0.0 GB, but 0.0 GB are free \(cpu\). Lower id_p"
    ):
        run.draw()
    assert not evaluated


# Errors


@pytest.mark.parametrize("count", [0, 1])
def test_no_steps_are_refused(tools, count):
    with pytest.raises(ValueError, match=f"The sigmas have {count} values, which is no step. Connect a scheduler"):
        run_of(tools, sigmas=SIGMAS[:count])


def test_too_few_references_are_refused(tools):
    with pytest.raises(
        ValueError, match=r"Character \[Ben\] .* id_panels asks for 3 as references. Lower id_panels to 2"
    ):
        run_of(tools, id_panels=3).draw()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 72}, "made for pictures of 64x64, this run is 72x64. Use the size of the bank"),
        ({"sigmas": torch.tensor([14.6, 6.0, 0.0])}, "made in 3 steps, this run has 2"),
        ({"sigmas": torch.tensor([14.6, 6.0, 2.0, 0.0])}, "made with other sigmas"),
        ({"sharing": dataclasses.replace(SHARING, seed=4)}, r"made with seed 3 \(here 4\). Set the same here"),
        ({"sharing": dataclasses.replace(SHARING, rate_64=0.5)}, r"made with rate_64 0.6 \(here 0.5\)"),
        ({"sharing": dataclasses.replace(SHARING, warm_up="full_bank")}, r"warm_up plain \(here full_bank\)"),
    ],
    ids=["size", "steps", "sigmas", "seed", "rate", "warm-up"],
)
def test_a_bank_of_another_run_is_refused(tools, two, changes, message):
    model, evaluated = recording(tools.model)
    with pytest.raises(ValueError, match=message):
        run_of(tools, model=model, **changes).draw(two[1])
    assert not evaluated


def test_a_bank_of_another_model_is_refused(tools, two):
    with pytest.raises(ValueError, match="made with another model. Load the checkpoint"):
        run_of(tools, model=tiny_unets.build("sdxl", seed=1, **SHALLOW)).draw(two[1])


def test_a_bank_without_the_negative_prompt_is_refused(tools):
    bank = run_of(tools, cfg=1.0).draw()[1]
    with pytest.raises(ValueError, match="nothing of Ann for the negative prompt at step 2. It was made without"):
        run_of(tools).draw(bank, [6])


def test_an_empty_bank_is_no_bank(tools, two):
    samples, bank = run_of(tools).draw(CharacterBank(two[1].origin, {}))
    assert torch.equal(samples, two[0]) and same_bank(bank, two[1])


def test_references_in_context_windows_are_refused(tools):
    with pytest.raises(
        ValueError, match="keeps the reference panels of one batch, but context windows divide this one"
    ):
        run_of(tools, ONE, model=slide(tools.model, 2), id_panels=3).draw()


def test_a_model_that_has_the_patch_is_refused(tools):
    with pytest.raises(ValueError, match="has consistent self-attention already"):
        run_of(tools, model=ConsistentAttention(SHARING).install(tools.model)).draw()


def test_the_clip_of_another_model_is_named(tools):
    width = tools.model.model.model_config.unet_config["context_dim"]
    pooled = {"pooled_output": torch.zeros(1, 8)}
    check_encoder(tools.model, [[torch.zeros(1, 77, width), pooled]])
    for prompt, words in (
        ([[torch.zeros(1, 77, width + 1), pooled]], f"gives {width + 1} values per token, but the MODEL needs {width}"),
        ([[torch.zeros(1, 77, width), {}]], "and no summary of the text"),
    ):
        with pytest.raises(ValueError, match=f"The CLIP belongs to another model.*{words}"):
            check_encoder(tools.model, prompt)
