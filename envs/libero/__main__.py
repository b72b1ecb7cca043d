"""Is there a renderer for LIBERO? python -m pi_stepnft.envs.libero: exit code 0, or one line that says what to do."""

import sys

from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.libero import tasks

if sys.argv[1:]:
    sys.exit(f"error: python -m pi_stepnft.envs.libero takes no arguments, got {' '.join(sys.argv[1:])}")
try:
    tasks.choose_gl()
except EnvError as error:
    sys.exit(f"error: {error}")
