"""`transformers.TrainerCallback`s for clients of a federation; each is usable alone, with any `Trainer`.

Where several change weights, they act in the order in which they are given: first clip, then add noise, then submit.
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
