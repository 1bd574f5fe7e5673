"""Attacks: model poisoning."""

from fedllm_sec.attacks import byzantine as byzantine
