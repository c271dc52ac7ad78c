"""A tiny language model, tokenizers and preference files, made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import small_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from segrlhf.data.tokenize import tokenize_pairs
from segrlhf.entropy_cache import build_entropy_cache

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory):
    """Nothing of a test run stays in, or comes from, the caches of the person who runs it."""
    import datasets

    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("caches")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
    patch.setenv("XDG_CACHE_HOME", str(root))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a byte-level tokenizer: 256 bytes, then <pad> 256, <s> 257, </s> 258, <|end|> 259."""

    def make(
        pad: bool = True, eos: bool = True, bos: bool = True, chat_template: str | None = None
    ) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<pad>", "<s>", "</s>", "<|end|>"])
        if bos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 257)]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<s>",
            eos_token="</s>" if eos else None,
            pad_token="<pad>" if pad else None,
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    """Its template ends a turn with <|end|> and a line break."""
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


def tiny_llama_config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": 260,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tiny_lm() -> LlamaForCausalLM:
    """A Llama of 16 x 2; its head is enlarged so that entropies vary along a text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_llama_config()).eval()
    with torch.no_grad():
        model.lm_head.weight *= 30.0
    return model


@pytest.fixture(scope="session")
def tiny_lm_dir(tiny_lm, tokenizer, tmp_path_factory) -> Path:
    """The tiny LM and its tokenizer, saved."""
    path = tmp_path_factory.mktemp("tiny_lm")
    tiny_lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory):
    """Directory of a small causal LM of a family, made once."""
    made = {}

    def directory(family: str):
        if family not in made:
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_config(small_config(family)).eval()
            with torch.no_grad():
                model.get_output_embeddings().weight *= 10.0
            model.save_pretrained(path)
            made[family] = path
        return made[family]

    return directory


@pytest.fixture(scope="session")
def pair_rows() -> list[dict[str, str]]:
    """24 preference rows on 8 prompts; the chosen one is polite."""
    things = ["tea", "milk", "rain", "snow", "a cat", "a dog", "the sea", "jam"]
    good, bad = ["Gladly: {}!", "Of course, {}.", "Yes, {} it is."], ["No.", "{}? Never", "Bah, {}"]
    return [
        {
            "prompt": f"Tell me about {thing}:",
            "chosen": " " + good[k].format(thing),
            "rejected": " " + bad[k].format(thing),
        }
        for thing in things
        for k in range(3)
    ]


@pytest.fixture(scope="session")
def pairs(pair_rows, tokenizer):
    """``pair_rows`` as token ids."""
    return tokenize_pairs(
        Dataset.from_list(pair_rows), tokenizer, max_length=48, max_prompt_length=40
    )[0]


@pytest.fixture
def build_cache(tiny_lm_dir, tokenizer, pairs, tmp_path):
    """Builds an entropy cache of ``pairs`` under the tiny LM."""

    def build(rows=pairs, model=tiny_lm_dir, **options):
        return build_entropy_cache(
            str(model), tokenizer, rows, cache_dir=tmp_path / "cache", **options
        )

    return build


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[dict]], Path]:
    def write(path: Path, rows: list[dict]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def pairs_file(pair_rows, write_jsonl, tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows)


@pytest.fixture(scope="session")
def prompts_file(pair_rows, write_jsonl, tmp_path_factory) -> Path:
    prompts = dict.fromkeys(row["prompt"] for row in pair_rows)
    rows = [{"prompt": prompt} for prompt in prompts]
    return write_jsonl(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The shared real data: SEGKERNELS_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("SEGKERNELS_DATA") or beside)
    if not path.is_dir():
        pytest.skip(f"no real data in {path}; set SEGKERNELS_DATA")
    return path
