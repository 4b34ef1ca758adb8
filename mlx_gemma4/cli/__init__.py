"""The command line: one module for each command, the chat REPL, terminal input and output."""

import os

# numpy reads this when it is first imported. Products are shared among cores by threads of ours (ops/cores.py).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
