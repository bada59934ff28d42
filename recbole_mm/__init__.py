"""RecBole-MM: multimodal and LLM recommenders as a plugin for RecBole."""

from recbole_mm.compat import restore_numpy_aliases

__version__ = "0.1.0"

restore_numpy_aliases()
