"""What takes the place of a class of sentence-transformers.

The room has the library's name because BERTopic, KeyBERT and others look for it in the name of a
model's type: a model that they do not recognise they replace by another, without a word.
"""
