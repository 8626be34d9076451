"""The captions of the built-in world: sentences, their parser, their tokens."""

import pytest
import torch

from fastlightgen.world.captions import WORDS, caption, parse, tokenise
from fastlightgen.world.shapes import Shapes


def test_parse_inverts_the_captions():
    assert all(caption(*parse(text)) == text for text in Shapes().batch(range(256)).captions)
    assert parse("a red ball moves right fast then turns up with a blue cross") == (0, 0, 0, 1, 3, (2, 2))
    for bad in ("a red ball", "a red ball moves right fast then turns right", "a mauve ball moves up fast then stops"):
        with pytest.raises(ValueError, match="caption: got .*wanted a sentence like"):
            parse(bad)


def test_tokens():
    text, lengths = tokenise(["a red ball moves up fast then stops", ""])
    assert text.shape == (2, 16, 48) and text.dtype == torch.float32 and lengths.tolist() == [9, 1]
    assert not text[0, 9:].any() and not text[1, 1:].any()
    assert torch.equal(text[0, 8, :32], text[1, 0, :32])  # both end with the end token
    every, n = tokenise([" ".join(WORDS[:9]), " ".join(WORDS[10:])])
    words = torch.cat([every[0, :10], every[1, : n[1] - 1]])
    assert torch.equal(words[:, :32] @ words[:, :32].T, 32 * torch.eye(len(WORDS)))
    assert words[:, 32:].square().mean() == 1  # unit root mean square of both parts


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="unknown word 'mauve'.*purple"):
        tokenise(["a mauve ball"])
    with pytest.raises(ValueError, match="got 16 words, wanted at most 15"):
        tokenise(["a " * 16])
