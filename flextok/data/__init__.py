"""Data: any torch data set in, batches out.

sets.py takes any data set, datasets.py and web.py have the named ones, stream.py orders training
samples so that a run resumes exactly. parts.py is the store in which caches and evaluations lie;
tokens.py and text.py cache indices and captions in it.
"""
