"""Tests mirror the source: tests/pipeline/ROOM tests pipeline/ROOM. Beside them integration/, gpu/, what they share."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
