"""What every process that runs tests needs."""
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)                    # a worker of pytest-xdist ignores Ctrl-C, and so would every command that a test starts and interrupts
