"""Federated LoRA fine-tuning of Pythia-1B on PubMedQA, under attack, and defended (Experiment 9 of FedSecurity).

accelerate launch recipes/pythia_pubmedqa.py [--config FILE] [--resume] [key=value ...]

Three arms from the same seeds: `benign`, `attacked` (one byzantine client of seven sends noise) and `defended` (the
same under m-Krum). Each round, every client fine-tunes the server's adapter on its own share of the data, the server
admits, defends and averages what it receives, and tests the result. Everything is in the run's folder afterwards.
"""

import sys
from pathlib import Path

from fedllm_sec.federation.command import run_script

CONFIG = Path(__file__).parent.parent / "configs" / "exp09_pythia_pubmedqa.yaml"

if __name__ == "__main__":
    sys.exit(run_script(__doc__, CONFIG))
