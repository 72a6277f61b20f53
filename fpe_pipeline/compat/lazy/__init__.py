"""An attention map that code written for the matrix can work on, without the matrix."""

from .lazy_map import LazyMap
from .numbers import MapNumbersWarning, summable

__all__ = ["LazyMap", "MapNumbersWarning", "summable"]
