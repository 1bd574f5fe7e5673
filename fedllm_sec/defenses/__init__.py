"""Defenses, filed by what a method needs to see: geometry (the Gram matrix only)."""

from fedllm_sec.defenses import geometry as geometry
