"""The isolated process that judges a model's answers by executing them; `isolation.run_isolated` starts it.

It gets the tasks and the answers, and gives figures: there is no model in it. It cuts itself off before it imports
anything more, since a process can do so only as long as it has one thread.
"""

import json
import os
import sys
from pathlib import Path

from .isolation import cut_off, limit


def main(port: str, request: str, result: str) -> None:
    cut_off(int(port))
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    limit(asked["seconds"])
    from .harness import judge, load_tasks, merged

    loaded = merged(list(load_tasks(asked["tasks"], asked["shots"]).values()))
    # The tasks' data files are named from the working directory, and what the code writes is to go with the home.
    os.chdir(os.environ["HOME"])
    figures = judge(loaded, asked["answers"], asked["limit"], asked["seed"])
    Path(result).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
