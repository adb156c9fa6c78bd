"""Every private name, and every name that differs between versions, of torch and of Ray.

No other module uses one (`tests/test_compat.py` looks). Each has a test that says what is relied on and fails where a
new version breaks it: `tests/test_compat_torch.py`, `tests/test_compat_ray.py`. The modules are apart from each other
by what they import: those of torch need no Ray; `ray` imports neither Ray Train nor Ray Tune, whose
imports take seconds; `ray_train` and `ray_tune` import those.
"""
