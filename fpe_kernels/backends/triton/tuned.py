"""What was measured faster than the rules of :mod:`.configs`; written by ``python -m benchmarks.tune --apply ROWS``."""

from __future__ import annotations

FORWARD: dict[tuple[str, int, int, int], tuple[int, int, int, int, bool, bool, int, bool]] = {
    ("sm_90", 48, 48, 1024): (128, 128, 4, 2, False, True, 0, True),
    ("sm_90", 48, 48, 4096): (192, 128, 4, 2, False, False, 0, True),
    ("sm_90", 48, 48, 16384): (256, 64, 4, 3, False, False, 0, True),
    ("sm_90", 48, 80, 1024): (128, 128, 4, 2, False, True, 0, True),
    ("sm_90", 48, 80, 4096): (256, 64, 4, 3, False, False, 0, True),
    ("sm_90", 48, 80, 16384): (256, 64, 4, 3, False, False, 0, True),
    ("sm_90", 48, 160, 1024): (64, 64, 4, 3, False, False, 0, True),
    ("sm_90", 48, 160, 4096): (128, 64, 4, 3, False, True, 0, True),
    ("sm_90", 64, 64, 1024): (64, 64, 4, 3, False, False, 0, False),
    ("sm_90", 64, 64, 4096): (64, 64, 4, 3, False, False, 0, False),
    ("sm_90", 64, 64, 16384): (64, 64, 4, 3, False, False, 0, False),
    ("sm_90", 64, 128, 1024): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 64, 128, 4096): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 64, 128, 16384): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 64, 256, 1024): (64, 64, 4, 3, False, False, 0, True),
    ("sm_90", 64, 256, 4096): (128, 64, 4, 3, False, False, 0, True),
    ("sm_90", 80, 80, 256): (64, 128, 4, 2, False, False, 0, True),
    ("sm_90", 80, 80, 1024): (128, 128, 4, 2, False, True, 0, True),
    ("sm_90", 80, 80, 4096): (128, 128, 4, 2, False, True, 0, True),
    ("sm_90", 80, 80, 16384): (128, 128, 4, 2, False, True, 0, True),
    ("sm_90", 80, 160, 256): (64, 128, 4, 2, False, False, 0, True),
    ("sm_90", 80, 160, 1024): (128, 128, 4, 2, False, True, 0, True),
    ("sm_90", 80, 160, 4096): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 80, 160, 16384): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 80, 320, 1024): (64, 64, 4, 3, False, False, 0, True),
    ("sm_90", 80, 320, 4096): (128, 64, 4, 2, False, False, 0, True),
    ("sm_90", 128, 128, 1024): (64, 32, 4, 3, False, False, 0, False),
    ("sm_90", 128, 128, 4096): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 128, 128, 16384): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 128, 256, 1024): (128, 64, 4, 2, False, False, 0, True),
    ("sm_90", 128, 256, 4096): (128, 64, 4, 3, False, False, 0, True),
    ("sm_90", 128, 256, 16384): (128, 64, 4, 3, False, False, 0, True),
    ("sm_90", 160, 160, 256): (64, 128, 4, 2, False, False, 0, True),
    ("sm_90", 160, 160, 1024): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 160, 160, 4096): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 160, 160, 16384): (128, 128, 4, 2, False, False, 0, True),
    ("sm_90", 160, 320, 256): (64, 64, 4, 3, False, False, 0, True),
    ("sm_90", 160, 320, 1024): (64, 64, 4, 3, False, False, 0, True),
    ("sm_90", 160, 320, 4096): (128, 64, 4, 2, False, False, 0, True),
    ("sm_90", 160, 320, 16384): (128, 64, 4, 2, False, False, 0, True),
}
"""(architecture, head width, packed width, length class) -> the fields of a ``Config``, for 16-bit ``apply``."""

TOGETHER: dict[tuple[str, int, int, int], bool] = {}
"""(architecture, head width, widest packed width, length class) -> whether a mixed batch is one launch."""
