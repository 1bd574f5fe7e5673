"""One client of a federation with TRL's `SFTTrainer`: train, keep within a ball, say what leaks, submit.

python recipes/trl_client.py MODEL DATA FOLDER          (pip install trl)

MODEL is a hub id or a folder, DATA a .jsonl file with `prompt` and `completion` (or `messages`, or `text`), FOLDER
where the update goes. Send FOLDER to the server; `fedllm-sec aggregate` takes many of them.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from fedllm_sec.callbacks import ClipUpdate, LeakageProbe, SubmitUpdate


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "folder"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--norm", type=float, default=1.0, help="the longest update, in the units of the weights")
    given = parser.parse_args()

    gpu = torch.cuda.is_available()
    how = {"max_steps": given.steps, "bf16": gpu, "use_cpu": not gpu, "save_strategy": "no", "report_to": []}
    trainer = SFTTrainer(
        model=given.model,
        args=SFTConfig(output_dir="trl_client", **how),
        train_dataset=load_dataset("json", data_files=given.data, split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16),
    )
    probe = LeakageProbe(log=trainer.log)
    for callback in (ClipUpdate(given.norm), probe, SubmitUpdate(given.folder)):
        trainer.add_callback(callback)  # they act in this order
    trainer.train()
    print("what the submitted update reveals:", probe.history[-1])


if __name__ == "__main__":
    main()
