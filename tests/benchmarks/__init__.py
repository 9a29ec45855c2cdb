"""What the design promises in numbers, measured: `python -m tests.benchmarks [names...] [--quick]`, or `make bench`.

Every number of ours stands beside a peer's, taken in the same run on the same machine: the rounds of all are
interleaved, and of each the best round counts. What is compared with the design is the ratio.
"""
