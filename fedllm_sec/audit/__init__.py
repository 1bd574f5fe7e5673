"""Audit adapters before they are merged: what is malformed, smuggled, oversized, or unlike the others."""

from fedllm_sec.audit.findings import Audit as Audit
from fedllm_sec.audit.findings import Finding as Finding
from fedllm_sec.audit.findings import Rule as Rule
from fedllm_sec.audit.findings import Severity as Severity
from fedllm_sec.audit.policy import Policy as Policy
from fedllm_sec.audit.policy import read_policy as read_policy
from fedllm_sec.audit.rules import RULES as RULES
from fedllm_sec.audit.run import audit_adapters as audit_adapters
from fedllm_sec.audit.run import make_bank as make_bank
