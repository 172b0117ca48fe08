"""What data generation takes from the machine: the pictures that come with scikit-learn, and its cores."""

from __future__ import annotations

import os

from .storage import DataError


def sklearn_datasets():
    """Returns the module sklearn.datasets, which carries real pictures in its wheel; raises DataError without it."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("the digits and the photograph come with scikit-learn; pip install scikit-learn") from error
    return datasets


def available_cores() -> int:
    """Returns the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
