"""A worker that answers a case with the case, once it has done what the case says."""

import json
import os
import sys
import time

for line in sys.stdin:
    case = json.loads(line)
    time.sleep(case.get("sleep", 0))
    if case.get("die"):
        print("it ran out of luck", file=sys.stderr, flush=True)
        os._exit(1)
    print(line, end="", flush=True)
