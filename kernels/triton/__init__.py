"""Triton kernels of sbert_fast, one op per file.

This folder is installed as the package ``sbert_fast.kernels`` (``package_dir`` in ``setup.py``).
The parent folder has no ``__init__.py`` on purpose: a top-level package called ``kernels`` would
shadow Hugging Face's package of that name, which transformers imports.
"""
