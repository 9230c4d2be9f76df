"""Numba compiles a kernel anew when its own file has changed, not when kernels.py has, which it may
call into. So what was compiled before the last change of kernels.py is forgotten.
"""

from pathlib import Path

from beingvl.vbpe import kernels

_source = Path(kernels.__file__)
for _index in _source.parent.glob("__pycache__/*.nbi"):
    if _index.stat().st_mtime < _source.stat().st_mtime:
        _index.unlink(missing_ok=True)  # another worker may be first
