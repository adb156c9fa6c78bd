"""The sections of a run's options: frozen dataclasses, each of which checks itself when it is made."""
