"""RefCOCOg: RefCOCO's files with other expressions; test_refcoco.py has all that they share."""

from __future__ import annotations

from tests.evaluation.benchmarks.test_refcoco import official

OFFICIAL = official("4,896")
