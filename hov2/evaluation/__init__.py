"""Answers to held-out questions, their scores, and the published benchmarks."""
