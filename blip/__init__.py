"""BLIP: bootstrapping language-image pre-training (Li et al., ICML 2022), from shards to captions."""

__version__ = "0.1.0"
