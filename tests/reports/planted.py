"""Runs that no training made: configurations and metrics as the test wants them."""

import json

import yaml


def plant(folder, arms, claims=(), seed=0, **fields):
    """Write a run; `arms` has the accuracies of each arm from round 0 on, or whole rows."""
    folder.mkdir(parents=True)
    rows = {arm: [value if isinstance(value, dict) else row(value) for value in values] for arm, values in arms.items()}
    rounds = max(len(some) for some in rows.values()) - 1
    tree = {
        "name": "planted",
        "seed": seed,
        "scale": "laptop",
        "out": str(folder),
        "federation": {"rounds": rounds},
        "arms": {arm: {} for arm in arms},
        "claims": list(claims),
        **fields,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    for arm, some in rows.items():
        if some:
            (folder / arm).mkdir()
            lines = [json.dumps({"round": i, **one}) for i, one in enumerate(some)]
            (folder / arm / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def row(accuracy, loss=1.0, majority=0.1):
    """The metrics of a round."""
    return {"test_loss": loss, "accuracy": accuracy, "majority_accuracy": majority}
