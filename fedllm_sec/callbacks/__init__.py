"""`transformers.TrainerCallback`s for clients of a federation; each is usable alone, with any `Trainer`.

Where several change weights, they act in the order in which they are given: first clip, then add noise, then submit.
All are tested with a stock `Trainer` in one process and, by `accelerate launch`, in two, under DeepSpeed ZeRO-2 and
ZeRO-3, on a 4-bit base, and with gradient accumulation; those that need gradients refuse DeepSpeed, which has used
them before a callback is called. What a malicious client does to its data is in `fedllm_sec.callbacks.data`. All of
them in a table: docs/callbacks.md.
"""

from fedllm_sec.callbacks.attacks import MaskGradient as MaskGradient
from fedllm_sec.callbacks.attacks import NoTraining as NoTraining
from fedllm_sec.callbacks.attacks import ProjectUpdate as ProjectUpdate
from fedllm_sec.callbacks.attacks import ReplaceModel as ReplaceModel
from fedllm_sec.callbacks.audit import AuditOnSave as AuditOnSave
from fedllm_sec.callbacks.defenses import AddNoise as AddNoise
from fedllm_sec.callbacks.defenses import ClipUpdate as ClipUpdate
from fedllm_sec.callbacks.defenses import FlWbcNoise as FlWbcNoise
from fedllm_sec.callbacks.defenses import FreezeA as FreezeA
from fedllm_sec.callbacks.probe import LeakageProbe as LeakageProbe
from fedllm_sec.callbacks.soteria import HideRepresentation as HideRepresentation
from fedllm_sec.callbacks.submit import SubmitUpdate as SubmitUpdate
