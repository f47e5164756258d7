"""Programs that measure the claims: one file per claim, run as `python -m benchmarks.NAME`; see README.md."""
