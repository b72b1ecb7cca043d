"""Which Vulkan driver is in use, and does it work? python -m pi_stepnft.envs.vulkan"""

import sys

from pi_stepnft.envs.vulkan import main

sys.exit(main())
