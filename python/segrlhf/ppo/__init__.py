"""Policies from reward models."""
