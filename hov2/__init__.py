"""hov2: a small, readable implementation of HumanOmniV2 (arXiv 2506.21277)."""
