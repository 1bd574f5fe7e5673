"""Attacks: model poisoning, data poisoning, and what updates reveal of the data (reconstruction)."""

from fedllm_sec.attacks import adaptive as adaptive
from fedllm_sec.attacks import alie as alie
from fedllm_sec.attacks import backdoor as backdoor
from fedllm_sec.attacks import byzantine as byzantine
from fedllm_sec.attacks import collusion as collusion
from fedllm_sec.attacks import dba as dba
from fedllm_sec.attacks import edge_case as edge_case
from fedllm_sec.attacks import fang as fang
from fedllm_sec.attacks import gauge as gauge
from fedllm_sec.attacks import label_flipping as label_flipping
from fedllm_sec.attacks import lazy_worker as lazy_worker
from fedllm_sec.attacks import model_replacement as model_replacement
from fedllm_sec.attacks import neurotoxin as neurotoxin
from fedllm_sec.attacks import optimised as optimised
from fedllm_sec.attacks import reconstruction as reconstruction
