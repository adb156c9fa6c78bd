"""Sweeps: Ray Tune over elastic runs. `elastic.sweep.config.SweepConfig` and `elastic.sweep.driver.run_sweep`."""
