"""What a training step costs, beside other steps of the same backbone: `benchmarks/cost.py`."""
