"""What the losses over several devices send, hold and take: on paper, counted, and measured.

`plan` has the formulas, `simulated` counts what a run does that stands for one of many ranks,
`measured` times two processes of this machine. ``python -m benchmarks.devices`` writes all of it.
"""
