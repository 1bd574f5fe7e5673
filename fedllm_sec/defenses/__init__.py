"""Defenses, filed by what a method needs to see.

geometry: the Gram matrix only. coordinates: each block of columns. residuals: the same twice. history: a memory on
disk. finishing: the aggregate. client_side: a client's own training. upload: what a client sends.
"""

from fedllm_sec.defenses import client_side as client_side
from fedllm_sec.defenses import coordinates as coordinates
from fedllm_sec.defenses import finishing as finishing
from fedllm_sec.defenses import geometry as geometry
from fedllm_sec.defenses import history as history
from fedllm_sec.defenses import residuals as residuals
from fedllm_sec.defenses import upload as upload
