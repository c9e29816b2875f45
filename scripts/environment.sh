# Sourced by the scripts beside it: makes .venv where it is absent or out of date.
# PYTHON chooses the interpreter (3.11 to 3.13); pip's own variables choose the index.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

installed=.venv/installed
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -f "$installed" ] || [ "$(cat "$installed")" != "$wanted" ]; then
    python=${PYTHON:-python3}
    "$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"kanlm needs Python 3.11 to 3.13, not {sys.version.split()[0]}: set PYTHON")
CHECK
    echo "making .venv (once; a few minutes)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
    echo "$wanted" >"$installed"
fi
