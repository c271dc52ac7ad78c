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


SYSTEM_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|system|>Date: 26 Jul 2024\n{{ system }}<|end|>"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_system_header_of_the_template_is_left_out(make_tokenizer):
    """As Llama 3.1 has one: in every conversation, with the conversation's own inside it."""
    tokenizer = make_tokenizer(chat_template=SYSTEM_TEMPLATE)
    prompt = [{"role": "user", "content": "hi"}]
    header = "<s><|system|>Date: 26 Jul 2024\n<|end|>"
    whole, stripped = Renderer(tokenizer), Renderer(tokenizer, strip_system_header=True)
    assert whole.prompt_text(prompt) == header + "<|user|>hi<|end|><|assistant|>"
    assert stripped.prompt_text(prompt) == "<|user|>hi<|end|><|assistant|>"
    ids, (answer,) = stripped.pair(prompt, ["yes"])
    assert tokenizer.decode([*ids, *answer]) == "<|user|>hi<|end|><|assistant|>yes<|end|>"
    assert answer == whole.pair(prompt, ["yes"])[1][0]
    own = [{"role": "system", "content": "Be kind."}, *prompt]
    assert stripped.prompt_text(own) == whole.prompt_text(own)
    assert stripped.pair("plain", ["yes"]) == whole.pair("plain", ["yes"])


def test_a_template_whose_header_cannot_be_told(make_tokenizer):
    template = "{% for m in messages %}{{ loop.index }}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    renderer = Renderer(make_tokenizer(chat_template=template), strip_system_header=True)
    with pytest.raises(UserError, match=r"all turns of a user .* drop --strip_system_header"):
        renderer.prompt_text([{"role": "user", "content": "hi"}])
