"""Notices of a cloud that a machine goes away: its end-points, and what their answers mean. Imports no Ray."""
