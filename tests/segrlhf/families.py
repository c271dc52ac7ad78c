"""Small models of many families, and a batch for them."""

import torch
from transformers import AutoConfig

SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


# Family -> what differs from SMALL. None drops a setting.
FAMILIES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 1.0},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"head_dim": None, "num_kv_heads": 1},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "starcoder2": {},
    "stablelm": {"num_key_value_heads": 2},
    "smollm3": {},
    "glm4": {},
    "biogpt": {},
    "deepseek_v3": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "num_key_value_heads": 2,
        "head_dim": None,
        "first_k_dense_replace": 1,
    },
}


# Families without a sequence-classification class in transformers.
BARE_FAMILIES: dict[str, dict] = {
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
}


SCALED = {"gemma2", "cohere", "granite"}  # logits are not lm_head(hidden)


def small_config(family: str):
    changes = (FAMILIES | BARE_FAMILIES)[family]
    settings = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    return AutoConfig.for_model(family, **settings)


def batch(generator_seed: int = 0, vocab: int = 99):
    """(input_ids, attention_mask, action_mask), right padding, rows of 9, 5 and 3 tokens."""
    generator = torch.Generator().manual_seed(generator_seed)
    ids = torch.randint(3, vocab, (3, 9), generator=generator)
    attention = torch.ones(3, 9, dtype=torch.long)
    for row, length in enumerate([9, 5, 3]):
        attention[row, length:] = 0
    ids[attention == 0] = 0
    action = attention.bool()
    action[:, :2] = False
    return ids, attention, action


def left(tensor: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The same rows with their padding in front."""
    shift = (attention == 0).sum(-1)
    return torch.stack([row.roll(int(n)) for row, n in zip(tensor, shift, strict=True)])
