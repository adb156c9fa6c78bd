"""Every private name of torch and of Ray, and every name that differs between their versions.

No other module uses one (`tests/test_compat.py` checks). Each has a test of what is relied on, which fails if a new
version breaks it: `tests/test_compat_torch.py`, `tests/test_compat_ray.py`. The modules are divided by what they
import: those of torch need no Ray; `ray` imports neither Ray Train nor Ray Tune, which take seconds; `ray_train` and
`ray_tune` do.
"""
