"""Exclusive locks on open files, where the file system has any; the operating system frees them with the process."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

# Lustre without its option flock, NFS without its lock daemon, and others that have none.
_NONE_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def take_lock(file: IO[Any], *, wait: bool = False) -> bool | None:
    """Lock `file`: True; False where another process has it, and this one does not `wait`; None without locks.

    Errors:
        OSError: anything else that went wrong.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise
        return None
    return True
