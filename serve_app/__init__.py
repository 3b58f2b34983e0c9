"""Serve long-context language models with local attention on vLLM and Ray Serve."""
