"""What `scripts/measure_leakage.py` is made of."""
