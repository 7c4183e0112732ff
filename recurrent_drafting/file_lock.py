"""An open file locked against other processes, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

# What network file systems answer that are mounted without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

logger = logging.getLogger(__name__)


def acquire(descriptor: int, path: Path) -> bool:
    """Lock an open file until it is closed; tell whether that worked.

    Where the file system has no locks the answer is yes, with a warning: a run without protection is better than none.

    Args:
        descriptor: of the file.
        path: of the file, for the warning.

    Returns:
        False where another process holds the lock.

    Raises:
        OSError: the file cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): a second run in it would not be noticed", path, error.strerror)
    return True
