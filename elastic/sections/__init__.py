"""The sections of a run's options: frozen dataclasses, each checked by itself when it is made."""
