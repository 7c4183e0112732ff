"""What every test needs of its process."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that: programs that tests interrupt would
# not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)
