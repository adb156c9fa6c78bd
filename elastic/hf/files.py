"""Names of the small files that `from_pretrained` needs beside weights."""

#: Under this name a job's checkpoints have them, as texts by name of file.
FILES = "huggingface"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
