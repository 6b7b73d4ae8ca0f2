"""Load a reference or policy for measuring, outside training and without an engine."""

from pathlib import Path
from typing import Any


def load_model(folder: Path) -> Any:
    """A transformers folder in float32 for inference, on the GPU where there is one."""
    import torch
    from transformers.utils import logging

    from pipeline.model.opening import open_model

    logging.disable_progress_bar()
    return open_model(folder, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
