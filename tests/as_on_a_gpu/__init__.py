"""Execute the GPU code path without a GPU: `python -m tests.as_on_a_gpu`."""
