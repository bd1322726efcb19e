"""Draws of consistent self-attention: which layers share at which step, and which tokens."""

import itertools
import math

import pytest
import torch

from consistent_video.patches.panel_attention import attend_panels, sample_tokens
from consistent_video.patches.token_sharing import Layer, Sharing

LAYERS = [Layer("output", block, index) for block in range(3) for index in range(10)]
STEPS = 50


def open_gates(sharing: Sharing, steps: range, run: int = STEPS) -> list[bool]:
    return [sharing.shares(step, run, layer) for step in steps for layer in LAYERS]


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


# Gates


def test_the_defaults_are_the_published_low_memory_ones():
    sharing = Sharing()
    assert (sharing.rate_32, sharing.rate_64, sharing.start_step) == (0.5, 0.5, 1)
    assert (sharing.plain_early, sharing.plain_late, sharing.late_step) == (0.3, 0.1, 20)
    assert (sharing.warm_up, sharing.unit) == ("plain", "steps")


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, -3])
def test_gates_are_open_as_often_as_said(seed):
    """600 and 900 draws: four standard deviations around 0.7 and 0.9."""
    sharing = Sharing(seed=seed, start_step=0)
    early, late = open_gates(sharing, range(0, 20)), open_gates(sharing, range(20, 50))
    assert share(early) == pytest.approx(0.7, abs=4 * math.sqrt(0.7 * 0.3 / 600))
    assert share(late) == pytest.approx(0.9, abs=4 * math.sqrt(0.9 * 0.1 / 900))


def test_gates_of_steps_layers_and_seeds_are_independent():
    """Both of two draws are open as often as the product says."""
    sharing = Sharing(start_step=0, plain_early=0.5, plain_late=0.5)
    gates = torch.tensor(open_gates(sharing, range(STEPS))).float().reshape(STEPS, len(LAYERS))
    other = torch.tensor(open_gates(Sharing(start_step=0, plain_early=0.5, plain_late=0.5, seed=1), range(STEPS)))
    pairs = {
        "steps": (gates[1:], gates[:-1]),
        "layers": (gates[:, 1:], gates[:, :-1]),
        "seeds": (gates.flatten(), other.float()),
    }
    for name, (first, second) in pairs.items():
        assert abs((first * second).mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1450), name


def test_probability_0_and_1_are_certain():
    assert all(open_gates(Sharing(start_step=0, plain_early=0.0, plain_late=0.0), range(STEPS)))
    assert not any(open_gates(Sharing(start_step=0, plain_early=1.0, plain_late=1.0), range(STEPS)))


def test_a_higher_probability_only_closes_gates():
    few, many = (
        open_gates(Sharing(start_step=0, plain_early=plain, plain_late=plain), range(STEPS)) for plain in (0.2, 0.6)
    )
    assert all(before or not after for before, after in zip(few, many))


def test_the_warm_up_shares_nothing():
    sharing = Sharing(start_step=4, plain_early=0.0, plain_late=0.0)
    assert not any(open_gates(sharing, range(4))) and all(open_gates(sharing, range(4, STEPS)))
    assert [sharing.warming_up(step, STEPS) for step in range(6)] == [True] * 4 + [False] * 2


def test_the_late_probability_begins_at_its_step():
    sharing = Sharing(start_step=0, plain_early=1.0, plain_late=0.0, late_step=7)
    assert not any(open_gates(sharing, range(7))) and all(open_gates(sharing, range(7, STEPS)))


@pytest.mark.parametrize("steps, start, late", [(50, 5, 20), (25, 2, 10), (20, 2, 8), (100, 10, 40), (4, 0, 2)])
def test_fractions_are_shares_of_50_steps(steps, start, late):
    """Step 5 and 20 of 50; 25 steps give 2.5, which rounds to the even 2."""
    sharing = Sharing(start_step=5, late_step=20, plain_early=1.0, plain_late=0.0, unit="fractions")
    assert [step for step in range(steps) if sharing.warming_up(step, steps)] == list(range(start))
    assert [step for step in range(steps) if sharing.shares(step, steps, LAYERS[0])] == list(range(late, steps))


def test_step_numbers_do_not_depend_on_the_run():
    sharing = Sharing(seed=6)
    assert open_gates(sharing, range(20), 20) == open_gates(sharing, range(20), 100)


# Positions


@pytest.mark.parametrize("tokens, rate", [(1024, 0.5), (576, 0.3), (35, 0.7), (4, 0.4), (1, 0.5)])
def test_a_fixed_count_is_fixed(tokens, rate):
    sharing = Sharing()
    for step, panel in itertools.product(range(4), range(3)):
        positions = sharing.positions(step, panel, tokens, rate)
        assert positions.dtype == torch.int64 and len(positions) == round(rate * tokens)
        assert torch.equal(positions, positions.unique()) and ((0 <= positions) & (positions < tokens)).all()


def test_a_random_count_is_binomial():
    sharing = Sharing(count="random")
    counts = torch.tensor(
        [len(sharing.positions(step, panel, 1024, 0.3)) for step in range(50) for panel in range(4)]
    ).float()
    assert counts.mean().item() == pytest.approx(0.3 * 1024, abs=4 * math.sqrt(1024 * 0.21 / 200))
    assert counts.std().item() == pytest.approx(math.sqrt(1024 * 0.21), rel=0.25)


@pytest.mark.parametrize("count", ["fixed", "random"])
def test_every_token_is_drawn_equally_often(count):
    sharing = Sharing(count=count)
    drawn = torch.zeros(64)
    for step, panel in itertools.product(range(200), range(5)):
        drawn[sharing.positions(step, panel, 64, 0.5)] += 1
    assert (drawn / 1000 - 0.5).abs().max() < 4.5 * math.sqrt(0.25 / 1000)


@pytest.mark.parametrize("count", ["fixed", "random"])
def test_positions_of_steps_panels_grids_and_seeds_differ(count):
    drawn = [
        Sharing(count=count, seed=seed).positions(step, panel, tokens, 0.5)
        for seed, step, panel, tokens in itertools.product((0, 1), (0, 1, 11), (0, 1, 11), (256, 257))
    ]
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("count", ["fixed", "random"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rate_0_is_nothing_and_rate_1_is_everything(count, rate):
    positions = Sharing(count=count).positions(3, 1, 100, rate)
    assert positions.tolist() == (list(range(100)) if rate else [])


def test_draws_do_not_depend_on_the_order_of_calls_or_on_torch_s_generator():
    def draws(order):
        torch.manual_seed(order)
        sharing = Sharing(seed=2, count="random")
        calls = list(itertools.product(range(4), range(3)))
        if order:
            calls.reverse()
        found = {}
        for step, panel in calls:
            torch.rand(order + 1)
            found[step, panel] = (
                sharing.positions(step, panel, 64, 0.5).tolist(),
                sharing.shares(step, 50, LAYERS[panel]),
            )
        return found

    assert draws(0) == draws(1)


def test_drawing_leaves_torch_s_generator_as_it_is():
    before = torch.get_rng_state()
    Sharing().positions(0, 0, 64, 0.5)
    Sharing().shares(2, 50, LAYERS[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_forever():
    """A saved workflow's picture depends on them."""
    sharing = Sharing(seed=1)
    gates = "".join(str(int(sharing.shares(2, 50, layer))) for layer in LAYERS)
    assert gates == GATES
    assert sharing.positions(2, 1, 16, 0.5).tolist() == FIXED
    assert Sharing(seed=1, count="random").positions(2, 1, 16, 0.5).tolist() == RANDOM


GATES = "111111110111111010101111101110"
FIXED = [2, 5, 7, 8, 11, 12, 14, 15]
RANDOM = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]


# Rates and errors


@pytest.mark.parametrize("apart, rate", [(1, 0.6), (2, 0.6), (4, 0.2), (8, 0.2)])
def test_tokens_of_32_pixels_or_more_have_the_coarse_rate(apart, rate):
    assert Sharing(rate_32=0.2, rate_64=0.6).rate(apart) == rate


@pytest.mark.parametrize("name", ["rate_32", "rate_64", "plain_early", "plain_late"])
@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan])
def test_shares_outside_0_to_1_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}. Choose a value from 0 to 1."):
        Sharing(**{name: value})


@pytest.mark.parametrize(
    "name, known", [("count", "fixed, random"), ("warm_up", "plain, full_bank"), ("unit", "steps, fractions")]
)
def test_unknown_words_are_refused(name, known):
    with pytest.raises(ValueError, match=f"{name} is 'other'. Choose one of: {known}."):
        Sharing(**{name: "other"})


# The arithmetic


def softmax_attention(queries, keys, values):
    return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1) @ values


def drawn_tokens(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("more", [0, 5], ids=["own tokens", "further tokens"])
def test_a_panel_sees_its_own_tokens_and_the_sampled_ones_of_its_group(more):
    panels, tokens, groups = 3, 6, 2
    queries = drawn_tokens(groups * panels, tokens, 8, seed=0)
    keys, values = (drawn_tokens(groups * panels, tokens + more, 8, seed=seed) for seed in (1, 2))
    positions = [torch.tensor([0, 4]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 2, 5])]
    expected = torch.empty_like(queries)
    for row in range(groups * panels):
        group, panel = divmod(row, panels)
        seen = [(row, token) for token in range(tokens + more)]
        seen += [(group * panels + o, t) for o in range(panels) if o != panel for t in positions[o].tolist()]
        where = tuple(zip(*seen))
        gathered = [part[list(where[0]), list(where[1])] for part in (keys, values)]
        expected[row] = softmax_attention(queries[row], *gathered)
    found = attend_panels(queries, keys, values, positions, softmax_attention)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_all_tokens_are_attention_over_the_flattened_panels():
    queries, keys, values = (drawn_tokens(4, 5, 8, seed=seed) for seed in range(3))
    found = attend_panels(queries, keys, values, [torch.arange(5)] * 4, softmax_attention)
    whole = softmax_attention(*(part.reshape(1, 20, 8) for part in (queries, keys, values))).reshape(4, 5, 8)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_inputs_are_left_as_they_are():
    queries, keys, values = (drawn_tokens(4, 5, 8, seed=seed) for seed in range(3))
    copies = [part.clone() for part in (queries, keys, values)]
    attend_panels(queries, keys, values, [torch.tensor([0, 2])] * 2, softmax_attention)
    assert all(torch.equal(part, copy) for part, copy in zip((queries, keys, values), copies))


def test_sampled_tokens_are_one_panel_after_the_other():
    tokens = torch.arange(12.0).reshape(3, 4, 1)
    positions = [torch.tensor([1]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 3])]
    assert sample_tokens(tokens, positions).flatten().tolist() == [1.0, 8.0, 11.0]
