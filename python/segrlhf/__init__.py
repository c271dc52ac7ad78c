"""segrlhf: preference pairs to segment reward model, normaliser and PPO policy."""
