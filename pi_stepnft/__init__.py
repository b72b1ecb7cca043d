"""π-StepNFT: single-file reinforcement learning of flow-based vision-language-action policies (arXiv 2603.02083).

Everything lives under this one name: `from pi_stepnft import envs, policies`. In an installation the rooms (`algos`, `harness`,
`envs`, `policies`) stand inside this package; in a checkout they stand beside it, and are found there.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_beside = _Path(__file__).resolve().parents[1]
if (_beside / "envs" / "pool.py").is_file():  # a checkout, installed or not
    __path__.append(str(_beside))
