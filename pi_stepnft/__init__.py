"""π-StepNFT: single-file reinforcement learning of flow-based vision-language-action policies (arXiv 2603.02083).

Everything lives under this one name: `from pi_stepnft import envs, policies`. In an installation the rooms (`algos`, `harness`,
`envs`, `policies`) stand inside this package; in a checkout they stand beside it, and are found there.
"""

from pathlib import Path as _Path

__version__ = "0.2.0"

_root = _Path(__file__).resolve().parents[1]
CHECKOUT = _root if (_root / "algos" / "stepnft_pi0.py").is_file() else None
"""The root of the checkout that this code runs from; None where it is installed from a wheel."""

if CHECKOUT:
    __path__.append(str(CHECKOUT))

from pi_stepnft import registration as _registration  # noqa: E402 (behind the path)

_registration.register()
