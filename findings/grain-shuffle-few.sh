#!/usr/bin/env bash
# grain 0.2.18: the fewer elements a data set has, the longer `shuffle` takes for each: milliseconds for ten of them.
#
# Guess before it was run: some microseconds for each element, however many there are.
# Seen: on a busy machine 6 ms each (mean of 150) for 10 elements, 15 ms for 3, 0.7 ms for 100, 0.1 ms for 1,000, and 9
# microseconds for 100,000. The time is about 0.06 s divided by the number of elements, up to some ten thousand.
# Who meets it: who trains on few images, or tests a pipeline on a few: the order of a batch takes longer than reading it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
cat > "$folder/run.py" <<'PY'
import time

import grain


def microseconds(number):
    order = grain.MapDataset.range(number).shuffle(0)
    start = time.perf_counter()
    for i in range(150):
        order[i]
    return (time.perf_counter() - start) / 150 * 1e6


few, many = microseconds(10), min(microseconds(100_000) for _ in range(5))
print(f"{few:.0f} and {many:.0f} microseconds for each of 10 and of 100,000")
print(grain.__version__, "slower" if few > 50 * many else "alike")
PY
cd "$folder"
venv/bin/python run.py 2>/dev/null | tee found.txt
grep -qx '0.2.18 slower' found.txt
