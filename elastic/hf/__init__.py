"""Jobs that fine-tune models of Hugging Face: from a folder or a name on the hub, and from `TrainingArguments`.

They need `pip install 'elastic-train[hf]'`; nothing of it is imported before a job is used.
"""

from elastic.hf.arguments import from_arguments
from elastic.hf.job import CausalLM, Classifier

__all__ = ["CausalLM", "Classifier", "from_arguments"]
