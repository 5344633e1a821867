"""Code that was written for other trainers, as it stands: a Task around it.

Here: a LightningModule, a model of Hugging Face transformers. What cannot be honoured is refused by name. Data sets of other
libraries are sources (`data/sources`). Not here: anything of the engine, which knows no adapter.
"""
