"""Training runs on real ratings: does the loss help sparse domains, and at what price?"""

import os

# Read once, when torch is imported. Threads that sleep while they wait cost nothing on an idle
# machine; on a busy one (load 4 on two cores) an epoch took 9 s, and 31 s with the usual spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
