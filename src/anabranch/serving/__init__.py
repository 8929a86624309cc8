"""Serving: request -> device. An OpenAI-compatible engine for routed models."""
