"""How long the threads of OpenMP wait for more work before they sleep.

Between two products they spin, by default for milliseconds. Where another process has a core, a token then
takes several times as long, as the thread that works waits for one that spins.
"""

import os
import sys

from flamingo.starting import is_command

# A quiet machine does not lose by it, as it does by OMP_WAIT_POLICY=PASSIVE.
SPINS = "20000"
# The demo's products are too small to wait awake for: with one of two cores taken, a step of two threads took
# 0.3 to 0.6 s, and 0.8 to 2.4 s with the spins above.
DEMO_SPINS = "0"


def _wait_briefly() -> None:
    """For both names of the command, before torch starts its threads; whatever the user has set stays."""
    if is_command("flamingo") and "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", DEMO_SPINS if "demo" in sys.orig_argv else SPINS)


_wait_briefly()
