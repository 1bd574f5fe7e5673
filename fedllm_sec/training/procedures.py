"""The local procedures of small models by name: supervised, GANs, architecture search."""

from fedllm_sec.training import adversarial as adversarial
from fedllm_sec.training import search as search
from fedllm_sec.training.procedure import Procedure as Procedure
from fedllm_sec.training.procedure import procedure as procedure
