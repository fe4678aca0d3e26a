"""
Imported by the server that processes are forked from, before it forks the first: Ctrl-C reaches all of them at once,
and until a new one gets to its own code it must not end it with a traceback. The parent decides what happens.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
# Blocked until here (processes.py). What is ignored can have a handler again, in a process or a program that it starts.
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
