"""FULL FREE CONFIG: train; from step FULL to FREE the disk takes files of 60 kB only: no
checkpoint, a line of log."""

import resource
import signal
import sys

from train import Trainer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
full, free_again = int(sys.argv[1]), int(sys.argv[2])
trainer = Trainer(sys.argv[3:])
for step in trainer.iterations():
    limit = 60_000 if full <= step < free_again else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(trainer.end())
