"""The GPU's path executed without a GPU: `python -m tests.as_on_a_gpu`."""
