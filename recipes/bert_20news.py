"""Federated LoRA fine-tuning of BERT on 20 Newsgroups, with a backdoor, and defended (Experiment 8 of FedSecurity).

accelerate launch recipes/bert_20news.py [--config FILE] [--resume] [key=value ...]

Three arms from the same seeds: `benign`, `attacked` (one client of ten trains a backdoor and sends a model that is to
replace all others) and `defended` (the same under m-Krum). Beside the accuracy there is `attack_success`, the share of
test posts with the trigger that are given the adversary's group. Everything is in the run's folder afterwards.
"""

import sys
from pathlib import Path

from fedllm_sec.federation.command import run_script

CONFIG = Path(__file__).parent.parent / "configs" / "exp08_bert_20news.yaml"

if __name__ == "__main__":
    sys.exit(run_script(__doc__, CONFIG))
