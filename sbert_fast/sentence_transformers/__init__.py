"""Classes that take the place of classes of sentence-transformers.

This package has the library's name because BERTopic, KeyBERT and others look for it in the name of
a model's type: they silently replace a model that they do not recognise by another.
"""
