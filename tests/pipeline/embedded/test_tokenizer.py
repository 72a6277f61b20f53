"""The embedded model's tokenizer, and the captions that its training draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import CLIPTokenizer

from fpe_pipeline.embedded.scenes import scenes
from fpe_pipeline.embedded.training.captions import Captions
from fpe_pipeline.embedded.training.tokenizer import MAX_LENGTH, build_tokenizer, caption_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


class TestTokenizer:
    def test_loads_as_clip_and_makes_one_token_of_each_caption_word(self, folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == MAX_LENGTH
        for word in caption_words():
            assert len(tokenizer(word).input_ids) == 3, word

    def test_round_trip(self, folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        text = "a photo of a purple mushroom in the meadow"
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text

    @pytest.mark.parametrize("text", ["", "Über 漢字 🙂", "a crimson zeppelin, 42!", "x" * 500])
    def test_any_text_becomes_tokens(self, folder, text):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == MAX_LENGTH and max(ids) < len(tokenizer)


class TestCaptions:
    def test_captions_are_those_of_the_table_with_their_shares(self, folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        table, triple = Captions(tokenizer, "cpu"), ("fish", "orange", "snow")
        wordings = dict(scenes.captions(*triple))
        assert sum(wordings.values()) == pytest.approx(1.0)
        place = scenes.triples().index(triple)
        assert place == (7 * table.counts[1] + 1) * table.counts[2] + 3
        count = 4000
        labels = torch.tensor([[7, 1, 3]]).repeat(count, 1)
        tokens = table.draw(labels, torch.Generator().manual_seed(0))
        whole = tokenizer(list(wordings), padding="max_length", max_length=MAX_LENGTH).input_ids
        assert {tuple(ids) for ids in tokens.tolist()} == {tuple(ids) for ids in whole}
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        drawn = Counter(text.replace(" ,", ",") for text in texts)
        assert set(drawn) == set(wordings)
        for text, share in wordings.items():  # within five standard deviations
            assert abs(drawn[text] - count * share) < 5 * (count * share) ** 0.5, text
        dropped = table.draw(labels, torch.Generator().manual_seed(0), drop=0.25)
        assert (dropped == torch.tensor(tokenizer("", padding="max_length").input_ids)).all(dim=1).float().mean() == (
            pytest.approx(0.25, abs=5 * (0.25 * 0.75 / count) ** 0.5)
        )
