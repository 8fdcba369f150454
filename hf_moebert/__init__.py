"""Compress pre-trained transformers with the stock Hugging Face tools, and measure what it brought."""

__version__ = "0.1.0"
