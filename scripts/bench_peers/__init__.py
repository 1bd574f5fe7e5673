"""Parts of `scripts/bench_federation.py`: one federation of small models, run by several systems in child processes."""
