"""How fast and how small: training steps, memory and single ops, against the best baseline that can be written.

Run from the repository root:

    python -m benchmarks                 # everything below, then `python -m benchmarks.report` renews the README's tables
    python -m benchmarks.train_step      # seconds per training step, interleaved with the baselines; --model ng-t, also of memory
    python -m benchmarks.memory          # peak bytes per edge and per neuron, each measured in a fresh process
    python -m benchmarks.attention       # one attention beside those of PyTorch and PyG
    pytest benchmarks --benchmark-only   # single ops
    pytest benchmarks/tests              # the tests of the benchmarks themselves

benchmarks/README.md says how the numbers are taken and what they mean.
"""
