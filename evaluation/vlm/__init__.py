"""Benchmarks of vision-language models: from the benchmark's own files and a model's answers to figures with intervals."""
