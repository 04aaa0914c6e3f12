"""Scoring on the Llama-2-7B shape: ours, the released script's way, and our own forward and dX alone (scoring_7b.py).

Our scores are held against the script's first. Then rounds in turns, so that a ratio is of the same minutes.
"""

from bench.gpu import record, timing
from bench.scoring import error
from bench.scoring_7b import BARE, BATCH, DTYPES, NEAR, OURS, SCRIPT, TOKENS, made

CASE = "7B shape"
ROWS, ROUNDS = 32, 5


def main() -> None:
    device = record.device()
    rows = BATCH if record.rehearsal() else ROWS
    scored = made(device, rows)
    scored.warm_up()
    ways = scored.ways()
    off = error(ways[OURS](), ways[SCRIPT]())
    facts = {"rows": rows, "tokens_a_row": TOKENS, "batch_size": BATCH, "dtype": str(DTYPES[device])}
    record.result(f"{CASE} | ours against the script's scores [error]", "", off, allowed=NEAR[device], **facts)
    # A NaN is not near anything.
    if not off < NEAR[device]:
        record.wrong(CASE, f"error {off:.3g} against the released script's scores, allowed {NEAR[device]}")
    # Twice in the round that is thrown away, and a round to spare.
    began_with = record.remaining()
    for way in ways.values():
        way()
    a_round = began_with - record.remaining() if not record.rehearsal() else 0.0
    rounds = ROUNDS if not a_round > 0 else int(max(1, min(ROUNDS, record.remaining() / a_round - 4)))
    medians = timing.say(CASE, timing.times(ways, kinds=("events",), rounds=rounds, calls=1), **facts)
    at = {way: of["events"] for way, of in medians.items() if "events" in of}
    words = {
        BARE: "scoring a 7B over a forward and backward for dX alone",
        SCRIPT: "scoring a 7B, times as fast as the released script's way",
    }
    if {OURS, BARE} <= at.keys():
        record.result(f"{CASE} | ours over forward and dX alone", "x", at[OURS] / at[BARE], headline=words[BARE])
    if {OURS, SCRIPT} <= at.keys():
        record.result(f"{CASE} | times faster than the script's", "x", at[SCRIPT] / at[OURS], headline=words[SCRIPT])
    for way, call in ways.items():
        record.result(f"{CASE} | {way} [peak beyond the model]", "B", timing.peak_bytes(call), way=way)
