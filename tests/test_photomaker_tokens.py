"""Prompts with a trigger word: the tokens that the original feeds to SDXL's encoders, and where ours go further."""

import json
from pathlib import Path

import comfy.sdxl_clip
import pytest
import torch
from safetensors.torch import save_file

from consistent_video.faces.class_tokens import expand, read_prompt, room, without_triggers

GOLDENS = Path(__file__).parent / "goldens" / "storydiffusion_A"
CASES = json.loads((GOLDENS / "photomaker_tokenization.json").read_text(encoding="utf-8"))["cases"]
START, END = 49406, 49407
TOKENS_PER_PICTURE = {"v1": 1, "v2": 2}
# What the original loses in long prompts: the end token, class tokens, or the person altogether.
LONG = "very detailed scenery "


@pytest.fixture(scope="module")
def tokenizer():
    return comfy.sdxl_clip.SDXLTokenizer()


def tokenise(tokenizer, text, repeats=1, **kwargs):
    prompt = read_prompt(tokenizer, text, **kwargs)
    repeats = [repeats] * prompt.persons if isinstance(repeats, int) else repeats
    return prompt, expand(tokenizer, prompt, repeats)


def ids(tokens, encoder="l"):
    assert len(tokens[encoder]) == 1
    return [token for token, _ in tokens[encoder][0]]


def words(tokenizer, tokens, encoder="l"):
    """The tokens between start and end as text, with their weights."""
    between = tokens[encoder][0][1 : ids(tokens, encoder).index(END)]
    return [(tokenizer.clip_l.inv_vocab[token].removesuffix("</w>"), weight) for token, weight in between]


def repeats_of(case):
    return case["num_id_images"] * TOKENS_PER_PICTURE[case["version"]]


def padded(case, encoder):
    found = case[f"ids_clip_{encoder}"]
    return found + [case[f"ids_clip_{encoder}_pad"]] * (case[f"ids_clip_{encoder}_len"] - len(found))


def is_short(case):
    return LONG * 3 not in case["prompt"]


GOOD = [case for case in CASES if "error" not in case and is_short(case) and case["class_positions"][0] > 0]
LONG_CASES = [case for case in CASES if not is_short(case)]


def test_the_tokens_are_the_originals(tokenizer):
    assert len(GOOD) == 55
    for case in GOOD:
        prompt, found = tokenise(tokenizer, case["prompt"], repeats_of(case), trigger=case["trigger"])
        assert ids(found.tokens, "l") == padded(case, "l"), case["prompt"]
        assert ids(found.tokens, "g") == padded(case, "g"), case["prompt"]
        assert found.positions == [case["class_positions"]]
        text_only = without_triggers(tokenizer, prompt)
        expected = case["text_only_ids"]
        assert ids(text_only, "l") == expected + [END] * (77 - len(expected))
        assert ids(text_only, "g") == expected + [0] * (77 - len(expected))


def test_texts_that_the_original_refuses_are_refused(tokenizer):
    refused = [case for case in CASES if "error" in case and is_short(case)]
    assert len(refused) == 18
    for case in refused:
        with pytest.raises(ValueError, match="has no trigger word 'img'|has 2 trigger words 'img', expected one"):
            read_prompt(tokenizer, case["prompt"])


def test_a_trigger_at_the_start_is_refused(tokenizer):
    first = [case for case in CASES if case.get("class_positions") == [0]]
    assert first
    with pytest.raises(ValueError, match="no word before a trigger word 'img' in 'img man walking'"):
        read_prompt(tokenizer, first[0]["prompt"])
    with pytest.raises(ValueError, match="no word before a trigger word"):
        read_prompt(tokenizer, "a man img img", several=True)


def test_long_texts_keep_class_tokens_and_end(tokenizer):
    assert len(LONG_CASES) == 18
    for case in LONG_CASES:
        repeats = repeats_of(case)
        prompt, found = tokenise(tokenizer, case["prompt"], repeats)
        trigger = prompt.sequences["l"].index(None)
        before = [token for token, _ in prompt.sequences["l"][: trigger - 1]]
        class_token = prompt.sequences["l"][trigger - 1][0]
        after = [token for token, _ in prompt.sequences["l"][trigger + 1 :]]
        text = 75 - repeats
        kept_before = before[:text]
        expected = [*kept_before, *[class_token] * repeats, *after[: text - len(kept_before)]]
        for encoder in ("l", "g"):
            assert ids(found.tokens, encoder) == [START, *expected, END]
        first = 1 + len(kept_before)
        assert found.positions == [list(range(first, first + repeats))]
        text_only = ids(without_triggers(tokenizer, prompt))
        assert text_only == [START, *[*before, class_token, *after][:75], END]


def test_early_class_words_of_long_texts_are_the_originals_but_for_the_end(tokenizer):
    cases = [case for case in LONG_CASES if case["prompt"].startswith("a man img") and "error" not in case]
    assert len(cases) == 6
    for case in cases:
        _, found = tokenise(tokenizer, case["prompt"], repeats_of(case))
        assert found.positions == [case["class_positions"]]
        assert ids(found.tokens)[:76] == padded(case, "l")[:76]


def test_a_cut_is_told(tokenizer, caplog):
    tokenise(tokenizer, "a man img " + LONG * 25, 4)
    assert caplog.messages == ["PhotoMaker: the last 5 tokens of the text do not fit beside the class tokens."]
    caplog.clear()
    tokenise(tokenizer, "a man img in the park", 4)
    assert caplog.messages == []


def test_weights_stay_with_their_words(tokenizer):
    _, found = tokenise(tokenizer, "(a man img:1.2) in a (dark:0.5) \\(old\\) park", 2)
    assert found.positions == [[2, 3]]
    assert words(tokenizer, found.tokens) == [
        ("a", 1.2),
        ("man", 1.2),
        ("man", 1.2),
        ("in", 1.0),
        ("a", 1.0),
        ("dark", 0.5),
        ("(", 1.0),
        ("old", 1.0),
        (")", 1.0),
        ("park", 1.0),
    ]
    _, found = tokenise(tokenizer, "a (very:1.3) old (man:1.1) img smiling", 2)
    assert found.positions == [[4, 5]]
    assert words(tokenizer, found.tokens, "g")[3:] == [("man", 1.1), ("man", 1.1), ("smiling", 1.0)]


def test_trigger_words_can_be_chosen(tokenizer):
    _, found = tokenise(tokenizer, "photograph of a man photomaker, smiling", 2, trigger="photomaker")
    assert found.positions == [[4, 5]]
    assert words(tokenizer, found.tokens)[3:6] == [("man", 1.0), ("man", 1.0), (",", 1.0)]
    text = "a man img1 and a woman img10"
    _, found = tokenise(tokenizer, text, [1, 3], trigger=["img1", "img10"], several=True)
    assert found.positions == [[2], [5, 6, 7]]
    assert [word for word, _ in words(tokenizer, found.tokens)] == ["a", "man", "and", "a", *["woman"] * 3]


def test_several_persons_have_their_own_positions(tokenizer):
    prompt, found = tokenise(tokenizer, "a man img and a woman img", [2, 1], several=True)
    assert prompt.persons == 2 and found.positions == [[2, 3], [6]]
    assert [word for word, _ in words(tokenizer, without_triggers(tokenizer, prompt))] == "a man and a woman".split()
    long = "a man img " + LONG * 30 + "and a woman img"
    _, found = tokenise(tokenizer, long, [2, 3], several=True)
    assert found.positions == [[2, 3], [73, 74, 75]]


def test_too_many_class_tokens_are_refused(tokenizer):
    prompt = read_prompt(tokenizer, "a man img")
    assert room(tokenizer) == 75
    assert expand(tokenizer, prompt, [75]).positions == [list(range(1, 76))]
    with pytest.raises(ValueError, match="need 76 class tokens, but a text has room for 75. Use fewer"):
        expand(tokenizer, prompt, [76])


@pytest.mark.parametrize("word", ["", "two words", "(img)", "im\\g"])
def test_unusable_trigger_words_are_refused(tokenizer, word):
    with pytest.raises(ValueError, match="trigger word '.*' is empty or has spaces"):
        read_prompt(tokenizer, "a man img", trigger=word)
    with pytest.raises(ValueError, match="There is no trigger word"):
        read_prompt(tokenizer, "a man img", trigger=[])


@pytest.fixture
def embeddings(tmp_path):
    """A tokenizer that knows two embeddings, one for both text encoders and one for the first."""
    both = {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}
    save_file(both, tmp_path / "img_style.safetensors")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "older.safetensors")
    return comfy.sdxl_clip.SDXLTokenizer(embedding_directory=[str(tmp_path)])


def test_embeddings_are_kept_whole(embeddings):
    prompt, found = tokenise(embeddings, "(embedding:img_style:1.1) a man img in embedding:img_style", 2)
    assert prompt.persons == 1 and found.positions == [[4, 5]]
    for encoder, width in (("l", 768), ("g", 1280)):
        tokens = found.tokens[encoder][0]
        vectors = [index for index, (token, _) in enumerate(tokens) if isinstance(token, torch.Tensor)]
        assert vectors == [1, 2, 7, 8] and [tokens[index][1] for index in vectors] == [1.1, 1.1, 1.0, 1.0]
        assert {len(tokens[index][0]) for index in vectors} == {width}


def test_embeddings_of_one_encoder_must_follow_the_class_word(embeddings):
    prompt = read_prompt(embeddings, "embedding:older a man img")
    with pytest.raises(ValueError, match=r"different positions: \[\[4\]\] and \[\[2\]\]. An embedding before it"):
        expand(embeddings, prompt, [1])
    _, found = tokenise(embeddings, "a man img embedding:older", 1)
    assert found.positions == [[2]]
    assert len(found.tokens["g"][0]) == len(found.tokens["l"][0]) == 77
