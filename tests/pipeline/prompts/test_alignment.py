"""Which tokens stand for which: with the pipeline's tokenizer, and with tokenizers of other kinds."""

import pytest
import torch

from fpe_pipeline.prompts.alignment import TokenizedPrompt, align_refine, align_replace, tokenize


class SlowTokenizer:
    """Without offsets: words are cut into pieces of four letters at most."""

    is_fast = False
    model_max_length = 20
    all_special_ids = (0, 1)

    def __init__(self):
        self.pieces = ["<s>", "</s>"]

    def __call__(self, text, truncation, max_length):
        ids = [0]
        for word in text.lower().split():
            for start in range(0, len(word), 4):
                piece = word[start : start + 4]
                if piece not in self.pieces:
                    self.pieces.append(piece)
                ids.append(self.pieces.index(piece))
        return {"input_ids": [*ids[: max_length - 1], 1]}

    def decode(self, ids):
        return "".join(self.pieces[index] for index in ids) + " "


@pytest.fixture(params=["fast", "slow"])
def tokenizer(request, pipe):
    return pipe.tokenizer if request.param == "fast" else SlowTokenizer()


def test_words_cover_every_token(tokenizer):
    prompt = tokenize("A painting of a Squirrel eating", tokenizer)
    words = prompt.words
    assert [word.text for word in words] == ["A", "painting", "of", "a", "Squirrel", "eating"]
    assert [token for word in words for token in word.tokens] == list(range(1, len(prompt.spans) - 1))
    assert prompt.spans[0] is prompt.spans[-1] is None
    assert prompt.find("squirrel") == words[4].tokens
    assert prompt.find("a Squirrel") == (*words[3].tokens, *words[4].tokens)
    assert prompt.find("a") == (*words[0].tokens, *words[3].tokens)


def test_words_that_are_not_found(tokenizer):
    prompt = tokenize("a squirrel", tokenizer)
    for word in ("squ", "rel", "dog", ""):
        with pytest.raises(ValueError, match="is not in the prompt"):
            prompt.find(word)
        assert not prompt.contains(word)


def test_a_word_past_the_limit(tokenizer):
    prompt = tokenize("a " * 80 + "dog", tokenizer)
    with pytest.raises(ValueError, match="past the"):
        prompt.find("dog")
    assert len(prompt.spans) == tokenizer.model_max_length


def test_punctuation_and_scripts_without_blanks(pipe):
    prompt = tokenize("a cat, a dog's hat.", pipe.tokenizer)
    assert [word.text for word in prompt.words] == ["a", "cat", ",", "a", "dog's", "hat", "."]
    assert len(prompt.find("cat")) < len(prompt.find("cat, a"))
    written = TokenizedPrompt("一只猫坐着", tuple((i, i + 1) for i in range(5)), 8)
    assert written.find("猫") == (2,)


def characters(text):
    """A prompt of which every character is a token."""
    return TokenizedPrompt(text, tuple((i, i + 1) for i in range(len(text))), 24)


@pytest.mark.parametrize(
    ("text", "word", "places"),
    [
        ("une voiture répétée", "été", None),
        ("l'été arrive", "été", (2, 3, 4)),
        ("котёнок и кот", "кот", (10, 11, 12)),
        ("un cafe\u0301 noir", "caf\u00e9", (3, 4, 5, 6, 7)),
        ("un caf\u00e9 noir", "cafe\u0301", (3, 4, 5, 6)),
        ("un cafe\u0301 noir", "cafe", None),
        ("một con mèo", "me\u0300o", (8, 9, 10)),
        ("काली बिल्ली", "बिल", None),
        ("一只猫坐着", "猫", (2,)),
        ("一只cat坐着", "cat", (2, 3, 4)),
        ("고양이가 있다", "고양이", (0, 1, 2)),
        ("แมวสีดำ", "แมว", (0, 1, 2)),
        ("a-a-a", "A-a", (0, 1, 2, 3, 4)),
    ],
)
def test_whole_words_of_any_script(text, word, places):
    prompt = characters(text)
    assert prompt.contains(word) == (places is not None)
    if places is None:
        with pytest.raises(ValueError, match="is not in the prompt"):
            prompt.find(word)
    else:
        assert prompt.find(word) == places


def test_accents_of_their_own_belong_to_their_letters():
    composed, apart = characters("un caf\u00e9"), characters("un cafe\u0301")
    assert [word.text for word in apart.words] == ["un", "cafe\u0301"]
    assert align_refine(apart, composed).kept[list(composed.find("café"))].all()
    assert [word.text for word in characters("काली बिल्ली").words] == ["काली", "बिल्ली"]


def test_a_tokenizer_without_a_limit(pipe):
    class Unlimited(SlowTokenizer):
        model_max_length = int(1e30)

    assert tokenize("a cat", Unlimited()).length == 1024  # what pipelines give to a text encoder at most
    assert tokenize("a cat", Unlimited(), 12).length == 12


@pytest.mark.parametrize("swap", [False, True])
def test_replacing_moves_what_follows_and_keeps_rows_of_sum_one(tokenizer, swap):
    texts = ["a squirrel eats a nut", "a cat eats a nut"]
    source, target = (tokenize(text, tokenizer) for text in (texts[::-1] if swap else texts))
    alignment = align_replace(source, target)
    assert torch.equal(alignment.mapper.sum(1), torch.ones(source.length, dtype=torch.float64))
    assert torch.equal(alignment.kept, torch.ones(target.length, dtype=torch.float64))
    for word, other in zip(source.words, target.words, strict=True):
        block = alignment.mapper[list(word.tokens)][:, list(other.tokens)]
        torch.testing.assert_close(block.sum(1), torch.ones(len(word.tokens), dtype=torch.float64))
    end, other_end = len(source.spans) - 1, len(target.spans) - 1
    assert alignment.mapper[end, other_end] == alignment.mapper[end + 1, other_end + 1] == 1


def test_the_original_leaves_what_follows(tokenizer):
    source, target = (tokenize(text, tokenizer) for text in ("a squirrel eats", "a cat eats"))
    shift = len(source.spans) - len(target.spans)
    assert shift > 0
    eats = target.find("eats")[0]
    assert align_replace(source, target).mapper[eats + shift, eats] == 1
    original = align_replace(source, target, "original").mapper
    assert original[eats, eats] == 1
    assert original[eats + shift, eats] == 0


@pytest.mark.parametrize("compat", [None, "original"])
def test_refining_keeps_shared_words(tokenizer, compat):
    source, target = (tokenize(text, tokenizer) for text in ("a nut and a cat", "a big nut and a wooden cat"))
    alignment = align_refine(source, target, compat)
    new = [*target.find("big"), *target.find("wooden")]
    assert alignment.kept[new].tolist() == [0.0] * len(new)
    for word in ("nut", "and", "cat"):
        assert alignment.mapper[list(source.find(word)), list(target.find(word))].tolist() == [1.0] * len(
            source.find(word)
        )
    assert bool((alignment.mapper.sum(1) <= 1 + (compat is not None)).all())


def test_refining_may_leave_words_out(tokenizer):
    source, target = (tokenize(text, tokenizer) for text in ("a big brown cat sits", "a cat sits"))
    alignment = align_refine(source, target)
    assert alignment.mapper[list(source.find("cat")), list(target.find("cat"))].all()
    assert not alignment.mapper[list(source.find("brown"))].any()


def test_words_are_aligned_rather_than_pieces(tokenizer):
    """Two words may begin alike; the original would take half of one for half of the other."""
    source, target = (tokenize(text, tokenizer) for text in ("a squirrel", "a squirm"))
    assert not align_refine(source, target).kept[list(target.find("squirm"))].any()


def test_prompts_that_cannot_be_aligned(tokenizer):
    one, two, other = (tokenize(text, tokenizer) for text in ("a red car", "a car", "ducks"))
    with pytest.raises(ValueError, match="has 3, 'a car' has 2"):
        align_replace(one, two)
    with pytest.raises(ValueError, match="shares no word"):
        align_refine(one, other)
    with pytest.raises(ValueError, match="use one tokenizer"):
        align_refine(one, tokenize("a car", tokenizer, 10))


def test_a_pipeline_is_no_tokenizer():
    class Pipeline:
        def __call__(self, prompt):
            raise AssertionError("not to be run")

    with pytest.raises(TypeError, match=r"such as pipe\.tokenizer, got Pipeline"):
        tokenize("a cat", Pipeline())
