"""Training on plain torch: `torchrun -m mipha train ...` for several processes.

Read pipeline.py first, then loop.py.
"""
