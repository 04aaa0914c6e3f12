"""What a GPU is asked, in whatever minutes there are: `bench/gpu.sh` runs it, `python -m bench.gpu.collect` keeps it.

    programs.py   what is asked: three programs, each a list of steps in the order in which they tell most
    driver.py     runs each step as a process of its own, with its own limit, under one deadline for all
    run.py        the inside of that process: it calls `main()` of the step's file
    record.py     what a step calls: one JSON line a result, on disk the moment it exists
    timing.py     GPU time by events and by graph replay, and host time without waiting
    cases.py      what steps share: sizes, masks, ways tried before they are timed, and the kernels that they launch
    table.py      the closing table, made from those lines alone
    collect.py    from those lines to bench/results/<gpu>.json and the tables of bench/README.md

Every other file is a step, named after what it measures, or serves one (pieces.py, sanitizer_case.py). Steps
know nothing of each other: one that crashes, hangs or is killed does not affect the rest.
"""
