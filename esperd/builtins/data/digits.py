"""The digits of scikit-learn: they come inside its wheel, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esperd.errors import MissingExtra


def digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Load 1,797 handwritten digits as one set, to be divided by the job's ``[split]``.

    Returns:
        Images (N, 1, 8, 8), float32 in 0 to 1, and labels (N,), int64 in 0 to 9.

    Raises:
        MissingExtra: when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra(
            'the data set "digits" comes from scikit-learn, not installed here; run: pip install "esperd[digits]"',
            extra="digits",
        ) from error
    images, labels = load_digits(return_X_y=True)
    pixels = images.reshape(-1, 1, 8, 8).astype(np.float32) / np.float32(16.0)  # 16 grey levels
    return pixels, labels.astype(np.int64)
