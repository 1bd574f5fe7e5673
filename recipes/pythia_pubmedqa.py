"""Federated LoRA fine-tuning of Pythia-1B on PubMedQA, under attack, and defended (Experiment 9 of FedSecurity).

accelerate launch recipes/pythia_pubmedqa.py [--config FILE] [--resume] [key=value ...]

Three arms from the same seeds: `benign`, `attacked` (one byzantine client of seven sends noise) and `defended` (the
same under m-Krum). Each round, every client fine-tunes the server's adapter on its own share of the data, the server
admits, defends and averages what it receives, and tests the result. Everything is in the run's folder afterwards.
"""

import argparse
import sys
from pathlib import Path

from fedllm_sec.federation.command import run_recipe

CONFIG = Path(__file__).parent.parent / "configs" / "exp09_pythia_pubmedqa.yaml"


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field, e.g. federation.rounds=3")
    given = parser.parse_intermixed_args()
    return run_recipe(given.config, given.overrides, resume=given.resume)


if __name__ == "__main__":
    sys.exit(main())
