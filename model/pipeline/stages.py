"""The four stages of a seed: each reads what the one before left in the run directory and leaves its own outputs.

A stage returns (flat metrics, names of its output files); pipeline.py times it and writes the record.
"""

from __future__ import annotations
