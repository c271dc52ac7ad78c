"""Reward models and language models."""
