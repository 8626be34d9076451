"""Imported by the server of processes alone: it leaves its client's process group, and what it forks with it.

Ctrl-C and a scheduler's signal to a group then reach the client alone, which ends its work with one signal. A second
one would end a training before it has saved.
"""

import os

os.setpgrp()
