"""`python -m sbert_fast` is `sbert-fast`."""

from __future__ import annotations

from sbert_fast.cli import main

raise SystemExit(main())
