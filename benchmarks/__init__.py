"""Every claim of speed beside what a user would run instead: `python -m benchmarks`.

`python -m benchmarks` lists the benchmarks, `python -m benchmarks NAME --help` the options of one.
Their results are in `RESULTS.md`. This package may import every other one; none imports it.
"""
