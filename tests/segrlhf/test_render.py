"""Where a response begins and what ends it."""

import pytest

from segrlhf.data.render import Renderer, pad_token_id, stop_token_ids
from segrlhf.errors import UserError

PAD, BOS, EOS, TURN = 256, 257, 258, 259


def test_response_ids_are_those_after_the_prompt(tokenizer):
    """Where a token would reach across the border, the response stands on its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "▁a": 2, "▁": 3, "ab": 4, "</s>": 5, "▁b": 6}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b"), ("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    render = Renderer(tok)
    # alone, " a" would get a second space in front
    assert render.pair("b", [" a"]) == ([6], [[2, 5]])
    assert render.pair("ba", ["b"]) == ([6, 0], [[6, 5]])


def test_end_tokens(tokenizer, chat_tokenizer, make_tokenizer):
    assert stop_token_ids(tokenizer, conversational=False) == [EOS]
    assert stop_token_ids(chat_tokenizer, conversational=True) == [EOS, TURN]
    assert pad_token_id(tokenizer) == PAD
    assert pad_token_id(make_tokenizer(pad=False)) == EOS
    with pytest.raises(UserError, match=r"expected one with an EOS token.*set eos_token"):
        Renderer(make_tokenizer(eos=False))
