"""The motion predictor's network against its formulas, written out in plain torch."""

import math

import pytest
import tiny_motion_predictor
import torch

from consistent_video.models.motion_predictor import MotionPredictor, linear_interpolation

FRAMES = 5
NAMES = ("start_embedding", "end_embedding", "start_tokens", "end_tokens")


def inputs_of(batch=2, tokens=7, width=64, vision=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, width), (batch, width), (batch, tokens, vision), (batch, tokens, vision))
    return {name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes)}


def by_hand(state, config, start_embedding, end_embedding, start_tokens, end_tokens, frames):
    """The forward pass in elementary operations, one pair of pictures at a time."""
    heads, width = config["num_attention_heads"], config["hidden_size"]

    def linear(x, name):
        bias = state.get(f"{name}.bias")
        return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(queries, context, name):
        parts = []
        sources = (queries, "to_q"), (context, "to_k"), (context, "to_v")
        q, k, v = (linear(x, f"{name}.{part}").chunk(heads, dim=-1) for x, part in sources)
        for head in range(heads):
            scores = q[head] @ k[head].T / math.sqrt(config["attention_head_dim"])
            parts.append(scores.softmax(-1) @ v[head])
        return linear(torch.cat(parts, dim=-1), f"{name}.to_out.0")

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def feed_forward(x, name):
        return linear(gelu(linear(x, f"{name}.net.0.proj")), f"{name}.net.2")

    def pool(picture):
        picture, queries = linear(picture, "image_tokens.proj_in"), state["image_tokens.latents"][0]
        for layer in range(config["image_token_layers"]):
            name = f"image_tokens.layers.{layer}"
            normed = norm(queries, f"{name}.ln1")
            context = torch.cat((norm(picture, f"{name}.ln0"), normed))
            queries = queries + attend(normed, context, f"{name}.attn")
            queries = queries + feed_forward(norm(queries, f"{name}.ff.0"), f"{name}.ff.1")
        return norm(linear(queries, "image_tokens.proj_out"), "image_tokens.norm_out")

    def between(start, end, frame):
        weight = frame / (frames - 1)
        return (1 - weight) * start + weight * end

    results = []
    for pair in range(len(start_embedding)):
        first, last = start_embedding[pair], end_embedding[pair]
        pooled = [pool(tokens[pair]) for tokens in (start_tokens, end_tokens)] if config["image_tokens"] else None
        rows = []
        for frame in range(frames):
            row = linear(between(first, last, frame)[None], "embedding_in")
            if pooled:
                row = torch.cat((row, between(*pooled, frame)))
            angles = [frame * 10000 ** (-2 * index / width) for index in range(width // 2)]
            waves = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
            rows.append(row + waves + state["token_positions"])
        hidden = torch.cat(rows)
        for layer in range(config["num_layers"]):
            name = f"blocks.{layer}"
            normed = norm(hidden, f"{name}.norm1")
            hidden = hidden + attend(normed, normed, f"{name}.attn")
            hidden = hidden + feed_forward(norm(hidden, f"{name}.norm2"), f"{name}.ff")
        predicted = [first]
        for frame in range(1, frames - 1):
            token = hidden[frame * (1 + config["image_tokens"])]
            predicted.append(between(first, last, frame) + linear(norm(token, "norm_out"), "embedding_out"))
        results.append(torch.stack([*predicted, last]))
    return torch.stack(results)


@pytest.mark.parametrize("settings", [{}, {"image_tokens": 0}, {"image_token_layers": 2, "hidden_size": 48}])
def test_forward_pass_is_the_formula(settings):
    network, inputs = tiny_motion_predictor.network(**settings), inputs_of()
    found = network(**inputs, frames=FRAMES)
    expected = by_hand(network.state_dict(), network.config, **inputs, frames=FRAMES)
    assert found.shape == (2, FRAMES, 64)
    assert (found - expected).abs().max() < 1e-5
    changed = found - linear_interpolation(inputs["start_embedding"], inputs["end_embedding"], FRAMES)
    assert changed[:, 1:-1].abs().amax(dim=(0, 2)).min() > 0.1


def test_interpolation_is_linear_and_exact_at_the_ends():
    start, end = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    found = linear_interpolation(start, end, 4)
    assert found.shape == (2, 4, 3, 64)
    assert torch.equal(found[:, 0], start) and torch.equal(found[:, -1], end)
    assert (found[:, 1] - (2 * start + end) / 3).abs().max() < 1e-6
    assert torch.equal(linear_interpolation(start, start, 7), start.unsqueeze(1).expand(-1, 7, -1, -1))
    half = linear_interpolation(start.half(), end.half(), 4)
    assert half.dtype == torch.half and (half - found).abs().max() < 1e-2
    with pytest.raises(ValueError, match="frames is 1. A transition has at least 2"):
        linear_interpolation(start, end, 1)


@pytest.mark.parametrize("frames", [2, 3, 16])
def test_untrained_network_is_exactly_linear_interpolation(frames):
    torch.manual_seed(0)
    network, inputs = MotionPredictor(**tiny_motion_predictor.CONFIG), inputs_of()
    expected = linear_interpolation(inputs["start_embedding"], inputs["end_embedding"], frames)
    assert torch.equal(network(**inputs, frames=frames), expected)


@pytest.mark.parametrize("frames", [2, 3, 16])
def test_first_and_last_frame_are_the_key_frames(frames):
    network, inputs = tiny_motion_predictor.network(), inputs_of()
    found = network(**inputs, frames=frames)
    assert torch.equal(found[:, 0], inputs["start_embedding"]) and torch.equal(found[:, -1], inputs["end_embedding"])


@pytest.mark.parametrize("image_tokens", [0, 3])
def test_after_one_step_every_parameter_learns(image_tokens):
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        network = MotionPredictor(**{**tiny_motion_predictor.CONFIG, "image_tokens": image_tokens})
        inputs = {name: value.clone() for name, value in inputs_of().items()}
        target = torch.randn(2, FRAMES, 64)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        learning, losses = [], []
        for _ in range(4):
            loss = (network(**inputs, frames=FRAMES) - target)[:, 1:-1].square().mean()
            optimizer.zero_grad()
            loss.backward()
            found = {name for name, parameter in network.named_parameters() if parameter.grad.abs().max() > 0}
            learning.append(found)
            losses.append(loss.item())
            optimizer.step()
    everything = {name for name, _ in network.named_parameters()}
    assert learning[0] == {"embedding_out.weight", "embedding_out.bias"}
    assert learning[1] == everything
    assert losses[-1] < losses[1] < losses[0]


def test_a_batch_is_its_pairs():
    network, inputs = tiny_motion_predictor.network(), inputs_of(batch=3)
    together = network(**inputs, frames=FRAMES)
    alone = [network(**{name: value[i : i + 1] for name, value in inputs.items()}, frames=FRAMES) for i in range(3)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_every_input_counts():
    network, inputs = tiny_motion_predictor.network(), inputs_of()
    found = network(**inputs, frames=FRAMES)
    for name in NAMES:
        other = network(**{**inputs, name: inputs[name].flip(-1)}, frames=FRAMES)
        assert (other - found)[:, 1:-1].abs().amax(dim=(0, 2)).min() > 1e-4, name
    without = tiny_motion_predictor.network(image_tokens=0)
    embeddings = {name: inputs[name] for name in NAMES[:2]}
    assert without(**embeddings, start_tokens=None, end_tokens=None, frames=3).shape == (2, 3, 64)


def test_published_size():
    """8 blocks of 11.5 million weights; pooling the pictures' tokens and the layers around come on top."""
    with torch.device("meta"):
        network = MotionPredictor()
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in (("all", network), ("blocks", network.blocks), ("image tokens", network.image_tokens))
    }
    assert counts == {"all": 143_008_768, "blocks": 92_348_416, "image tokens": 48_541_696}
    assert network.blocks[0].attn.to_q.weight.shape == (768, 1024)
    inputs = {name: value.to("meta") for name, value in inputs_of(width=1024, vision=1280, tokens=257).items()}
    assert network(**inputs, frames=16).shape == (2, 16, 1024)


@pytest.mark.parametrize(("frames", "words"), [(1, "frames is 1"), (9, "frames is 9, but .* makes 2 to 8")])
def test_clips_of_another_length_are_refused(frames, words):
    network = tiny_motion_predictor.network(max_frames=8)
    assert network(**inputs_of(), frames=8).shape == (2, 8, 64)
    with pytest.raises(ValueError, match=words):
        network(**inputs_of(), frames=frames)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"start_embedding": torch.zeros(2, 32), "end_embedding": torch.zeros(2, 32)}, r"two of \(batch, 64\)"),
        ({"end_embedding": torch.zeros(1, 64)}, r"\(2, 64\) and \(1, 64\)"),
        ({"start_tokens": None}, r"tokens are None and \(2, 7, 64\)"),
        ({"start_tokens": torch.zeros(1, 7, 64), "end_tokens": torch.zeros(1, 7, 64)}, r"two of \(2, tokens, 64\)"),
        ({"end_tokens": torch.zeros(2, 6, 64)}, r"\(2, 7, 64\) and \(2, 6, 64\)"),
        ({"start_tokens": torch.zeros(2, 7, 9), "end_tokens": torch.zeros(2, 7, 9)}, "have 9 values, .* needs 64"),
    ],
)
def test_tensors_of_another_shape_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        tiny_motion_predictor.network()(**{**inputs_of(), **changed}, frames=FRAMES)


@pytest.mark.parametrize(
    ("setting", "value"), [("num_layers", 0), ("num_layers", 10**9), ("hidden_size", 2), ("max_frames", "8")]
)
def test_sizes_outside_the_limits_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}, expected a whole number from"):
        MotionPredictor(**{**tiny_motion_predictor.CONFIG, setting: value})
