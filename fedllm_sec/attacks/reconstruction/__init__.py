"""Passive attacks: what a curious server learns of a client's examples from the update that it sent."""

from fedllm_sec.attacks.reconstruction import dlg as dlg
from fedllm_sec.attacks.reconstruction import first_layer as first_layer
from fedllm_sec.attacks.reconstruction import inverting as inverting
from fedllm_sec.attacks.reconstruction import labels as labels
from fedllm_sec.attacks.reconstruction import lora_tokens as lora_tokens
from fedllm_sec.attacks.reconstruction import sentences as sentences
