"""Jobs drawn at random, as strangers write them: layers, idioms, optimizers, data, and what happens to the run."""
